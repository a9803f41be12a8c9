"""Workloads are functions of their settings and the seed."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from kvctl.lab.config.workload_config import (
    Agents,
    Chat,
    Giant,
    Rag,
    SharedPrefix,
    Thrash,
    Trace,
    Uniform,
    Workload,
)
from kvctl.lab.workload.access_generators import accesses, survey

PREFIX = SharedPrefix(num_requests=20, num_prefixes=2, prefix_tokens=64)
CHAT = Chat(num_sessions=3, turns=2, system_tokens=8, user_tokens=16, answer_tokens=32)


def tokens(workload: Workload, seed: int) -> list[bytes]:
    """Return the prompts of a workload in order."""
    return [access.tokens().tobytes() for access in accesses(workload, seed)]


def test_generators_repeat_under_a_seed() -> None:
    """A seed determines the workload."""
    for workload in (PREFIX, CHAT):
        assert tokens(workload, 7) == tokens(workload, 7)
        assert tokens(workload, 7) != tokens(workload, 8)


def test_lengths_are_known_without_generating_tokens() -> None:
    """`num_tokens` is the size of `tokens()`; the survey is their sum."""
    for workload in (PREFIX, CHAT):
        found = list(accesses(workload, 1))
        assert all(access.tokens().size == access.num_tokens for access in found)
        total = survey(workload, 1)
        assert total.num_requests == len(found)
        assert total.num_tokens == sum(access.num_tokens for access in found)
        assert total.longest == max(access.num_tokens for access in found)


def test_prefixes_are_shared_and_suffixes_unique() -> None:
    """Twenty requests have two prefixes and twenty suffixes."""
    prompts = tokens(PREFIX, 1)
    assert len({prompt[: 64 * 4] for prompt in prompts}) == 2
    assert len({prompt[64 * 4 :] for prompt in prompts}) == 20


def test_a_chat_turn_begins_with_the_previous_turns() -> None:
    """Turn two contains turn one and its answer; sessions share the system prompt."""
    first, second = (
        [access.tokens() for access in accesses(CHAT, 1)][turn * 3] for turn in (0, 1)
    )
    assert first.size == 8 + 16
    assert second.size == 8 + 16 + 32 + 16
    assert (second[: first.size] == first).all()
    starts = {prompt[: 8 * 4] for prompt in tokens(CHAT, 1)}
    assert len(starts) == 1


def test_a_session_stays_with_one_engine() -> None:
    """All turns of a session have the same affinity."""
    by_session: dict[str, set[int]] = {}
    for access in accesses(CHAT, 1):
        by_session.setdefault(access.session, set()).add(access.affinity)
    assert all(len(affinities) == 1 for affinities in by_session.values())


def test_a_trace_is_cut_after_max_requests(tmp_path: Path) -> None:
    """`max_requests` limits a replay; a request without a session has its own."""
    path = tmp_path / "t.jsonl"
    path.write_text('{"input_length":4,"hash_ids":[1],"timestamp":250}\n' * 5)
    found = list(accesses(Trace(trace=str(path), block_size=4, max_requests=3), 0))
    assert [access.request_id for access in found] == ["0", "1", "2"]
    assert len({access.session for access in found}) == 3
    assert found[0].arrival_s == 0.25


GENERATORS = [
    Rag(num_requests=12, num_documents=6, documents_per_request=2),
    Agents(num_sessions=3, steps=4, subagents=1),
    Uniform(num_requests=12, num_prompts=3, prompt_tokens=64),
    Thrash(num_requests=7, num_prompts=3, prompt_tokens=64),
    Giant(num_requests=12, every=5, giant_tokens=512, prompt_tokens=64),
]


@pytest.mark.parametrize("workload", GENERATORS, ids=lambda one: type(one).__name__)
def test_generated_prompts_have_the_announced_lengths(workload: Workload) -> None:
    """Lengths are correct, request ids unique, and repetitions equal."""
    first, again = (list(accesses(workload, 5)) for _ in range(2))
    assert [one.num_tokens for one in first] == [one.tokens().size for one in first]
    assert len({one.request_id for one in first}) == len(first)
    for one, other in zip(first, again, strict=True):
        assert (one.tokens() == other.tokens()).all()


def test_an_agent_context_only_grows() -> None:
    """Each step begins with the previous one; a subagent with half its parent's."""
    steps: dict[str, list[Any]] = {}
    for access in accesses(Agents(num_sessions=2, steps=6, subagents=1), 0):
        steps.setdefault(access.session, []).append(access.tokens())
    assert [len(steps[name]) for name in sorted(steps)] == [6, 3, 6, 3]
    for tokens in steps.values():
        for earlier, later in pairwise(tokens):
            assert (later[: earlier.size] == earlier).all()
    parent, child = steps["0"][3], steps["1"][0]
    shared = parent.size // 2
    assert (child[:shared] == parent[:shared]).all()


def test_thrash_is_cyclic_and_giants_never_repeat() -> None:
    """Prompts repeat cyclically; each giant prompt is unique."""
    circle = [
        one.tokens() for one in accesses(Thrash(num_requests=7, num_prompts=3), 0)
    ]
    assert (circle[0] == circle[3]).all()
    assert (circle[0] != circle[1]).any()
    giant = Giant(num_requests=10, every=5, giant_tokens=512, prompt_tokens=64)
    first, second = (
        one.tokens() for one in accesses(giant, 0) if one.num_tokens == 512
    )
    assert (first != second).any()
