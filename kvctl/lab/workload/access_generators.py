"""Generators of each workload's requests.

Every engine iterates the whole workload and executes its own part, so that no process
has to distribute requests. Requests depend on the workload and the seed alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
import numpy.typing as npt

from kvctl.lab.config.workload_config import (
    Agents,
    Chat,
    Documents,
    Giant,
    Rag,
    SharedPrefix,
    Thrash,
    Trace,
    Uniform,
    Workload,
)
from kvctl.lab.traces import trace_reader as reader
from kvctl.lab.workload.document_requests import DocumentPiece, requests

Tokens = npt.NDArray[np.uint32]

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


def _draw(vocabulary: int, num_tokens: int, *stream: int) -> Tokens:
    return np.random.default_rng(stream).integers(
        vocabulary, size=num_tokens, dtype=np.uint32
    )


def _single(
    index: int, num_tokens: int, output_length: int, tokens: Callable[[], Tokens]
) -> Access:
    """Return a request that is the only one of its session."""
    return Access(
        str(index), str(index), index, num_tokens, output_length, None, tokens
    )


def _shared_prefix(workload: SharedPrefix, seed: int) -> Iterator[Access]:
    rng = np.random.default_rng((seed, CHOICE))
    half = workload.suffix_tokens // 2
    for index in range(workload.num_requests):
        prefix = int(rng.integers(workload.num_prefixes))
        length = workload.suffix_tokens + int(rng.integers(-half, half + 1))
        yield _single(
            index,
            workload.prefix_tokens + length,
            workload.output_tokens,
            partial(_prefix_tokens, workload, seed, prefix, index, length),
        )


def _prefix_tokens(
    workload: SharedPrefix, seed: int, prefix: int, index: int, length: int
) -> Tokens:
    vocabulary = workload.vocabulary
    return np.concatenate(
        (
            _draw(vocabulary, workload.prefix_tokens, seed, PREFIX, prefix),
            _draw(vocabulary, length, seed, SUFFIX, index),
        )
    )


def _chat(workload: Chat, seed: int) -> Iterator[Access]:
    """Yield the first turns of all sessions, then the second turns, and so on."""
    turn_tokens = workload.user_tokens + workload.answer_tokens
    for turn in range(workload.turns):
        length = workload.system_tokens + turn * turn_tokens + workload.user_tokens
        for session in range(workload.num_sessions):
            yield Access(
                request_id=f"{session}.{turn}",
                session=str(session),
                affinity=session,
                num_tokens=length,
                output_length=workload.answer_tokens,
                arrival_s=None,
                tokens=partial(_chat_tokens, workload, seed, session, length),
            )


def _chat_tokens(workload: Chat, seed: int, session: int, length: int) -> Tokens:
    """Return the prefix of a session's conversation, which ends with this turn."""
    num_tokens = workload.turns * (workload.user_tokens + workload.answer_tokens)
    system = _draw(workload.vocabulary, workload.system_tokens, seed, SYSTEM)
    conversation = _draw(workload.vocabulary, num_tokens, seed, TURN, session)
    return np.concatenate((system, conversation))[:length]


def _rag(workload: Rag, seed: int) -> Iterator[Access]:
    rng = np.random.default_rng((seed, CHOICE))
    weights = (1.0 + np.arange(workload.num_documents)) ** -workload.skew
    weights /= weights.sum()
    documents_tokens = workload.documents_per_request * workload.document_tokens
    length = workload.system_tokens + documents_tokens + workload.question_tokens
    for index in range(workload.num_requests):
        chosen = rng.choice(
            workload.num_documents, workload.documents_per_request, False, weights
        )
        if workload.ordered:
            chosen = np.sort(chosen)
        tokens = partial(_rag_tokens, workload, seed, chosen.tolist(), index)
        yield _single(index, length, workload.output_tokens, tokens)


def _rag_tokens(workload: Rag, seed: int, chosen: list[int], index: int) -> Tokens:
    vocabulary, size = workload.vocabulary, workload.document_tokens
    return np.concatenate(
        (
            _draw(vocabulary, workload.system_tokens, seed, SYSTEM),
            *(_draw(vocabulary, size, seed, DOCUMENT, one) for one in chosen),
            _draw(vocabulary, workload.question_tokens, seed, QUESTION, index),
        )
    )


