"""The systems that a load can be played against, by name."""

from __future__ import annotations

from pathlib import Path
from time import monotonic
from typing import Protocol

from kvcore.client import KVClient
from kvcore.config import ServerConfig
from kvcore.errors import SetupError, Unavailable
from kvcore.worker.copying_client import CopyingClient
from kvctl.lab.process_messages import EnginePlan
from kvctl.lab.systems import lmcache, valkey
from kvctl.lab.systems.external_server import ExternalServer
from kvctl.lab.systems.local_server import LocalServer
from kvctl.lab.systems.system_interface import (
    OURS,
    Client,
    ExternalClient,
    StartedSystem,
    SystemSpec,
)

PATIENCE_S = 30.0
"""For a server that is to come back."""


class Driver(Protocol):
    """A module that drives another system."""

    def start(
        self, spec: SystemSpec, config: ServerConfig, folder: Path
    ) -> StartedSystem:
        """Say how its server is started; what it keeps on disk goes into the folder."""

    def connect(
        self, spec: SystemSpec, address: str, config: ServerConfig, timeout_s: float
    ) -> ExternalClient:
        """Connect a client."""


OTHERS: dict[str, Driver] = {"lmcache": lmcache, "valkey": valkey}
NAMES = (OURS, *OTHERS)


def check(spec: SystemSpec) -> None:
    """Refuse a system that nobody knows.

    Raises:
        SetupError: with those that are known.
    """
    if spec.name not in NAMES:
        raise SetupError(f"--system {spec.name}: known are {', '.join(NAMES)}")


def start_server(
    spec: SystemSpec, config: ServerConfig, folder: Path
) -> LocalServer | ExternalServer:
    """Start a system's server with as much memory and chunks as large.

    The folder is removed by the caller, once the server has been stopped.

    Raises:
        SetupError: it is not there, or did not start.
    """
    check(spec)
    if spec.is_ours:
        return LocalServer(config)
    return ExternalServer(OTHERS[spec.name].start(spec, config, folder), folder)


def connect(plan: EnginePlan, label: str) -> Client:
    """Connect a scheduler or a rank to the system of its plan.

    Where there are faults an engine may start while the server is away: it waits.

    Raises:
        Unavailable: no server answers.
    """
    scenario = plan.scenario
    timeout_s = scenario.timeout_s
    if not plan.system.is_ours:
        return connect_other(plan.system, plan.address, scenario.server, timeout_s)
    kind = CopyingClient if scenario.driver == "worker" else KVClient
    give_up = monotonic() + PATIENCE_S if scenario.faults else 0.0
    while True:
        client = kind(plan.address, label=label, timeout_s=timeout_s)
        try:
            client.ping()
        except Unavailable:
            client.close()
            if monotonic() > give_up:
                raise
        else:
            return client


def connect_other(
    spec: SystemSpec, address: str, config: ServerConfig, timeout_s: float
) -> Client:
    """Connect to any system by its address."""
    if spec.is_ours:
        return KVClient(address, label="bench driver", timeout_s=timeout_s)
    return OTHERS[spec.name].connect(spec, address, config, timeout_s)
