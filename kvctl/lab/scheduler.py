"""The scheduler of a played engine: it looks up, hands out blocks, and tells ranks.

A slot is one request under way: a thread that plays one access after another, with a
connection of its own to each rank. So the closed loop's concurrency is its number of
slots, and every call is timed where an engine would wait for it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from time import monotonic, perf_counter

import msgspec
from msgspec.structs import replace

from kvcore.client import KVClient
from kvcore.errors import Closed, KVError, Unavailable
from kvcore.keys import ChunkHash, HashChain, SessionKey, chain_seed, pack_tokens
from kvcore.protocol import LookupReply
from kvctl.lab.blocks import BlockPool
from kvctl.lab.measure import Recorder
from kvctl.lab.messages import (
    EnginePlan,
    EngineReport,
    Failed,
    Play,
    Played,
    Ready,
    Tally,
    send,
)
from kvctl.lab.workload import Access, Tokens, accesses

PROGRESS_S = 0.5
MAX_ERRORS_TOLD = 10
HEAD_BYTES = 8
COUNTED_IN_TIME = (
    "requests",
    "errors",
    "tokens",
    "tokens_hit",
    "store_bytes",
    "retrieve_bytes",
)
"""Of a tally, what a result shows over time."""
HASH_SLICE = 1 << 20
"""Chunks hashed at once: nobody else is served by this thread."""

_played = msgspec.msgpack.Decoder(Played)


class Score:
    """What the slots of an engine count and measure together."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tally = Tally()
        self._recorder = Recorder()
        self._heads: set[bytes] = set()
        self._errors: list[str] = []

    def add(
        self,
        tally: Tally,
        durations: dict[str, float],
        heads: Sequence[bytes] = (),
        errors: Sequence[str] = (),
    ) -> None:
        """Count something in; each error counts as one."""
        with self._lock:
            self._tally.add(tally)
            self._tally.errors += len(errors)
            self._heads.update(heads)
            self._errors += errors[: MAX_ERRORS_TOLD - len(self._errors)]
        self._recorder.add(durations)

    def tally(self) -> Tally:
        """Return a copy of the counts so far."""
        with self._lock:
            return replace(self._tally)

    def roll(self) -> Tally:
        """End a window of time; return a copy of the counts so far."""
        tally = self.tally()
        counts = {name: int(getattr(tally, name)) for name in COUNTED_IN_TIME}
        self._recorder.roll(counts)
        return tally

    def report(self) -> EngineReport:
        """Return everything."""
        self.roll()
        with self._lock:
            return EngineReport(
                tally=self._tally,
                samples=self._recorder.samples(),
                chunk_heads=b"".join(sorted(self._heads)),
                errors=tuple(self._errors),
            )


class Queue:
    """This engine's share of the workload, in order; a session waits for its turn."""

    def __init__(self, plan: EnginePlan) -> None:
        self._condition = threading.Condition()
        self._source = _share(plan)
        self._next: Access | None = None
        self._active: set[str] = set()
        self._stopped = False

    def take(self) -> Access | None:
        """Return the next access, or None when no more is to begin.

        An access whose session has one under way waits, and all behind it: a user
        sends the next turn after reading the answer.

        Raises:
            SetupError: from a trace reader.
        """
        with self._condition:
            access = self._next or next(self._source, None)
            self._next = access
            while access and access.session in self._active and not self._stopped:
                self._condition.wait()
                access = self._next = self._next or next(self._source, None)
            if access is None or self._stopped:
                return None
            self._next = None
            self._active.add(access.session)
            return access

    def done(self, access: Access) -> None:
        """Say that an access has ended."""
        with self._condition:
            self._active.discard(access.session)
            self._condition.notify_all()

    def stop(self) -> None:
        """Hand out no more."""
        with self._condition:
            self._stopped = True
            self._condition.notify_all()


def _share(plan: EnginePlan) -> Iterator[Access]:
    engines = plan.scenario.engines
    for access in accesses(plan.scenario.workload, plan.seed):
        if access.affinity % engines == plan.engine:
            yield access


