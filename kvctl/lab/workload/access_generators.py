"""Generators of each workload's requests.

Every engine iterates the whole workload and executes its own part, so that no process
has to distribute requests. Requests depend on the workload and the seed alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np

from kvctl.lab.config.workload_config import (
    Agents,
    Chat,
    Documents,
    GeneratedWorkload,
    Giant,
    Rag,
    SharedPrefix,
    Thrash,
    Trace,
    Uniform,
    Workload,
)
from kvctl.lab.traces import trace_reader as reader
from kvctl.lab.traces.trace_rows import Tokens
from kvctl.lab.workload.document_requests import (
    DocumentPiece,
    draw_tokens,
    requests,
)

PREFIX, SUFFIX, CHOICE, SYSTEM, TURN, DOCUMENT, QUESTION, PROMPT, RESULT = range(9)
"""Streams of random numbers, distinct under one seed."""


@dataclass(frozen=True, slots=True)
class Access:
    """One request. `tokens()` generates the prompt, so that skipping is cheap."""

    request_id: str
    session: str
    affinity: int
    """Accesses of equal affinity belong to the same engine."""
    num_tokens: int
    output_length: int
    arrival_s: float | None
    tokens: Callable[[], Tokens]
    documents: tuple[DocumentPiece, ...] = ()
    """Pieces of the prompt that are stored on their own."""


@dataclass(frozen=True, slots=True)
class Survey:
    """Totals of a workload."""

    num_requests: int
    num_tokens: int
    longest: int


def accesses(workload: Workload, seed: int) -> Iterator[Access]:
    """Yield the requests of a workload in order.

    Raises:
        SetupError: from a trace reader, with file, line and reason.
    """
    match workload:
        case SharedPrefix():
            return _shared_prefix(workload, seed)
        case Chat():
            return _chat(workload, seed)
        case Rag():
            return _rag(workload, seed)
        case Agents():
            return _agents(workload, seed)
        case Uniform():
            return _uniform(workload, seed)
        case Thrash():
            return _thrash(workload, seed)
        case Giant():
            return _giant(workload, seed)
        case Trace():
            return _trace(workload)
        case Documents():
            return _documents(workload, seed)


def survey(workload: Workload, seed: int) -> Survey:
    """Return the totals of a workload, without generating tokens."""
    lengths = [access.num_tokens for access in accesses(workload, seed)]
    return Survey(len(lengths), sum(lengths), max(lengths, default=0))


@dataclass(frozen=True, slots=True)
class _Segment:
    """The first `num_tokens` of one stream of random tokens."""

    num_tokens: int
    stream: int
    number: int = 0


def _request(
    workload: GeneratedWorkload,
    seed: int,
    session: int,
    output_length: int,
    segments: Sequence[_Segment],
    turn: int | None = None,
    affinity: int | None = None,
) -> Access:
    """Return a request whose prompt is a sequence of segments.

    Without a turn it is the only request of its session.
    """
    return Access(
        request_id=f"{session}" if turn is None else f"{session}.{turn}",
        session=str(session),
        affinity=session if affinity is None else affinity,
        num_tokens=sum(segment.num_tokens for segment in segments),
        output_length=output_length,
        arrival_s=None,
        tokens=partial(_prompt, workload.vocabulary, seed, segments),
    )


def _prompt(vocabulary: int, seed: int, segments: Sequence[_Segment]) -> Tokens:
    return np.concatenate(
        [
            draw_tokens(vocabulary, one.num_tokens, seed, one.stream, one.number)
            for one in segments
        ]
    )


def _shared_prefix(workload: SharedPrefix, seed: int) -> Iterator[Access]:
    rng = np.random.default_rng((seed, CHOICE))
    half = workload.suffix_tokens // 2
    for index in range(workload.num_requests):
        prefix = int(rng.integers(workload.num_prefixes))
        length = workload.suffix_tokens + int(rng.integers(-half, half + 1))
        segments = (
            _Segment(workload.prefix_tokens, PREFIX, prefix),
            _Segment(length, SUFFIX, index),
        )
        yield _request(workload, seed, index, workload.output_tokens, segments)


def _chat(workload: Chat, seed: int) -> Iterator[Access]:
    """Yield the first turns of all sessions, then the second turns, and so on."""
    system = _Segment(workload.system_tokens, SYSTEM)
    turn_tokens = workload.user_tokens + workload.answer_tokens
    for turn in range(workload.turns):
        length = turn * turn_tokens + workload.user_tokens
        for session in range(workload.num_sessions):
            segments = (system, _Segment(length, TURN, session))
            yield _request(
                workload, seed, session, workload.answer_tokens, segments, turn
            )


def _rag(workload: Rag, seed: int) -> Iterator[Access]:
    rng = np.random.default_rng((seed, CHOICE))
    weights = (1.0 + np.arange(workload.num_documents)) ** -workload.skew
    weights /= weights.sum()
    size = workload.document_tokens
    for index in range(workload.num_requests):
        chosen = rng.choice(
            workload.num_documents, workload.documents_per_request, False, weights
        )
        if workload.ordered:
            chosen = np.sort(chosen)
        segments = (
            _Segment(workload.system_tokens, SYSTEM),
            *(_Segment(size, DOCUMENT, document) for document in chosen.tolist()),
            _Segment(workload.question_tokens, QUESTION, index),
        )
        yield _request(workload, seed, index, workload.output_tokens, segments)


@dataclass(frozen=True, slots=True)
class _Agent:
    """One agent's context: the part shared with its parent, and its growth."""

    number: int
    parent: int
    """Its own number for the first agent of a session."""
    shared_tokens: int
    begin: int
    """Step of the session at which it begins."""
    lengths: tuple[int, ...]
    """Tokens of the context at each of its steps."""

    def segments(self, length: int, system_tokens: int) -> tuple[_Segment, ...]:
        """Return the segments of a context of this length.

        A shorter context is the prefix of a longer one.
        """
        shared = length if self.parent == self.number else self.shared_tokens
        system = min(system_tokens, shared)
        return (
            _Segment(system, SYSTEM),
            _Segment(shared - system, RESULT, self.parent),
            _Segment(length - shared, RESULT, self.number),
        )


