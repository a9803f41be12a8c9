"""Documents in tiers and across restarts: found, loaded, and byte for byte."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from kvcore.blend.blend_client import BlendClient
from kvcore.client import KVClient
from kvcore.keys import ExtraKey, SessionKey
from kvcore.protocol import CBLookupReply
from kvcore.shm import SHM_DIR
from kvcore.storage.recovery import arena_name
from tests.system.blend_worker import BlendWorkerCommands
from tests.system.conftest import Prompt
from tests.system.server_fixture import CHUNK, Server, wait_until
from tests.system.test_blend import Values, fresh, put, where
from tests.system.test_failing_tiers import Hanging
from tests.system.test_tiers import connected, counter, is_idle, written
from tests.system.worker_process import Worker
from tests.tiers.store_servers import ValkeyEngine

SMALL_CHUNKS = 8
SMALL = ("--l1-size", "64KiB")
"""Room for eight chunks of a buffer."""
BLEND = ("--engine", "blend")
MODEL = "m"

Serve = Callable[..., Server]
KEY = SessionKey("engine", "reader")


@dataclass
class BlendServer:
    """A server, a worker with buffer "a", and a client that acts as the scheduler."""

    server: Server
    worker: Worker
    client: KVClient

    def look_up(self, text: list[int], key: SessionKey = KEY) -> CBLookupReply:
        """Return the reply of a document lookup."""
        return BlendClient(self.client).lookup_pre_computed(key, MODEL, 1, text)

    def read(self, found: CBLookupReply, key: SessionKey = KEY) -> Values:
        """Retrieve what was found into a poisoned buffer, and return the buffer."""
        self.worker.call("poison_all", "a")
        ranges = found.ranges
        self.worker.call("blend", "retrieve_pre_computed", key, "a", 0, ranges=ranges)
        slots: Values = self.worker.call("read_slots", "a", 0, 1024)
        self.client.end_session(key)
        return slots

    def await_written(self, num_parts: int) -> None:
        """Wait until tiers have `num_parts` parts and L1 may evict them."""
        wait_until(lambda: written(self.client) == num_parts and is_idle(self.client))

    def evict_all(self, prompt: Prompt) -> None:
        """Fill L1 with another document, and wait until it may be evicted."""
        num_parts = written(self.client)
        put(self.worker, prompt(SMALL_CHUNKS * CHUNK), 99)
        if self.client.status().tiers:
            self.await_written(num_parts + SMALL_CHUNKS)

    def count(self, name: str) -> int:
        """Return a counter of the server."""
        return counter(self.client, name)


@contextmanager
def serve_blend(server: Server) -> Iterator[BlendServer]:
    """Connect a worker and a client to a running server."""
    worker = Worker(server.address, BlendWorkerCommands)
    try:
        worker.receive()
        worker.call("register_buffer", "a", MODEL)
        with connected(server) as client:
            yield BlendServer(server, worker, client)
    finally:
        worker.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a file tier."""
    return tmp_path / "tier"


def tier_of(folder: Path) -> tuple[str, ...]:
    """Return the options of a server with that tier."""
    return ("--tier", f"file://{folder}?retry=0.05")


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Path]:
    """A journal's path; its arena is removed after the test."""
    path = tmp_path / "journal"
    yield path
    (SHM_DIR / arena_name(path)).unlink(missing_ok=True)


