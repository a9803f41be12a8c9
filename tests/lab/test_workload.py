"""Workloads are functions of their settings and the seed."""

from __future__ import annotations

from pathlib import Path

from kvctl.lab.scenario import Chat, SharedPrefix, Trace, Workload
from kvctl.lab.workload import accesses, survey

PREFIX = SharedPrefix(num_requests=20, num_prefixes=2, prefix_tokens=64)
CHAT = Chat(num_sessions=3, turns=2, system_tokens=8, user_tokens=16, answer_tokens=32)


def tokens(workload: Workload, seed: int) -> list[bytes]:
    """Every prompt of a workload, in order."""
    return [access.tokens().tobytes() for access in accesses(workload, seed)]


def test_generators_repeat_under_a_seed() -> None:
    """One seed gives one workload, another seed another."""
    for workload in (PREFIX, CHAT):
        assert tokens(workload, 7) == tokens(workload, 7)
        assert tokens(workload, 7) != tokens(workload, 8)


def test_lengths_are_known_without_making_tokens() -> None:
    """`num_tokens` is what `tokens()` will have; the survey adds it up."""
    for workload in (PREFIX, CHAT):
        found = list(accesses(workload, 1))
        assert all(access.tokens().size == access.num_tokens for access in found)
        total = survey(workload, 1)
        assert total.num_requests == len(found)
        assert total.num_tokens == sum(access.num_tokens for access in found)
        assert total.longest == max(access.num_tokens for access in found)


def test_shared_prefixes_are_few_and_suffixes_are_not() -> None:
    """Twenty requests begin in two ways and end in twenty."""
    prompts = tokens(PREFIX, 1)
    assert len({prompt[: 64 * 4] for prompt in prompts}) == 2
    assert len({prompt[64 * 4 :] for prompt in prompts}) == 20


def test_a_chat_turn_begins_with_all_before_it() -> None:
    """Turn two holds turn one and its answer; sessions share the system prompt."""
    first, second = (
        [access.tokens() for access in accesses(CHAT, 1)][turn * 3] for turn in (0, 1)
    )
    assert first.size == 8 + 16
    assert second.size == 8 + 16 + 32 + 16
    assert (second[: first.size] == first).all()
    starts = {prompt[: 8 * 4] for prompt in tokens(CHAT, 1)}
    assert len(starts) == 1


def test_a_session_stays_with_one_engine() -> None:
    """All turns of a session have one affinity."""
    by_session: dict[str, set[int]] = {}
    for access in accesses(CHAT, 1):
        by_session.setdefault(access.session, set()).add(access.affinity)
    assert all(len(affinities) == 1 for affinities in by_session.values())


def test_a_trace_is_cut_after_max_requests(tmp_path: Path) -> None:
    """`max_requests` ends a replay early; requests without a session are their own."""
    path = tmp_path / "t.jsonl"
    path.write_text('{"input_length":4,"hash_ids":[1],"timestamp":250}\n' * 5)
    found = list(accesses(Trace(trace=str(path), block_size=4, max_requests=3), 0))
    assert [access.request_id for access in found] == ["0", "1", "2"]
    assert len({access.session for access in found}) == 3
    assert found[0].arrival_s == 0.25
