"""Registration of KV caches: what is accepted, replaced, refused and removed."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from kvcore.client import KVClient
from kvcore.errors import (
    BadRequest,
    HandleError,
    InstanceExists,
    LayoutConflict,
    LayoutError,
    UnknownInstance,
    UnknownModel,
)
from kvcore.keys import SessionKey
from kvcore.layout import CacheGroup, TensorView
from kvcore.protocol import PosixShm, RegisterKVCache
from kvcore.shm import Segment
from tests.system.conftest import Prompt, both_drivers
from tests.system.server_fixture import CHUNK, Server, connect, wait_until
from tests.system.worker_process import BLOCK, Group, Worker

driver = both_drivers

WIDER = (Group(shape=(2, 2, 0, BLOCK, 48)),)
OTHERWISE_PAGED = (Group("NKLSD", (0, 2, 2, BLOCK, 32)),)


def names(client: KVClient) -> set[str]:
    """Return the instances that the server knows."""
    return {instance.instance_id for instance in client.status().instances}


def test_instances_come_and_go(
    workers: list[Worker], client: KVClient, model: str, session: SessionKey
) -> None:
    """Registered instances are listed with their layout, others are not."""
    first, second = workers
    reply = first.call("register", "x", model, rank=0, world_size=2)
    second.call("register", "y", model, rank=1, world_size=2)
    assert reply.chunk_bytes == 2 * 2 * CHUNK * 32
    listed = {i.instance_id: i for i in client.status().instances}
    assert (listed["x"].model, listed["x"].rank, listed["y"].rank) == (model, 0, 1)
    assert listed["x"].pid == first.process.pid
    assert listed["x"].chunk_bytes == reply.chunk_bytes
    for worker, name in ((first, "x"), (second, "y")):
        worker.call("unregister_kv_cache", name)
    assert not names(client) & {"x", "y"}
    with pytest.raises(UnknownModel, match=f"no instance of model '{model}'"):
        client.lookup(session, model, 2, list(range(CHUNK)))


def test_an_unknown_instance_is_named(workers: list[Worker]) -> None:
    """Both UNREGISTER and STORE name it."""
    with pytest.raises(UnknownInstance, match="'unknown'"):
        workers[0].call("unregister_kv_cache", "unknown")
    with pytest.raises(UnknownInstance, match="'unknown'"):
        workers[0].call("store", SessionKey("e", "r"), "unknown", 0, 0, [[]])


def test_another_clients_instance_is_not_ones_own(
    workers: list[Worker], model: str
) -> None:
    """Its id is refused while its process lives; others cannot use or end it."""
    first, second = workers
    first.call("register", "mine", model)
    with pytest.raises(InstanceExists, match=rf"process {first.process.pid}"):
        second.call("register", "mine", model)
    with pytest.raises(UnknownInstance):
        second.call("unregister_kv_cache", "mine")


def test_registering_again_replaces(
    workers: list[Worker],
    client: KVClient,
    model: str,
    session: SessionKey,
    prompt: Prompt,
) -> None:
    """The new cache is used; a sole instance may change its layout."""
    worker, tokens = workers[0], prompt(CHUNK)
    worker.call("register", "again", model)
    worker.call("register", "again", model, WIDER)
    assert [i.chunk_bytes for i in client.status().instances if i.model == model] == [
        2 * 2 * CHUNK * 48
    ]
    worker.call("fill", "again", [0, 1, 2, 3])
    expected = worker.call("read", "again", [0, 1, 2, 3])
    worker.call("store", session, "again", 0, CHUNK, [[0, 1, 2, 3]], tokens)
    worker.call("poison", "again", [4, 5, 6, 7])
    worker.call("retrieve", session, "again", 0, CHUNK, [[4, 5, 6, 7]])
    assert np.array_equal(worker.call("read", "again", [4, 5, 6, 7]), expected)


def test_a_later_layout_never_reaches_old_bytes(
    workers: list[Worker],
    client: KVClient,
    model: str,
    session: SessionKey,
    prompt: Prompt,
) -> None:
    """The same tokens stored under another layout are a miss."""
    worker, tokens = workers[0], prompt(CHUNK)
    worker.call("register", "old", model)
    worker.call("store", session, "old", 0, CHUNK, [[0, 1, 2, 3]], tokens)
    assert client.lookup(session, model, 1, tokens).num_chunks == 1
    worker.call("register", "old", model, WIDER)
    assert client.lookup(session, model, 1, tokens).num_chunks == 0


def test_a_layout_that_disagrees_is_refused_with_both_named(
    workers: list[Worker], client: KVClient, model: str
) -> None:
    """While an instance of the rank lives, its chunks keep one layout."""
    first, second = workers
    first.call("register", "one", model)
    with pytest.raises(LayoutConflict) as refused:
        second.call("register", "two", model, WIDER)
    fingerprints = [
        i.group_fingerprints[0] for i in client.status().instances if i.model == model
    ]
    assert len(fingerprints) == 1
    assert fingerprints[0] in refused.value.message
    assert refused.value.message.count("#") == 2
    first.call("unregister_kv_cache", "one")
    second.call("register", "two", model, WIDER)


def test_paging_may_differ_where_chunks_agree(
    workers: list[Worker],
    client: KVClient,
    model: str,
    session: SessionKey,
    prompt: Prompt,
) -> None:
    """Another order of axes and number of blocks still reads the same tokens."""
    first, second = workers
    tokens, blocks = prompt(CHUNK), [3, 1, 2, 0]
    first.call("register", "layers-first", model)
    second.call("register", "blocks-first", model, OTHERWISE_PAGED, num_blocks=7)
    first.call("fill", "layers-first", blocks)
    first.call("store", session, "layers-first", 0, CHUNK, [blocks], tokens)
    client.lookup(session, model, 1, tokens)
    second.call("retrieve", session, "blocks-first", 0, CHUNK, [blocks])
    one = first.call("read", "layers-first", blocks)  # [N, L, K, S, D]
    two = second.call("read", "blocks-first", blocks)  # [N, K, L, S, D]
    assert np.array_equal(one, two.swapaxes(1, 2))


GROUP = CacheGroup("NSD", "uint8", BLOCK, (TensorView(0, 0, (4, 16, 8), (128, 8, 1)),))


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"handles": (PosixShm("NAME", 0, 8192),)}, HandleError, "4,096 bytes.*8,192"),
        ({"handles": (PosixShm("NAME", 4096, 512),)}, HandleError, "4,096 bytes"),
        ({"handles": (PosixShm("NAME", -1, 512),)}, HandleError, "offset -1"),
        ({"handles": (PosixShm("no-such", 0, 512),)}, HandleError, "no segment"),
        ({"handles": (PosixShm("../shm/x", 0, 512),)}, HandleError, "no segment name"),
        ({"handles": (PosixShm("", 0, 512),)}, HandleError, "no segment name"),
        ({"handles": (PosixShm("NAME", 0, 256),)}, LayoutError, r"groups\[0\].*byte"),
        ({"handles": (PosixShm("NAME", 1 << 62, 512),)}, HandleError, "claims"),
        ({"handles": ()}, LayoutError, "no handle 0"),
        ({"groups": ()}, LayoutError, "at least one cache group"),
        ({"rank": 1}, BadRequest, "rank 1 of a world size of 1"),
        ({"rank": 1 << 60}, BadRequest, "rank"),
        ({"world_size": 1 << 60}, BadRequest, "world_size"),
    ],
)
def test_memory_that_cannot_be_is_refused(
    client: KVClient,
    model: str,
    changes: dict[str, object],
    error: type[Exception],
    says: str,
) -> None:
    """The error names a wrong size, a missing segment, a bad name, a bad rank."""
    name = f"kvtest-{model}"
    with Segment.create(name, 4096, touch=False):
        request = RegisterKVCache(
            "bad", "e", model, 1, 0, (PosixShm(name, 0, 512),), (GROUP,)
        )
        request = msgspec.structs.replace(request, **changes)
        named = tuple(
            msgspec.structs.replace(h, name=name) if h.name == "NAME" else h
            for h in request.handles
        )
        with pytest.raises(error, match=says):
            client.register_kv_cache(msgspec.structs.replace(request, handles=named))
    assert "bad" not in names(client)


def test_a_client_that_closes_leaves_nothing(
    server: Server, client: KVClient, model: str
) -> None:
    """Its instances end when it closes, before its process ends."""
    name = f"kvtest-{model}"
    before = client.status().num_clients
    with Segment.create(name, 512, touch=False):
        handles = (PosixShm(name, 0, 512),)
        with connect(server.address) as other:
            other.register_kv_cache(
                RegisterKVCache("short", "e", model, 1, 0, handles, (GROUP,))
            )
            assert "short" in names(client)
        wait_until(lambda: client.status().num_clients == before)
        assert "short" not in names(client)


def test_a_client_that_has_left_loses_no_reply(
    server: Server, client: KVClient
) -> None:
    """Replies to a closed client do not count as lost."""
    before = client.status().counters
    clients = [connect(server.address) for _ in range(8)]
    server.pause()
    for one in clients:
        one.close()
    server.resume()
    gone = before["clients_gone"] + 8
    wait_until(lambda: client.status().counters["clients_gone"] >= gone)
    assert client.status().counters["replies_lost"] == before["replies_lost"]