def test_documents_that_only_a_tier_has_are_found_and_loaded(
    serve: Serve, folder: Path, prompt: Prompt
) -> None:
    """Two documents evicted from L1, in another order between other text."""
    with serve_blend(serve(*BLEND, *SMALL, *tier_of(folder))) as fixture:
        one, two = prompt(3 * CHUNK), prompt(2 * CHUNK)
        of_one, of_two = put(fixture.worker, one, 1), put(fixture.worker, two, 2)
        fixture.await_written(5)
        fixture.evict_all(prompt)
        assert fixture.count("chunks_evicted") == 5
        text = [*prompt(7), *two, *prompt(9), *one]
        found = fixture.look_up(text)
        first, second = 7, 7 + 2 * CHUNK + 9
        assert where(found) == [(first, 7 + 2 * CHUNK), (second, second + 3 * CHUNK)]
        assert [m.old_start for m in found.matches] == [
            *(i * CHUNK for i in range(2)),
            *(i * CHUNK for i in range(3)),
        ]
        assert fixture.count("parts_prefetched") == 5
        slots = fixture.read(found)
        assert np.array_equal(slots[:, :, first : 7 + 2 * CHUNK], of_two)
        assert np.array_equal(slots[:, :, second : second + 3 * CHUNK], of_one)


def test_a_document_half_in_l1_is_one_range(
    serve: Serve, folder: Path, prompt: Prompt
) -> None:
    """Only missing chunks are loaded, at any position of the document."""
    with serve_blend(serve(*BLEND, *SMALL, *tier_of(folder))) as fixture:
        tokens = prompt(5 * CHUNK)
        values = put(fixture.worker, tokens, 1)
        fixture.await_written(5)
        fixture.evict_all(prompt)
        fixture.read(fixture.look_up([*prompt(3), *tokens[2 * CHUNK : 4 * CHUNK]]))
        assert fixture.count("parts_prefetched") == 2
        found = fixture.look_up([*prompt(4), *tokens])
        assert where(found) == [(4, 4 + 5 * CHUNK)]
        assert fixture.count("parts_prefetched") == 5
        assert np.array_equal(fixture.read(found)[:, :, 4 : 4 + 5 * CHUNK], values)


def test_a_chunk_that_is_nowhere_is_no_longer_matched(
    serve: Serve, folder: Path, prompt: Prompt
) -> None:
    """A lost chunk is requested once; the rest of the document is found."""
    with serve_blend(serve(*BLEND, *SMALL, *tier_of(folder))) as fixture:
        tokens = prompt(3 * CHUNK)
        put(fixture.worker, tokens, 1)
        fixture.await_written(3)
        fixture.evict_all(prompt)
        lost = fixture.look_up(tokens).matches[1].hash
        fixture.client.end_session(KEY)
        fixture.evict_all(prompt)
        known = fixture.count("document_chunks")
        next(folder.glob(f"??/{lost.hex()}-*")).unlink()
        assert where(fixture.look_up(tokens)) == [(0, CHUNK)]
        assert fixture.count("document_chunks") == known - 1
        found = fixture.look_up(tokens)
        assert where(found) == [(0, CHUNK), (2 * CHUNK, 3 * CHUNK)]
        jobs = fixture.count("prefetches")
        assert fixture.look_up(tokens) == found
        assert fixture.count("prefetches") == jobs
        fixture.client.end_session(KEY)


def test_without_a_tier_an_evicted_chunk_is_no_longer_matched(
    serve: Serve, prompt: Prompt
) -> None:
    """The index holds the chunks of L1."""
    with serve_blend(serve(*BLEND, *SMALL)) as fixture:
        tokens = prompt(3 * CHUNK)
        put(fixture.worker, tokens, 1)
        fixture.evict_all(prompt)
        assert fixture.look_up(tokens) == CBLookupReply((), (), 0)
        assert fixture.count("document_chunks") == SMALL_CHUNKS


