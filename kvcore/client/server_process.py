"""The server process of a connection, and detection of its exit."""

from __future__ import annotations

import os
from dataclasses import dataclass

from kvcore.process import pid_namespace, start_time
from kvcore.protocol import HelloReply


@dataclass(slots=True)
class ServerProcess:
    """A server's handshake reply, and a pidfd that becomes readable when it exits.

    `pidfd` is None if the process is not visible: it runs in another pid namespace or
    on another host, or has exited.
    """

    hello: HelloReply
    pidfd: int | None

    @property
    def heartbeat_interval_ns(self) -> int:
        """Nanoseconds between heartbeats to a server that cannot watch this process."""
        return int(self.hello.heartbeat_s * 1e9 / 2)

    @classmethod
    def watch(cls, hello: HelloReply) -> ServerProcess:
        """Open a pidfd of the process that replied; compare its start time."""
        if hello.pid_namespace != pid_namespace():
            return cls(hello, None)
        try:
            pidfd = os.pidfd_open(hello.pid)
        except (OSError, OverflowError):  # Exited, or not a valid pid.
            return cls(hello, None)
        if start_time(hello.pid) == hello.pid_start:
            return cls(hello, pidfd)
        os.close(pidfd)
        return cls(hello, None)

    def close(self) -> None:
        """Close the pidfd."""
        if self.pidfd is not None:
            os.close(self.pidfd)
            self.pidfd = None
