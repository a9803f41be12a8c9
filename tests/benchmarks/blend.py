"""Documents at any position: lookups, scattered retrieves, memory of the index.

Run as `python tests/benchmarks/blend.py`: starts a server with 100k stored chunks and
alternates between a normal 32k lookup and document lookups of 32k tokens, then
retrieves scattered chunks beside plain copies of as many bytes, and rotates keys. Then
it measures the index's memory per chunk. Prints medians and ratios.
"""

from __future__ import annotations

import gc
import math
import os
import statistics
import time
import tracemalloc
from collections.abc import Callable, Generator

import numpy as np
from wire import served

from kvcore.blend.blend_client import BlendClient
from kvcore.blend.document_index import DocumentChunk, DocumentIndex
from kvcore.blend.matchers import DocumentSpace, RollingHashMatcher
from kvcore.blend.rolling_hash import RollingHash
from kvcore.client import KVClient
from kvcore.keys import HashChain, SessionKey
from kvcore.layout import DTYPE_BYTES
from kvcore.protocol import CBRegisterKVCache, EndSession, PosixShm
from kvcore.rope import Rope
from kvcore.shm import Segment

CHUNK = 256
STORED = 100_000
PER_DOCUMENT = 100
PROMPT = 32_768
ROUNDS = 200


class Buffer:
    """A registered buffer and its memory."""

    def __init__(
        self,
        client: KVClient,
        name: str,
        shape: tuple[int, ...],
        dtype: str,
        **rope: Rope,
    ) -> None:
        size = math.prod(shape) * DTYPE_BYTES[dtype]
        self.segment = Segment.create(f"kvbench-{os.getpid()}-{name}", size, touch=True)
        self.shape = shape
        handle = PosixShm(self.segment.name, 0, size)
        request = CBRegisterKVCache(
            name, "bench", name, 1, 0, handle, shape, dtype, **rope
        )
        client.register_kv_cache(request)

    def close(self) -> None:
        """Remove the memory."""
        self.segment.unlink()
        self.segment.close()


