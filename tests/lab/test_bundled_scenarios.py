"""The bundled scenarios, their documentation, and the schema for editors."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from kvcore.errors import SetupError
from kvctl.console import Table
from kvctl.lab.config.scenario import Scenario, read
from kvctl.lab.vllm import vllm_scenario as served
from kvctl.views import scenario_tables as scenario_view

ROOT = Path(__file__).resolve().parents[2]
FILES = [
    path
    for path in sorted((ROOT / "scenarios").glob("*.toml"))
    if not served.is_served(path)
]
NEEDS_TRACE = ('workload.trace="x.jsonl"',)


def load(path: Path) -> Scenario:
    """Read a bundled scenario; a replay gets the path of a trace."""
    replays = 'kind = "trace"' in path.read_text()
    return read(path, NEEDS_TRACE if replays else ())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_answers_a_question(path: Path) -> None:
    """The file's header and its `question` state it."""
    header = path.read_text().splitlines()[0]
    assert header.startswith("# ")
    assert header.endswith("?")
    assert load(path).question.endswith("?")


def test_the_main_scenarios_are_bundled() -> None:
    """Checks the names of their files."""
    names = {path.stem for path in FILES}
    assert names >= {
        "quickstart", "chat", "rag", "agents", "pressure", "cold_tier", "many_models",
        "mla", "tp8", "long_context", "sweep", "noisy_neighbour",
        "registration_storm", "soak", "faults",
    }  # fmt: skip


def test_docs_list_every_scenario() -> None:
    """docs/scenarios.md has one row per scenario and no other row."""
    text = (ROOT / "docs" / "scenarios.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert sorted(rows) == sorted(one.stem for one in ROOT.glob("scenarios/*.toml"))


def shown(path: Path) -> str:
    """Return the text of `kvctl inspect scenario`."""
    texts = []
    for part in scenario_view.build_tables(path.stem, load(path), 0):
        rows = part.rows if isinstance(part, Table) else ((part,),)
        texts += [cell for row in rows for cell in row]
    return " ".join(texts)


def test_a_scenario_is_explained() -> None:
    """Output has the question, engines, workload, L1, load and faults."""
    text = shown(ROOT / "scenarios" / "faults.toml")
    for part in ("What do servers and workers", "tiny-llama", "1,300", "poisson"):
        assert part in text
    assert "kill rank 0 of engine 1 at 11 s, for 0.5 s" in text
    assert "0.841" in shown(ROOT / "scenarios" / "quickstart.toml")
    busy = shown(ROOT / "scenarios" / "h100_busy.toml")
    assert (
        "6 settings, calls of about 256.0 MiB, up to 1 workers, with a concurrent"
        in busy
    )


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("load.rte=5", "did you mean load.rate"),
        ("faults=[{at_s=1, target='worker', engine=7}]", r"faults\[0\].engine = 7"),
        ("faults=[{at_s=1, target='service', service='x'}]", "no service of that name"),
        ("tenants=[{name='t', workload={kind='chat', turn=1}}]", "did you mean"),
        ("workload.format='csv'", "workload"),
    ],
)
def test_a_typo_is_located(setting: str, says: str) -> None:
    """The error has the key and the nearest known one."""
    with pytest.raises(SetupError, match=says):
        read(ROOT / "scenarios" / "faults.toml", [setting])


def test_the_published_scenario_schema_is_up_to_date() -> None:
    """`make docs` was run after the last change of an option."""
    saved = json.loads((ROOT / "docs" / "scenario.schema.json").read_text())
    assert saved == json.loads(json.dumps(scenario_view.schema()))


def properties(schema: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the properties of one definition."""
    found: dict[str, Any] = schema["$defs"][name]["properties"]
    return found


def test_the_schema_has_every_key() -> None:
    """Keys of the scenario, of each kind, and of the server with its tables."""
    schema = scenario_view.schema()
    assert properties(schema, "Scenario").keys() == set(Scenario.__struct_fields__)
    assert "max_steps" in properties(schema, "Sweep")
    assert "max_prompt_tokens" in properties(schema, "EngineConfig")
    for kind in ("Scenario", "VLLMScenario"):
        server = properties(schema, kind)["server"]["properties"]
        assert "anyOf" in server["l1"]["properties"]["size"]
