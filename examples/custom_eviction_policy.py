"""A server with an eviction policy of its own: random replacement."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable

import kvcore


class RandomReplacement:
    """Evicts a random chunk; see `kvcore.EvictionPolicy` for the contract."""

    def __init__(self) -> None:
        self._keys: list[bytes] = []
        self._places: dict[bytes, int] = {}
        self._random = random.Random(0)

    def admit(self, key: bytes) -> None:
        """Enter a chunk."""
        if key not in self._places:
            self._places[key] = len(self._keys)
            self._keys.append(key)

    touch = admit

    def discard(self, key: bytes) -> None:
        """Remove a chunk: the last one takes its place."""
        place = self._places.pop(key, None)
        if place is not None:
            last = self._keys.pop()
            if last != key:
                self._keys[place] = last
                self._places[last] = place

    def evict(self, evictable: Callable[[bytes], bool]) -> bytes | None:
        """Remove random chunks until one is evictable."""
        while self._keys:
            key = self._random.choice(self._keys)
            self.discard(key)
            if evictable(key):
                return key
        return None

    def coming(self, count: int) -> list[bytes]:
        """Return nothing: the next choice is not known."""
        del count
        return []


kvcore.register_policy("random", RandomReplacement)  # type: ignore[arg-type]


def main() -> None:
    """Serve with the policy, or start such a server and fill it."""
    if sys.argv[1:2] == ["serve"]:
        from kvctl.cli import main as kvctl

        kvctl()
        return
    from local_server import start_server
    from store_and_retrieve import run_engine

    command = (sys.executable, __file__, "serve")
    with start_server("--set", "l1.eviction=random", command=command) as server:
        run_engine(server, "engine-a")
        with kvcore.KVClient(server) as client:
            print("chunks in L1:", client.status().l1.num_chunks)


if __name__ == "__main__":
    main()
