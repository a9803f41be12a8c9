"""Sessions: tokens sent once, requests out of order, reused ids, salts."""

from __future__ import annotations

import signal
import subprocess
import sys

import msgspec
import numpy as np
import pytest

from kvcore.client import KVClient
from kvcore.errors import BadRequest, ChunksMissing, TokensNeeded
from kvcore.keys import ExtraKey, SessionKey, pack_tokens
from kvcore.protocol import Lookup
from tests.system.conftest import Prompt, both_drivers
from tests.system.server_fixture import CHUNK, ENGINE_KEY, Server, wait_until
from tests.system.worker_process import Worker

driver = both_drivers

ONE = [0, 1, 2, 3]
TWO = [4, 5, 6, 7]


@pytest.fixture
def worker(workers: list[Worker], model: str) -> Worker:
    """A worker with the instance "a" of the model, filled."""
    worker = workers[0]
    worker.call("register", "a", model)
    worker.call("fill", "a", list(range(64)))
    return worker


def num_hit(
    client: KVClient,
    model: str,
    tokens: list[int],
    extras: tuple[ExtraKey, ...] = (),
) -> int:
    """Return the number of chunks that a new session finds."""
    key = SessionKey("probe", "probe")
    found = client.lookup(key, model, 1, tokens, extras=extras).num_chunks
    client.end_session(key)
    return found


def test_a_worker_without_tokens_uses_the_schedulers(
    worker: Worker, client: KVClient, model: str, session: SessionKey, prompt: Prompt
) -> None:
    """Both share the session over separate sockets."""
    tokens = prompt(2 * CHUNK)
    client.lookup(session, model, 1, tokens)
    stored = worker.call("store", session, "a", 0, len(tokens), [ONE + TWO])
    assert stored.num_stored == 2


def test_tokens_that_were_not_sent_are_requested(
    worker: Worker, client: KVClient, model: str, session: SessionKey, prompt: Prompt
) -> None:
    """The error names the first missing token; a client that has them sends them."""
    tokens = prompt(2 * CHUNK)
    with pytest.raises(TokensNeeded) as needed:
        worker.call("store", session, "a", 0, len(tokens), [ONE + TWO])
    assert needed.value.details == {"have": 0}
    client.lookup(session, model, 1, tokens[: CHUNK + 1])
    with pytest.raises(TokensNeeded) as needed:
        worker.call("store", session, "a", 0, len(tokens), [ONE + TWO])
    assert needed.value.details == {"have": CHUNK + 1}
    worker.call("store", session, "a", 0, len(tokens), [ONE + TWO], tokens)
    assert num_hit(client, model, tokens) == 2


def test_a_session_is_extended_where_it_ended(
    worker: Worker, client: KVClient, model: str, session: SessionKey, prompt: Prompt
) -> None:
    """With known=n the first n tokens are not sent again, wherever n lies."""
    tokens = prompt(3 * CHUNK)
    client.lookup(session, model, 1, tokens[: CHUNK + 7])
    client.lookup(session, model, 1, tokens, known=CHUNK + 7)
    worker.call("store", session, "a", 0, len(tokens), [list(range(12))])
    assert num_hit(client, model, tokens) == 3


def test_a_gap_or_a_cut_in_the_tokens_is_an_error(
    client: KVClient, worker: Worker, model: str, session: SessionKey, prompt: Prompt
) -> None:
    """A client that claims more than the server knows sends the rest automatically."""
    tokens = prompt(3 * CHUNK)
    assert client.lookup(session, model, 1, tokens, known=CHUNK).num_chunks == 0
    packed = memoryview(pack_tokens(tokens))
    beyond = Lookup(session, model, 1, len(tokens), packed, 4 * CHUNK)
    with pytest.raises(TokensNeeded) as needed:
        client.call(beyond)
    assert needed.value.details == {"have": 3 * CHUNK}
    with pytest.raises(TokensNeeded) as needed:
        client.call(msgspec.structs.replace(beyond, token_offset=CHUNK + 3))
    assert needed.value.details == {"have": CHUNK}
    with pytest.raises(BadRequest, match="not whole uint32"):
        client.call(Lookup(session, model, 1, CHUNK, packed[:-1], 0))


