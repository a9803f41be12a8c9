"""The run of a server that a connection talks to."""

from __future__ import annotations

import os
from dataclasses import dataclass

from kvcore.process import pid_namespace, start_time
from kvcore.protocol import HelloReply


@dataclass(slots=True)
class ServerProcess:
    """What the server said of itself, and a pidfd that tells when it dies.

    `pidfd` is None where the server's process cannot be seen: in another pid
    namespace, or gone already.
    """

    hello: HelloReply
    pidfd: int | None

    @property
    def beat_ns(self) -> int:
        """How often to show life, where the server cannot watch this process."""
        return int(self.hello.heartbeat_s * 1e9 / 2)

    @classmethod
    def meet(cls, hello: HelloReply) -> ServerProcess:
        """Watch exactly the process that answered."""
        if hello.pid_namespace != pid_namespace():
            return cls(hello, None)
        try:
            pidfd = os.pidfd_open(hello.pid)
        except (OSError, OverflowError):  # Gone, or no pid at all.
            return cls(hello, None)
        if start_time(hello.pid) == hello.pid_start:
            return cls(hello, pidfd)
        os.close(pidfd)
        return cls(hello, None)

    def close(self) -> None:
        """Stop watching."""
        if self.pidfd is not None:
            os.close(self.pidfd)
            self.pidfd = None
