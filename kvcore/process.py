"""Processes: pid, start time, pid namespace, and detection of a server's exit."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from kvcore.errors import SetupError
from kvcore.protocol import HelloReply


def start_time(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot; None if it is gone.

    Field 22 of /proc/PID/stat (proc(5)); the name in field 2 may hold spaces.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    return int(stat[stat.rindex(")") + 2 :].split()[19])


def pid_namespace() -> int:
    """Return the inode that names this process's pid namespace."""
    try:
        return Path("/proc/self/ns/pid").stat().st_ino
    except OSError as error:
        raise SetupError(f"/proc/self/ns/pid: {error.strerror}") from None


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