def test_a_new_lookup_replaces_the_prompt(
    worker: Worker, client: KVClient, model: str, session: SessionKey, prompt: Prompt
) -> None:
    """A request id reused for other tokens does not reach the old prompt's chunks."""
    old, new = prompt(2 * CHUNK), prompt(2 * CHUNK)
    client.lookup(session, model, 1, old)
    worker.call("store", session, "a", 0, len(old), [ONE + TWO])
    assert client.lookup(session, model, 1, old).num_chunks == 2
    assert client.lookup(session, model, 1, new).num_chunks == 0
    with pytest.raises(ChunksMissing):
        worker.call("retrieve", session, "a", 0, len(new), [ONE + TWO])
    mixed = old[:CHUNK] + new[CHUNK:]
    assert client.lookup(session, model, 1, mixed).num_chunks == 1


def test_one_request_id_in_two_engines_is_two_sessions(
    worker: Worker, client: KVClient, model: str, prompt: Prompt
) -> None:
    """Neither sees the other's tokens, nor ends its lease."""
    first, second = (SessionKey(f"engine-{n}", "the-same") for n in (1, 2))
    one, two = prompt(CHUNK), prompt(CHUNK)
    worker.call("store", first, "a", 0, CHUNK, [ONE], one)
    worker.call("store", second, "a", 0, CHUNK, [TWO], two)
    for key, tokens in ((first, one), (second, two)):
        assert client.lookup(key, model, 1, tokens).num_chunks == 1
    client.end_session(first)
    assert [lease.engine_id for lease in client.status().leases] == ["engine-2"]
    worker.call("retrieve", second, "a", 0, CHUNK, [[8, 9, 10, 11]])
    expected = worker.call("read", "a", TWO)
    assert np.array_equal(worker.call("read", "a", [8, 9, 10, 11]), expected)
    client.end_session(second)


def test_a_session_is_about_one_model(
    worker: Worker, client: KVClient, model: str, session: SessionKey, prompt: Prompt
) -> None:
    """Using it for another is refused, with both named."""
    tokens = prompt(CHUNK)
    client.lookup(session, model, 1, tokens)
    worker.call("register", "other", f"{model}-other")
    with pytest.raises(BadRequest, match=f"'{model}'.*'{model}-other'"):
        client.lookup(session, f"{model}-other", 1, tokens)


def test_a_store_may_come_after_its_sessions_end(
    worker: Worker, client: KVClient, model: str, prompt: Prompt
) -> None:
    """It requests the tokens again, and all clients find its chunks."""
    session, tokens = SessionKey("engine", "overtaken"), prompt(CHUNK)
    client.lookup(session, model, 1, tokens)
    client.end_session(session)
    assert client.status().num_sessions == 0
    with pytest.raises(TokensNeeded):
        worker.call("store", session, "a", 0, CHUNK, [ONE])
    worker.call("store", session, "a", 0, CHUNK, [ONE], tokens)
    assert num_hit(client, model, tokens) == 1
    client.end_session(session)
    assert client.status().num_sessions == 0


SALT = ExtraKey(0, b"tenant-1")


def test_a_salt_keeps_chunks_apart(
    worker: Worker, client: KVClient, model: str, session: SessionKey, prompt: Prompt
) -> None:
    """The same tokens with another salt, or none, are a miss."""
    tokens = prompt(CHUNK)
    client.lookup(session, model, 1, tokens, extras=(SALT,))
    worker.call("store", session, "a", 0, CHUNK, [ONE])
    assert num_hit(client, model, tokens, (SALT,)) == 1
    assert num_hit(client, model, tokens) == 0
    assert num_hit(client, model, tokens, (ExtraKey(0, b"tenant-2"),)) == 0


def test_a_prompt_sent_anew_brings_its_own_salt(
    worker: Worker, client: KVClient, model: str, session: SessionKey, prompt: Prompt
) -> None:
    """A request id used again without a salt does not read under the last one's."""
    tokens = prompt(CHUNK)
    worker.call("store", session, "a", 0, CHUNK, [ONE], tokens, extras=(SALT,))
    assert client.lookup(session, model, 1, tokens, extras=(SALT,)).num_chunks == 1
    assert client.lookup(session, model, 1, tokens).num_chunks == 0