class Engine:
    """Plays accesses with the ranks' help."""

    def __init__(self, plan: EnginePlan, client: KVClient) -> None:
        geometry, scenario = plan.geometry, plan.scenario
        self.plan = plan
        self.client = client
        self.chunk_size = client.chunk_size
        self.block_size = geometry.block_size
        self.seed = chain_seed("prefix", plan.model, scenario.ranks, self.chunk_size)
        num_groups = len(geometry.groups(1, 0, scenario.ranks).groups)
        self.pool = BlockPool(
            scenario.cache_blocks, num_groups, plan.seed + plan.engine
        )
        self.score = Score()
        self.queue = Queue(plan)
        self.failure: str | None = None

    def run_slot(self, ranks: Sequence[Connection]) -> None:
        """Play until there is no more to play; a fatal error stops every slot."""
        try:
            while (access := self.queue.take()) is not None:
                try:
                    self._play(access, ranks)
                finally:
                    self.queue.done(access)
        except (EOFError, OSError):
            self._fail(f"a rank of engine {self.plan.engine} is gone")
        except KVError as error:
            self._fail(f"engine {self.plan.engine}: {error.code}: {error.message}")
        finally:
            for rank in ranks:
                rank.close()

    def _fail(self, message: str) -> None:
        """Stop every slot; the first reason is told, the others follow from it."""
        self.queue.stop()
        if self.failure is None:
            self.failure = message
            self.score.add(Tally(), {}, errors=(message,))

    def _play(self, access: Access, ranks: Sequence[Connection]) -> None:
        """One request's life: look up, load and compute, store, end.

        Raises:
            Unavailable, Closed, SetupError: nothing can be played any more.
        """
        tokens = access.tokens()
        session = SessionKey(self.plan.engine_id, access.request_id)
        durations: dict[str, float] = {}
        begun = perf_counter()
        found = self._lookup(session, tokens, durations)
        if found is None:
            return
        hashes = self._hashes(tokens)
        if hashes:
            self._load_and_store(session, found.num_tokens, hashes, ranks)
        self._end(session, durations)
        durations["request"] = perf_counter() - begun
        tally = Tally(
            requests=1,
            tokens=len(tokens),
            tokens_hit=found.num_tokens,
            chunks=len(hashes),
            chunks_hit=found.num_chunks,
        )
        self.score.add(tally, durations, [head[:HEAD_BYTES] for head in hashes])

    def _lookup(
        self, session: SessionKey, tokens: Tokens, durations: dict[str, float]
    ) -> LookupReply | None:
        """Look up; what the server refuses is counted, and nothing is found."""
        model, ranks = self.plan.model, self.plan.scenario.ranks
        begun = perf_counter()
        try:
            found = self.client.lookup(session, model, ranks, tokens)
        except (Unavailable, Closed):
            raise
        except KVError as error:
            told = f"lookup: {error.code}: {error.message}"
            self.score.add(Tally(requests=1), {}, errors=(told,))
            return None
        durations["lookup"] = perf_counter() - begun
        return found

    def _hashes(self, tokens: Tokens) -> list[ChunkHash]:
        chain = HashChain(self.seed, self.chunk_size)
        for _ in chain.extend(pack_tokens(tokens), HASH_SLICE):
            pass
        return chain.hashes

    def _load_and_store(
        self,
        session: SessionKey,
        hit_tokens: int,
        hashes: Sequence[bytes],
        ranks: Sequence[Connection],
    ) -> None:
        end = len(hashes) * self.chunk_size
        blocks = self.pool.allocate(end // self.block_size)
        try:
            of_groups = tuple(ids.tobytes() for ids in self.pool.of_groups(blocks))
            task = Play(session, hit_tokens, end, b"".join(hashes), of_groups)
            for rank in ranks:
                send(rank, task)
            for rank in ranks:
                played = _played.decode(rank.recv_bytes())
                self.score.add(played.tally, played.durations, errors=played.errors)
                if played.unavailable:
                    raise Unavailable(played.unavailable)
        finally:
            self.pool.free(blocks)

    def _end(self, session: SessionKey, durations: dict[str, float]) -> None:
        begun = perf_counter()
        self.client.end_session(session)
        durations["end_session"] = perf_counter() - begun


def run(
    plan: EnginePlan, control: Connection, slots: list[tuple[Connection, ...]]
) -> None:
    """Be an engine's scheduler: play when told to, report at the end."""
    try:
        with KVClient(plan.address, label=f"bench {plan.engine_id}") as client:
            engine = Engine(plan, client)
            send(control, Ready())
            control.recv_bytes()  # Start
            _play_all(engine, control, slots)
            send(control, engine.score.report())
    except KVError as error:
        send(control, Failed(error.message))
    except (EOFError, OSError):
        pass  # The driver is gone: nobody is left to tell.


def _play_all(
    engine: Engine, control: Connection, slots: list[tuple[Connection, ...]]
) -> None:
    """Run the slots, telling the driver how far they are."""
    threads = [
        threading.Thread(target=engine.run_slot, args=(slot,), daemon=True)
        for slot in slots
    ]
    finished, last_one = Pipe(duplex=False)
    for thread in threads:
        thread.start()
    threading.Thread(target=_announce, args=(threads, last_one), daemon=True).start()
    max_s = engine.plan.scenario.load.max_s
    deadline = None if max_s is None else monotonic() + max_s
    while finished not in (ready := wait([finished, control], timeout=PROGRESS_S)):
        if control in ready:
            control.recv_bytes()  # Stop
            engine.queue.stop()
        if deadline is not None and monotonic() >= deadline:
            engine.queue.stop()
        send(control, engine.score.roll())


def _announce(threads: Sequence[threading.Thread], last_one: Connection) -> None:
    for thread in threads:
        thread.join()
    last_one.close()
