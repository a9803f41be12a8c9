"""A process that exports GPU memory and executes commands from its standard input.

Prints one JSON line when it is ready, and one after each command: `fill N` writes N to
all of its memory, `read` returns the distinct byte values in it, `record` records its
event after that work; any other line ends the process. argv: GPU number, bytes.
"""

from __future__ import annotations

import json
import sys

import numpy as np

from kvcore.cuda.driver import open_devices
from kvcore.cuda.ipc import export


def main(number: int, num_bytes: int) -> None:
    """Export memory and serve commands."""
    device = open_devices()[number]
    address = device.allocate(num_bytes)
    staging = device.allocate_host(num_bytes)
    stream, event = device.stream(), device.event(shared=True)
    done = device.event()
    host = np.ctypeslib.as_array(
        (np.ctypeslib.ctypes.c_uint8 * num_bytes).from_address(staging)
    )
    handle = export(address, num_bytes, device)
    reply(
        device=handle.device, handle=handle.handle.hex(), offset=handle.offset,
        length=handle.length, event=event.handle().hex(),
    )  # fmt: skip
    for line in sys.stdin:
        match line.split():
            case ["fill", value]:
                host[:] = int(value)
                stream.copy(address, staging, num_bytes)
                stream.record(done)
                done.wait()
                reply()
            case ["read"]:
                stream.copy(staging, address, num_bytes)
                stream.record(done)
                done.wait()
                reply(values=sorted(set(host.tolist())))
            case ["record"]:
                stream.record(event)
                reply()
            case _:
                return


def reply(**facts: object) -> None:
    """Print a reply line."""
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


main(int(sys.argv[1]), int(sys.argv[2]))
