"""A scenario as tables, and the JSON Schema of scenario files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec import NODEFAULT

from kvcore.config import ServerConfig
from kvcore.keys import HashChain, chain_seed, pack_tokens
from kvcore.option_structs import Options, describe, encode_hook
from kvctl.console import Table, size
from kvctl.lab.config.arrival_config import ClosedLoop, Load, Sweep
from kvctl.lab.config.copy_settings import Copies
from kvctl.lab.config.scenario import Fault, Limits, Scenario, publish
from kvctl.lab.config.workload_config import Workload
from kvctl.lab.vllm.vllm_scenario import VLLMScenario, prompt_lengths
from kvctl.lab.workload.access_generators import Survey, accesses, survey
from kvctl.lab.workload.arrivals import schedule

MAX_HASHED_TOKENS = 200_000_000
HASH_SLICE = 1 << 20
_WITH_SIZES: dict[str, type[Options]] = {"server": ServerConfig, "copies": Copies}


def schema() -> dict[str, Any]:
    """Return the JSON Schema of scenario files, published in docs."""
    kinds = (Scenario, VLLMScenario)
    schemas, defs = msgspec.json.schema_components(
        [_without_sizes(one) for one in kinds]
    )
    for kind in kinds:
        properties = defs[kind.__name__]["properties"]
        for name in properties.keys() & _WITH_SIZES:
            properties[name] = _options_schema(_WITH_SIZES[name])
    return publish({"anyOf": list(schemas), "$defs": defs})


def _without_sizes(kind: type[Options]) -> type[msgspec.Struct]:
    """Return an equal struct whose options with sizes are any table."""
    fields: list[Any] = []
    for one in msgspec.structs.fields(kind):
        if one.name in _WITH_SIZES:
            fields.append((one.name, dict, msgspec.field(default_factory=dict)))
        elif one.default is NODEFAULT:
            fields.append((one.name, one.type))
        else:
            fields.append((one.name, one.type, one.default))
    return msgspec.defstruct(kind.__name__, fields, forbid_unknown_fields=True)


def _options_schema(kind: type[Options]) -> dict[str, Any]:
    """Return the schema of options with sizes, which msgspec cannot derive."""
    root: dict[str, Any] = _table()
    for option in describe(kind):
        *tables, name = option.key.split(".")
        table = root
        for inner in tables:
            table = table["properties"].setdefault(inner, _table())
        table["properties"][name] = {
            "description": f"{option.description} (default {option.default})",
            **_TYPES.get(option.type.removesuffix(" or none"), {}),
        }
    return root


def _table() -> dict[str, Any]:
    return {"type": "object", "properties": {}, "additionalProperties": False}


_TYPES: dict[str, dict[str, Any]] = {
    "integer": {"type": "integer"},
    "number": {"type": "number"},
    "text": {"type": "string"},
    "true or false": {"type": "boolean"},
    "list": {"type": "array"},
    "size": {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string"}]},
}
"""Schemas by the names of `kvcore.option_structs.type_name`."""


def build_vllm_tables(
    name: str, scenario: VLLMScenario, seed: int
) -> Iterator[Table | str]:
    """Yield tables and lines of a scenario with real engines."""
    engine, lengths = scenario.vllm, prompt_lengths(scenario, seed)
    yield _headline(name, scenario.question)
    yield Table(
        "workload, for each engine",
        ("kind", ">requests", ">tokens", ">longest", ">answers"),
        (
            (
                _kind(scenario.workload),
                f"{len(lengths):,}",
                f"{sum(lengths):,}",
                f"{max(lengths, default=0):,}",
                f"{scenario.output_tokens:,} tokens",
            ),
        ),
    )
    yield f"vLLM in {engine.python or 'this Python'}: {engine.model}"
    yield f"vLLM options: {' '.join(engine.options) or 'none'}"
    yield f"L1 {size(int(scenario.server.l1.size))}"
    yield f"{scenario.concurrency} concurrent requests"


def build_tables(name: str, scenario: Scenario, seed: int) -> Iterator[Table | str]:
    """Yield tables and lines of a scenario with simulated engines."""
    yield _headline(name, scenario.question)
    tenants = [_Part(key, one, seed) for key, one in scenario.parts().items()]
    yield Table(
        "engines",
        (
            "",
            "model",
            ">engines",
            ">ranks",
            ">per token",
            ">per chunk",
            ">cache per rank",
        ),
        tuple(one.engines_row() for one in tenants),
    )
    yield Table(
        "workload",
        ("", "kind", ">requests", ">tokens", ">longest", ">ideal hits", ">needs"),
        tuple(one.workload_row() for one in tenants),
    )
    yield f"L1 {size(int(scenario.server.l1.size))}, {_compare(scenario, tenants)}"
    if scenario.hosts > 1:
        yield f"hosts: {scenario.hosts}, one server each; engines assigned round-robin"
    for one in tenants:
        yield f"load of {one.name}: {_load(one)}"
    if scenario.engine is not None:
        given = msgspec.to_builtins(scenario.engine)
        yield "engine time model: " + ", ".join(f"{k} {v}" for k, v in given.items())
    if scenario.copies is not None:
        yield f"copies: {_copies(scenario.copies)}"
    for fault in scenario.faults:
        yield f"fault: {_fault(fault)}"
    yield f"limits: {_limits(scenario.limits)}"


def _headline(name: str, question: str) -> str:
    return f"{name}: {question or 'no question is stated'}"


def _kind(workload: Workload) -> str:
    return str(msgspec.to_builtins(workload, enc_hook=encode_hook)["kind"])


class _Part:
    """One tenant and the totals of its workload."""

    def __init__(self, name: str, scenario: Scenario, seed: int) -> None:
        self.name = name
        self.scenario = scenario
        self.seed = seed
        self.survey: Survey = survey(scenario.workload, seed)
        self.num_chunks = self.num_unique = 0
        if self.survey.num_tokens <= MAX_HASHED_TOKENS:
            self._hash()

    def _hash(self) -> None:
        size_ = self.scenario.server.chunk_size
        start = chain_seed("prefix", self.name, self.scenario.ranks, size_)
        heads: set[bytes] = set()
        for access in accesses(self.scenario.workload, self.seed):
            chain = HashChain(start, size_)
            for _ in chain.extend(pack_tokens(access.tokens()), HASH_SLICE):
                pass
            self.num_chunks += len(chain.hashes)
            heads.update(one[:8] for one in chain.hashes)
        self.num_unique = len(heads)

    @property
    def chunk_bytes(self) -> int:
        """Bytes over all ranks; replicated parts count once."""
        scenario, geometry = self.scenario, self.scenario.model.geometry()
        copies = 1 if geometry.latent else scenario.ranks
        token = geometry.token_bytes(scenario.ranks)
        return token * copies * scenario.server.chunk_size

    def engines_row(self) -> tuple[str, ...]:
        scenario, geometry = self.scenario, self.scenario.model.geometry()
        token = geometry.token_bytes(scenario.ranks)
        return (
            self.name,
            geometry.model,
            str(scenario.engines),
            str(scenario.ranks),
            size(token),
            size(self.chunk_bytes),
            size(scenario.cache_bytes // scenario.ranks),
        )

    def workload_row(self) -> tuple[str, ...]:
        found = self.survey
        hashed = self.num_chunks > 0
        ideal = 1 - self.num_unique / self.num_chunks if hashed else 0.0
        return (
            self.name,
            _kind(self.scenario.workload),
            f"{found.num_requests:,}",
            f"{found.num_tokens:,}",
            f"{found.longest:,}",
            f"{ideal:.3f}" if hashed else "-",
            size(self.num_unique * self.chunk_bytes) if hashed else "-",
        )


def _compare(scenario: Scenario, tenants: list[_Part]) -> str:
    needed = sum(one.num_unique * one.chunk_bytes for one in tenants)
    if not needed:
        return "the size of the workload was not computed"
    share = int(scenario.server.l1.size) / needed
    return f"{share:.2f} of the size of all unique chunks, {size(needed)}"


def _load(part: _Part) -> str:
    load: Load = part.scenario.load
    if isinstance(load, ClosedLoop):
        text = f"closed, {load.concurrency} concurrent requests per engine"
    else:
        last = 0.0
        for due in schedule(
            load, accesses(part.scenario.workload, part.seed), part.seed
        ):
            last = due.at_s or 0.0
        given = msgspec.to_builtins(load)
        text = f"{given['kind']}, last request due after {last:,.1f} s"
    if isinstance(load, Sweep):
        rates = [load.rate * load.factor**step for step in range(load.max_steps)]
        text += f"; steps of {load.step_s:g} s from {rates[0]:g} to {rates[-1]:,.0f}/s"
    if load.max_s is not None:
        text += f"; no request starts after {load.max_s:g} s"
    if load.warmup_requests or load.warmup_s:
        text += f"; warm-up {load.warmup_requests} requests, {load.warmup_s:g} s"
    return text


def _copies(copies: Copies) -> str:
    call = size(copies.chunk * copies.chunks)
    product = ", with a concurrent matrix product" if copies.busy else ""
    return (
        f"{len(list(copies.settings()))} settings, calls of about {call}, up to "
        f"{max(copies.workers)} workers{product}"
    )


def _fault(fault: Fault) -> str:
    target = fault.service or fault.target
    if fault.target == "worker":
        target = f"rank {fault.rank} of engine {fault.engine}"
    return f"{fault.action} {target} at {fault.at_s:g} s, for {fault.for_s:g} s"


def _limits(limits: Limits) -> str:
    given = msgspec.to_builtins(limits)
    return ", ".join(
        f"{key} {value}" for key, value in given.items() if value is not None
    )