def test_both_ranks_parts_come_from_the_tier(
    serve: Serve, folder: Path, prompt: Prompt
) -> None:
    """Each rank reads its own part; a chunk with a lost part is not matched."""
    model = "of-two"
    server = serve(*BLEND, *SMALL, *tier_of(folder))
    workers = [Worker(server.address, BlendWorkerCommands) for _ in range(2)]
    tokens = prompt(2 * CHUNK)
    with connected(server) as client:
        blend = BlendClient(client)
        truth = []
        for rank, worker in enumerate(workers):
            worker.receive()
            worker.call("register_buffer", "ab"[rank], model, rank=rank, world_size=2)
            truth.append(fresh(2 * CHUNK, rank))
            worker.call("write", "ab"[rank], 0, truth[rank])
            worker.call("blend", "store_pre_computed", "ab"[rank], 0, tokens)
        wait_until(lambda: written(client) == 4 and is_idle(client))
        client.clear()
        found = blend.lookup_pre_computed(KEY, model, 2, [*prompt(3), *tokens])
        assert where(found) == [(3, 3 + 2 * CHUNK)]
        for rank, worker in enumerate(workers):
            name, ranges = "ab"[rank], found.ranges
            worker.call("blend", "retrieve_pre_computed", KEY, name, 0, ranges=ranges)
            read = worker.call("read_slots", name, 3, 3 + 2 * CHUNK)
            assert np.array_equal(read, truth[rank])
        client.end_session(KEY)
        client.clear()
        next(folder.glob(f"??/{found.matches[0].hash.hex()}-1-*")).unlink()
        again = blend.lookup_pre_computed(KEY, model, 2, tokens)
        assert not again.matches
        again = blend.lookup_pre_computed(KEY, model, 2, tokens)
        assert where(again) == [(CHUNK, 2 * CHUNK)]
        client.end_session(KEY)
        for worker in workers:
            worker.close()


def test_a_salts_documents_are_at_its_quotas_expense(
    serve: Serve, prompt: Prompt
) -> None:
    """A tenant over its quota evicts its own documents, not those of others."""
    salted = (ExtraKey(0, b'["salt", "greedy"]'),)
    quota = ("--set", 'l1.quotas={"salt:greedy" = "16KiB"}')
    with serve_blend(serve(*BLEND, *SMALL, *quota)) as fixture:
        ours = prompt(3 * CHUNK)
        put(fixture.worker, ours, 1)
        for _ in range(2 * SMALL_CHUNKS):
            fixture.worker.call(
                *("blend", "store_pre_computed", "a", 0, prompt(CHUNK)), extras=salted
            )
        assert where(fixture.look_up(ours)) == [(0, 3 * CHUNK)]
        fixture.client.end_session(KEY)


def test_known_chunks_in_tiers_are_bounded(
    serve: Serve, folder: Path, prompt: Prompt
) -> None:
    """Beyond the limit, the least recently used are removed."""
    limit = ("--set", "blend.max_tier_chunks=3")
    with serve_blend(serve(*BLEND, *SMALL, *tier_of(folder), *limit)) as fixture:
        old, new = prompt(2 * CHUNK), prompt(3 * CHUNK)
        put(fixture.worker, old, 1)
        put(fixture.worker, new, 2)
        fixture.await_written(5)
        fixture.evict_all(prompt)
        assert not fixture.look_up(old).matches
        assert len(fixture.look_up(new).matches) == 3
        fixture.client.end_session(KEY)


def test_a_tier_that_is_down_is_a_miss_and_forgets_nothing(
    serve: Serve, folder: Path, prompt: Prompt
) -> None:
    """Chunks in L1 are served meanwhile, the others after its return."""
    options = (*BLEND, *tier_of(folder), "--set", f"blend.keep={folder}.documents")
    with serve_blend(serve(*options)) as fixture:
        tokens = prompt(3 * CHUNK)
        values = put(fixture.worker, tokens, 1)
        fixture.await_written(3)
    assert fixture.server.stop() == 0
    taken = os.open(folder / ".lock", os.O_RDWR)
    fcntl.flock(taken, fcntl.LOCK_EX)
    with serve_blend(fixture.server.restart()) as fixture:
        assert fixture.count("document_chunks") == 3
        fixture.worker.call("write", "a", 0, values[:, :, :CHUNK])
        fixture.worker.call("blend", "store_pre_computed", "a", 0, tokens[:CHUNK])
        assert where(fixture.look_up(tokens)) == [(0, CHUNK)]
        assert fixture.count("document_chunks") == 3
        fixture.client.end_session(KEY)
        os.close(taken)

        def is_whole() -> bool:
            found = fixture.look_up(tokens)
            fixture.client.end_session(KEY)
            return where(found) == [(0, 3 * CHUNK)]

        wait_until(is_whole)
        assert np.array_equal(
            fixture.read(fixture.look_up(tokens))[:, :, : 3 * CHUNK], values
        )
    fixture.server.close()