def _agents(workload: Agents, seed: int) -> Iterator[Access]:
    """Yield each step of all agents; subagents begin after half of the steps."""
    agents = list(_agent_tree(workload, seed))
    for step in range(workload.steps):
        for agent in agents:
            own_step = step - agent.begin
            if 0 <= own_step < len(agent.lengths):
                length = agent.lengths[own_step]
                yield _request(
                    workload,
                    seed,
                    agent.number,
                    workload.answer_tokens,
                    agent.segments(length, workload.system_tokens),
                    turn=own_step,
                    affinity=agent.parent // (1 + workload.subagents),
                )


def _agent_tree(workload: Agents, seed: int) -> Iterator[_Agent]:
    rng = np.random.default_rng((seed, CHOICE))
    half, base = workload.steps // 2, workload.system_tokens + workload.task_tokens
    for session in range(workload.num_sessions):
        number = session * (1 + workload.subagents)
        own = _growing(workload, rng, base, workload.steps)
        yield _Agent(number, number, 0, 0, own)
        for child in range(1, 1 + workload.subagents):
            shared = own[half] // 2
            lengths = _growing(workload, rng, shared, workload.steps - half)
            yield _Agent(number + child, number, shared, half, lengths)


def _growing(
    workload: Agents, rng: np.random.Generator, base: int, steps: int
) -> tuple[int, ...]:
    results = rng.exponential(workload.result_tokens, steps).astype(int) + 1
    grown = base + np.cumsum(results + workload.answer_tokens)
    return tuple(grown.tolist())


def _uniform(workload: Uniform, seed: int) -> Iterator[Access]:
    rng = np.random.default_rng((seed, CHOICE))
    for index in range(workload.num_requests):
        prompt = int(rng.integers(workload.num_prompts))
        segments = (_Segment(workload.prompt_tokens, PROMPT, prompt),)
        yield _request(workload, seed, index, workload.output_tokens, segments)


def _thrash(workload: Thrash, seed: int) -> Iterator[Access]:
    for index in range(workload.num_requests):
        prompt = index % workload.num_prompts
        segments = (_Segment(workload.prompt_tokens, PROMPT, prompt),)
        yield _request(workload, seed, index, 0, segments)


def _giant(workload: Giant, seed: int) -> Iterator[Access]:
    rng = np.random.default_rng((seed, CHOICE))
    for index in range(workload.num_requests):
        if index % workload.every == workload.every - 1:
            segment = _Segment(workload.giant_tokens, SUFFIX, index)
        else:
            prompt = int(rng.integers(workload.num_prompts))
            segment = _Segment(workload.prompt_tokens, PROMPT, prompt)
        yield _request(workload, seed, index, workload.output_tokens, (segment,))


def _trace(workload: Trace) -> Iterator[Access]:
    rows = reader.read(workload)
    for index, row in enumerate(islice(rows, workload.max_requests)):
        session = row.session_id
        yield Access(
            request_id=str(index),
            session=str(index) if session is None else session,
            affinity=index if session is None else zlib.crc32(session.encode()),
            num_tokens=row.num_tokens,
            output_length=row.output_length,
            arrival_s=row.arrival_s,
            tokens=row.tokens,
        )


def _documents(workload: Documents, seed: int) -> Iterator[Access]:
    for request in requests(workload, seed):
        yield Access(
            request_id=str(request.index),
            session=str(request.index),
            affinity=request.index,
            num_tokens=request.num_tokens,
            output_length=request.output_length,
            arrival_s=request.arrival_s,
            tokens=partial(request.tokens, workload.vocabulary),
            documents=tuple(request.documents),
        )