def interleaved(calls: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Alternate between calls; return the median of each one's seconds."""
    took: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            took[name].append(call())
    return {name: statistics.median(seconds) for name, seconds in took.items()}


def timed(call: Callable[[], object], after: Callable[[], object]) -> float:
    """Return a call's seconds, and clean up after it."""
    begun = time.perf_counter()
    call()
    seconds = time.perf_counter() - begun
    after()
    return seconds


def lookups(client: KVClient) -> None:
    """Measure lookups of 32k tokens with 100k chunks stored."""
    blend, rng = BlendClient(client), np.random.default_rng(0)
    size = PER_DOCUMENT * CHUNK
    buffer = Buffer(client, "lookups", (2, 1, PROMPT, 1), "uint8")
    documents = [
        rng.integers(0, 128_000, size, dtype=np.uint32)
        for _ in range(STORED // PER_DOCUMENT)
    ]
    for tokens in documents:
        blend.store_pre_computed("lookups", 0, tokens)
    counters = client.status().counters
    prefix = rng.integers(0, 128_000, PROMPT, dtype=np.uint32)
    writer = SessionKey("bench", "writer")
    blend.store_final(writer, "lookups", 0, 0, PROMPT, prefix)
    client.call(EndSession(writer))
    pieces = []
    for number in rng.permutation(len(documents))[:36].tolist():
        first = int(rng.integers(0, PER_DOCUMENT - 3)) * CHUNK
        pieces += [documents[number][first : first + 3 * CHUNK]]
        pieces += [rng.integers(0, 128_000, 130, dtype=np.uint32)]
    scattered = np.concatenate(pieces)
    scattered = np.concatenate((scattered, prefix))[:PROMPT]
    key = SessionKey("bench", "lookups")

    def normal() -> float:
        return timed(
            lambda: client.lookup(key, "lookups", 1, prefix),
            lambda: client.end_session(key),
        )

    def anywhere(tokens: np.ndarray) -> Callable[[], float]:
        return lambda: timed(
            lambda: blend.lookup_pre_computed(key, "lookups", 1, tokens),
            lambda: client.end_session(key),
        )

    found = blend.lookup_pre_computed(key, "lookups", 1, scattered)
    hit = f"{len(found.matches)} chunks in {len(found.ranges)} ranges"
    client.end_session(key)
    took = interleaved(
        {
            "normal lookup, 128 chunks hit": normal,
            "documents, none of them there": anywhere(prefix),
            f"documents, {hit}": anywhere(scattered),
            f"documents, one of {PER_DOCUMENT} chunks": anywhere(
                np.concatenate((documents[0], prefix))[:PROMPT]
            ),
        },
        ROUNDS,
    )
    print(f"32k-token lookups, {counters['document_chunks']:,} document chunks stored")
    base = next(iter(took.values()))
    for name, seconds in took.items():
        print(f"  {name:45} {seconds * 1e3:7.3f} ms {seconds / base:5.2f} x")
    buffer.close()


def retrieves(client: KVClient, dtype: str) -> None:
    """Measure retrieves of scattered chunks of 1 MiB, and a plain copy."""
    blend, rng = BlendClient(client), np.random.default_rng(1)
    shape, num_chunks = (2, 2, 256 * CHUNK, 512), 96
    rope = Rope(theta=5e5, head_dim=128, rotary_dim=128)
    name = f"retrieves-{dtype}"
    buffer = Buffer(client, name, shape, dtype, rope=rope)
    memory = buffer.segment.array
    memory[:] = np.frombuffer(rng.bytes(memory.size), np.uint8) & 0x3F
    prompt = []
    for _ in range(num_chunks):
        tokens = rng.integers(0, 128_000, CHUNK, dtype=np.uint32)
        blend.store_pre_computed(name, 0, tokens)
        prompt += [tokens, rng.integers(0, 9, 300, dtype=np.uint32)]
    order = rng.permutation(num_chunks).tolist()
    text = np.concatenate([prompt[2 * n + part] for n in order for part in (0, 1)])
    key = SessionKey("bench", name)
    found = blend.lookup_pre_computed(key, name, 1, text)
    num_bytes = len(found.matches) * memory.size // 256
    source = Segment.create(f"kvbench-{os.getpid()}-source", num_bytes, touch=True)

    def retrieve(*, rotate_keys: bool) -> Callable[[], object]:
        return lambda: blend.retrieve_pre_computed(
            key, name, 0, matches=found.matches, rotate_keys=rotate_keys
        )

    def once(call: Callable[[], object]) -> Callable[[], float]:
        return lambda: timed(call, lambda: None)

    took = interleaved(
        {
            "plain copy": once(lambda: np.copyto(memory[:num_bytes], source.array)),
            "retrieve": once(retrieve(rotate_keys=False)),
        },
        30,
    )
    took |= interleaved({"retrieve, keys turned": once(retrieve(rotate_keys=True))}, 9)
    size = f"{num_bytes >> 20} MiB of {dtype}"
    print(f"{len(found.ranges)} scattered ranges, {size}, call to reply")
    base = next(iter(took.values()))
    for name, seconds in took.items():
        rate = num_bytes / seconds / 1e9
        print(f"  {name:45} {rate:7.2f} GB/s {base / seconds:5.0%}")
    client.end_session(key)
    source.unlink()
    source.close()
    buffer.close()


def end_of(steps: Generator[None, None, list[DocumentChunk]]) -> list[DocumentChunk]:
    """Run steps to their end."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value


def index_memory() -> None:
    """Measure the index's bytes per chunk, without L1's chunk hashes."""
    print("index memory, filter apart")
    for num_chunks in (1_000, 10_000, 100_000):
        space = DocumentSpace("m", 1, CHUNK)
        rng = np.random.default_rng(2)
        index = DocumentIndex(num_chunks)
        matcher = RollingHashMatcher(index, RollingHash(CHUNK))
        gc.collect()
        tracemalloc.start()
        for _ in range(num_chunks // PER_DOCUMENT):
            tokens = rng.integers(0, 128_000, PER_DOCUMENT * CHUNK, dtype=np.uint32)
            chain = HashChain(space.seed, CHUNK)
            list(chain.extend(tokens.tobytes(), 1 << 20))
            for entry in end_of(matcher.learn(tokens, chain.hashes, space)):
                index.add(entry)
        used = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        print(f"  {num_chunks:>9,} chunks {used / num_chunks:8.0f} bytes each")


def main() -> None:
    """Measure everything."""
    options = ("--engine", "blend", "--l1-size", "1GiB", "--set", "l1.page=4KiB")
    with served(*options) as address, KVClient(address, timeout_s=60) as client:
        for dtype in ("bfloat16", "float16"):
            retrieves(client, dtype)
        lookups(client)
    index_memory()


if __name__ == "__main__":
    main()