@pytest.mark.parametrize("matcher", ["anywhere", "separated"])
def test_a_killed_server_with_a_tier_finds_documents_again(
    serve: Serve, folder: Path, prompt: Prompt, matcher: str
) -> None:
    """The next run matches chunks of the tier at any position, byte for byte."""
    options = [*BLEND, *tier_of(folder), "--set", f"blend.matcher={matcher}"]
    if matcher == "anywhere":
        options += ["--set", f"blend.keep={folder}.documents"]
    else:
        options += ["--set", "blend.start=[[7]]"]
    with serve_blend(serve(*options)) as fixture:
        one, two = prompt(2 * CHUNK + 3), prompt(3 * CHUNK)
        of_one, of_two = put(fixture.worker, one, 1), put(fixture.worker, two, 2)
        fixture.await_written(5)
    fixture.server.kill()
    with serve_blend(fixture.server.restart()) as fixture:
        text = [*prompt(7), 7, *two, 7, *one]
        found = fixture.look_up(text)
        after = 8 + 3 * CHUNK + 1
        assert where(found) == [(8, 8 + 3 * CHUNK), (after, after + 2 * CHUNK)]
        slots = fixture.read(found)
        assert np.array_equal(slots[:, :, 8 : 8 + 3 * CHUNK], of_two)
        assert np.array_equal(
            slots[:, :, after : after + 2 * CHUNK], of_one[:, :, : 2 * CHUNK]
        )
    fixture.server.close()


def test_a_killed_server_with_a_kept_l1_finds_documents_again(
    serve: Serve, journal: Path, prompt: Prompt
) -> None:
    """All acknowledged documents, after two kills; prefixes stay prefixes."""
    server = serve(*BLEND, "--set", f"l1.keep={journal}")
    known: list[tuple[list[int], Values]] = []
    text = prompt(2 * CHUNK)
    for run in range(3):
        with serve_blend(server) as fixture:
            for tokens, values in known:
                found = fixture.look_up([*prompt(5), *tokens])
                assert where(found) == [(5, 5 + 2 * CHUNK)]
                slots = fixture.read(found)
                assert np.array_equal(slots[:, :, 5 : 5 + 2 * CHUNK], values)
            assert not fixture.look_up(text).matches
            fixture.client.end_session(KEY)
            for number in range(2):
                tokens = prompt(2 * CHUNK)
                known.append((tokens, put(fixture.worker, tokens, 10 * run + number)))
            fixture.worker.call("blend", "store_final", KEY, "a", 0, 0, len(text), text)
        server.kill()
        server = server.restart()
    with serve_blend(server) as fixture:
        assert fixture.count("document_chunks") == 2 * len(known)
    server.close()


def test_what_a_kept_index_knows_and_l1_has_lost_is_forgotten(
    serve: Serve, journal: Path, prompt: Prompt
) -> None:
    """Without its memory a document is stored again."""
    server = serve(*BLEND, "--set", f"l1.keep={journal}")
    tokens = prompt(2 * CHUNK)
    with serve_blend(server) as fixture:
        put(fixture.worker, tokens, 1)
    assert server.stop() == 0
    (SHM_DIR / arena_name(journal)).unlink()
    again = server.restart()
    with serve_blend(again) as fixture:
        assert fixture.look_up(tokens) == CBLookupReply((), (), 0)
        assert fixture.count("document_chunks") == 0
        put(fixture.worker, tokens, 1)
        assert len(fixture.look_up(tokens).matches) == 2
        fixture.client.end_session(KEY)
    again.close()


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[ValkeyEngine]:
    """A store that several servers share."""
    engine = ValkeyEngine(tmp_path)
    try:
        engine.start()
        yield engine
    finally:
        engine.kill()


