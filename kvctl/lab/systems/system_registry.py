"""The systems that a scenario can be run against, by name."""

from __future__ import annotations

from pathlib import Path
from time import monotonic

from kvcore.client import KVClient
from kvcore.config import ServerConfig
from kvcore.errors import SetupError, Unavailable
from kvcore.worker.copying_client import CopyingClient
from kvctl.lab.config.scenario import OURS, SystemSpec
from kvctl.lab.process_messages import EnginePlan
from kvctl.lab.systems.child_processes import ExternalServer, LocalServer
from kvctl.lab.systems.lmcache import LMCacheClient
from kvctl.lab.systems.system_interface import Client, ExternalClient
from kvctl.lab.systems.valkey import ValkeyClient

RECONNECT_S = 30.0
"""Timeout for a server that is restarted by a fault."""


DRIVERS: dict[str, type[ExternalClient]] = {
    "lmcache": LMCacheClient,
    "valkey": ValkeyClient,
}
NAMES = (OURS, *DRIVERS)


def start_server(
    spec: SystemSpec, config: ServerConfig, folder: Path
) -> LocalServer | ExternalServer:
    """Start a system's server with the L1 size and chunk size of the config.

    The caller removes the folder, after it has stopped the server.

    Raises:
        SetupError: an unknown or missing system, or it did not start.
    """
    if spec.name not in NAMES:
        raise SetupError(f"--system {spec.name}: known are {', '.join(NAMES)}")
    if spec.is_ours:
        return LocalServer(config)
    return ExternalServer(DRIVERS[spec.name].start(spec, config, folder), folder)


def connect(plan: EnginePlan, label: str) -> Client:
    """Connect a scheduler or a rank to the system of its plan.

    In a scenario with faults an engine may start while the server is down: it retries.

    Raises:
        Unavailable: no server answers.
    """
    scenario = plan.scenario
    timeout_s = scenario.timeout_s
    if not plan.system.is_ours:
        return connect_driver(plan.system, plan.address, scenario.server, timeout_s)
    kind = CopyingClient if scenario.driver == "worker" else KVClient
    deadline = monotonic() + RECONNECT_S if scenario.faults else 0.0
    while True:
        client = kind(
            plan.address,
            label=label,
            timeout_s=timeout_s,
            engine_key=plan.engine_id.encode(),
        )
        try:
            client.ping()
        except Unavailable:
            client.close()
            if monotonic() > deadline:
                raise
        else:
            return client


def connect_driver(
    spec: SystemSpec, address: str, config: ServerConfig, timeout_s: float
) -> Client:
    """Connect the driver of a run to any system by its address."""
    if spec.is_ours:
        return KVClient(address, label="bench driver", timeout_s=timeout_s)
    return DRIVERS[spec.name](spec, address, config, timeout_s)
