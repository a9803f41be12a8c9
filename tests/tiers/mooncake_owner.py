"""Give a Mooncake master memory, and damage values: `mooncake_owner.py PORT BYTES`.

Reads orders from its input (`ready`, `half KEY`, ...), answers `done`.
"""

from __future__ import annotations

import os
import sys

from mooncake.store import MooncakeDistributedStore
from store_servers import Damage, damaged


def main() -> None:
    """Follow orders until the input ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # The client logs to its standard output.
    store = MooncakeDistributedStore()
    master = f"127.0.0.1:{sys.argv[1]}"
    memory = int(sys.argv[2])
    place = ("127.0.0.1", "P2PHANDSHAKE", memory, 16 << 20, "tcp", "", master)
    if store.setup(*place):
        raise SystemExit("no master")
    for line in sys.stdin:
        order, _, key = line.strip().partition(" ")
        if key:
            record = store.get(key)
            store.remove(key, True)
            if store.put(key, damaged(record, Damage(order))):
                raise SystemExit(f"cannot put {key}")
        replies.write("done\n")
        replies.flush()


if __name__ == "__main__":
    main()