def test_an_image_changes_what_follows_it_only(
    worker: Worker, client: KVClient, model: str, session: SessionKey, prompt: Prompt
) -> None:
    """Chunks before it are shared between images; its own and later ones are not."""
    tokens, blocks = prompt(3 * CHUNK), list(range(12))
    cat, dog = (ExtraKey(CHUNK + 5, kind) for kind in (b"cat", b"dog"))
    worker.call("store", session, "a", 0, len(tokens), [blocks], tokens, extras=(cat,))
    assert num_hit(client, model, tokens, (cat,)) == 3
    assert num_hit(client, model, tokens, (dog,)) == 1
    assert num_hit(client, model, tokens) == 1
    moved = ExtraKey(CHUNK + 6, b"cat")
    assert num_hit(client, model, tokens, (moved,)) == 1


def test_an_image_may_come_with_later_tokens(
    worker: Worker, client: KVClient, model: str, session: SessionKey, prompt: Prompt
) -> None:
    """Extras of later tokens extend a session like the tokens do."""
    tokens, blocks = prompt(3 * CHUNK), list(range(12))
    cat = (ExtraKey(2 * CHUNK, b"cat"),)
    worker.call("store", session, "a", 0, len(tokens), [blocks], tokens, extras=cat)
    later = SessionKey("engine", "later")
    client.lookup(later, model, 1, tokens[: 2 * CHUNK])
    found = client.lookup(later, model, 1, tokens, known=2 * CHUNK, extras=cat)
    assert found.num_chunks == 3
    client.end_session(later)


LOOK_UP_AND_DIE = """
import os, sys
from kvcore.client import KVClient
from kvcore.keys import SessionKey
address, key, engine, request, model, *tokens = sys.argv[1:]
client = KVClient(address, engine_key=key.encode())
client.lookup(SessionKey(engine, request), model, 1, [*map(int, tokens)])
os.kill(os.getpid(), 9)
"""


def test_a_killed_engines_tokens_end_with_it(
    server: Server,
    worker: Worker,
    client: KVClient,
    model: str,
    session: SessionKey,
    prompt: Prompt,
) -> None:
    """A successor that reuses the request id stores under its own prompt's hashes."""
    old, new = prompt(2 * CHUNK), prompt(2 * CHUNK)
    gone = server.log.read_text().count("is gone")
    names = [session.engine_id, session.request_id, model]
    arguments = [server.address, ENGINE_KEY.decode(), *names, *map(str, old)]
    killed = subprocess.run([sys.executable, "-c", LOOK_UP_AND_DIE, *arguments])
    assert killed.returncode == -signal.SIGKILL
    wait_until(lambda: server.log.read_text().count("is gone") > gone)
    stored = worker.call("store", session, "a", 0, len(new), [ONE + TWO], new)
    assert stored.num_stored == 2
    assert num_hit(client, model, old) == 0
    assert num_hit(client, model, new) == 2


def test_another_engine_cannot_use_a_session_by_its_name(
    server: Server,
    worker: Worker,
    client: KVClient,
    model: str,
    session: SessionKey,
    prompt: Prompt,
) -> None:
    """It neither ends it, nor frees its lease, nor changes or knows its tokens."""
    tokens, other = prompt(2 * CHUNK), prompt(2 * CHUNK)
    worker.call("store", session, "a", 0, len(tokens), [ONE + TWO], tokens)
    assert client.lookup(session, model, 1, tokens).num_chunks == 2
    with KVClient(server.address, engine_key=b"another engine") as stranger:
        stranger.free_lookup_locks(session, 0, len(tokens))
        stranger.end_session(session)
        with pytest.raises(TokensNeeded):
            stranger.call(Lookup(session, model, 1, len(tokens)))
        assert stranger.lookup(session, model, 1, other).num_chunks == 0
        [lease] = [
            one
            for one in client.status().leases
            if one.request_id == session.request_id
        ]
        assert lease.num_chunks == 2
    assert client.call(Lookup(session, model, 1, len(tokens))).num_chunks == 2