@dataclass(frozen=True, slots=True)
class _Agent:
    """One agent's context: the part shared with its parent, and its growth."""

    number: int
    parent: int
    shared_tokens: int
    lengths: tuple[int, ...]
    """Tokens of the context at each step."""


def _agents(workload: Agents, seed: int) -> Iterator[Access]:
    """Yield each step of all agents; subagents begin after half of the steps."""
    agents = list(_agent_tree(workload, seed))
    half = workload.steps // 2
    for step in range(workload.steps):
        for agent in agents:
            begin = half if agent.parent != agent.number else 0
            if begin <= step < begin + len(agent.lengths):
                yield _agent_access(workload, seed, agent, step - begin)


def _agent_tree(workload: Agents, seed: int) -> Iterator[_Agent]:
    rng = np.random.default_rng((seed, CHOICE))
    half, base = workload.steps // 2, workload.system_tokens + workload.task_tokens
    for session in range(workload.num_sessions):
        number = session * (1 + workload.subagents)
        own = _growing(workload, rng, base, workload.steps)
        yield _Agent(number, number, 0, own)
        for child in range(1, 1 + workload.subagents):
            shared = own[half] // 2
            lengths = _growing(workload, rng, shared, workload.steps - half)
            yield _Agent(number + child, number, shared, lengths)


def _growing(
    workload: Agents, rng: np.random.Generator, base: int, steps: int
) -> tuple[int, ...]:
    results = rng.exponential(workload.result_tokens, steps).astype(int) + 1
    grown = base + np.cumsum(results + workload.answer_tokens)
    return tuple(grown.tolist())


def _agent_access(workload: Agents, seed: int, agent: _Agent, step: int) -> Access:
    length = agent.lengths[step]
    return Access(
        request_id=f"{agent.number}.{step}",
        session=str(agent.number),
        affinity=agent.parent // (1 + workload.subagents),
        num_tokens=length,
        output_length=workload.answer_tokens,
        arrival_s=None,
        tokens=partial(_agent_tokens, workload, seed, agent, length),
    )


def _agent_tokens(workload: Agents, seed: int, agent: _Agent, length: int) -> Tokens:
    vocabulary = workload.vocabulary
    system = _draw(vocabulary, workload.system_tokens, seed, SYSTEM)
    # Drawn at once, so that a shorter context is the prefix of a longer one.
    context = _draw(vocabulary, length, seed, RESULT, agent.parent)
    whole = np.concatenate((system, context))[:length]
    if agent.parent != agent.number:
        own = _draw(vocabulary, length, seed, RESULT, agent.number)
        whole[agent.shared_tokens :] = own[: length - agent.shared_tokens]
    return whole


def _uniform(workload: Uniform, seed: int) -> Iterator[Access]:
    rng = np.random.default_rng((seed, CHOICE))
    length, vocabulary = workload.prompt_tokens, workload.vocabulary
    for index in range(workload.num_requests):
        prompt = int(rng.integers(workload.num_prompts))
        tokens = partial(_draw, vocabulary, length, seed, PROMPT, prompt)
        yield _single(index, length, workload.output_tokens, tokens)


def _thrash(workload: Thrash, seed: int) -> Iterator[Access]:
    length, vocabulary = workload.prompt_tokens, workload.vocabulary
    for index in range(workload.num_requests):
        prompt = index % workload.num_prompts
        tokens = partial(_draw, vocabulary, length, seed, PROMPT, prompt)
        yield _single(index, length, 0, tokens)


def _giant(workload: Giant, seed: int) -> Iterator[Access]:
    rng = np.random.default_rng((seed, CHOICE))
    vocabulary = workload.vocabulary
    for index in range(workload.num_requests):
        if index % workload.every == workload.every - 1:
            length, stream = workload.giant_tokens, (SUFFIX, index)
        else:
            length = workload.prompt_tokens
            stream = (PROMPT, int(rng.integers(workload.num_prompts)))
        tokens = partial(_draw, vocabulary, length, seed, *stream)
        yield _single(index, length, workload.output_tokens, tokens)


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