@pytest.mark.tiers
@pytest.mark.parametrize("matcher", ["anywhere", "separated"])
def test_another_servers_document_is_found_where_a_paragraph_begins(
    serve: Serve, valkey: ValkeyEngine, prompt: Prompt, matcher: str
) -> None:
    """Two servers with one tier find each other's documents and their own."""
    marks = ("--set", f"blend.matcher={matcher}", "--set", "blend.start=[[7]]")
    options = [*BLEND, "--tier", valkey.url, *marks]
    with serve_blend(serve(*options)) as here, serve_blend(serve(*options)) as there:
        one, two = prompt(3 * CHUNK), prompt(2 * CHUNK)
        of_one, of_two = put(here.worker, one, 1), put(there.worker, two, 2)
        here.await_written(3)
        there.await_written(2)
        text = [*prompt(4), 7, *one, 7, *two]
        after = 5 + 3 * CHUNK + 1
        for fixture, num_loaded in ((here, 2), (there, 3)):
            found = fixture.look_up(text)
            assert where(found) == [(5, 5 + 3 * CHUNK), (after, after + 2 * CHUNK)]
            slots = fixture.read(found)
            assert np.array_equal(slots[:, :, 5 : 5 + 3 * CHUNK], of_one)
            assert np.array_equal(slots[:, :, after : after + 2 * CHUNK], of_two)
            assert fixture.count("parts_prefetched") == num_loaded


def test_a_document_that_no_index_knows_is_found_where_a_paragraph_begins(
    serve: Serve, folder: Path, prompt: Prompt
) -> None:
    """A document of an earlier server is found by its separators only."""
    options = [*BLEND, *tier_of(folder)]
    tokens = prompt(2 * CHUNK)
    with serve_blend(server := serve(*options)) as fixture:
        values = put(fixture.worker, tokens, 1)
        fixture.await_written(2)
    server.close()
    text = [*prompt(4), 7, *tokens]
    with serve_blend(server := serve(*options)) as fixture:
        assert fixture.look_up(text) == CBLookupReply((), (), 0)
    server.close()
    with serve_blend(serve(*options, "--set", "blend.start=[[7]]")) as fixture:
        found = fixture.look_up(text)
        assert where(found) == [(5, 5 + 2 * CHUNK)]
        assert np.array_equal(fixture.read(found)[:, :, 5 : 5 + 2 * CHUNK], values)


def test_all_paragraphs_are_asked_for_before_any_is_waited_for(
    serve: Serve, prompt: Prompt
) -> None:
    """All loads are submitted to a hanging tier; the session's end cancels them."""
    options = ("--set", "blend.matcher=separated", "--set", "blend.start=[[7]]")
    deadline = ("--set", "prefetch.deadline_s=60")
    with closing(Hanging()) as hanging:
        tier = ("--tier", f"valkey://127.0.0.1:{hanging.port}?timeout=5")
        with serve_blend(serve(*BLEND, *tier, *options, *deadline)) as fixture:
            text = [token for _ in range(5) for token in (7, *prompt(2 * CHUNK))]
            blend = BlendClient(fixture.client)
            waiting = blend.submit_lookup_pre_computed(KEY, MODEL, 1, text)
            wait_until(lambda: fixture.client.status().num_prefetches == 5)
            assert not waiting.done()
            fixture.client.end_session(KEY)
            assert waiting.result(20) == CBLookupReply((), (), 0)
            assert fixture.count("prefetches_cancelled") == 5
