"""Files of version 0.1 are still read, and what is written is the same text: `golden/records` was written by it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainpilot.agents.controller import DecisionRecord
from trainpilot.envs.reward import Reference
from trainpilot.experiments.calibrate.calibration import load_calibrations
from trainpilot.experiments.calibrate.runs import RunFile
from trainpilot.experiments.costs.table import CostTable
from trainpilot.experiments.results import Comparison, RunResult
from trainpilot.llm_runtime.json_records import JsonRecord
from trainpilot.llm_runtime.simulator.fitting import FittedPhysics
from trainpilot.llm_runtime.simulator.physics import ADDED
from trainpilot.llm_runtime.telemetry import Telemetry

RECORDS = Path(__file__).parents[1] / "golden" / "records"
KINDS: dict[str, type[JsonRecord]] = {
    "telemetry": Telemetry,
    "decision": DecisionRecord,
    "reference": Reference,
    "run_file": RunFile,
    "comparison": Comparison,
    "cost_table": CostTable,
}


@pytest.mark.parametrize("name", KINDS)
def test_a_record_is_read_and_written_as_before(name: str) -> None:
    content = json.loads((RECORDS / f"{name}.json").read_text())
    record = KINDS[name].from_json(content)

    assert json.dumps(record.to_json(), allow_nan=False) == json.dumps(content)


def test_result_from_before_guardrails_gets_the_new_fields_at_the_end() -> None:
    content = json.loads((RECORDS / "result.json").read_text())
    again = RunResult.from_json(content).to_json()

    assert again.pop("guardrails") is None
    assert again["intervals"].pop("rolled_back") == [False, False]
    assert json.dumps(again, allow_nan=False) == json.dumps(content)


def test_the_shipped_calibrations_are_written_with_the_same_values() -> None:
    for calibration in load_calibrations():
        assert isinstance(calibration.physics, FittedPhysics)
        again = json.loads(json.dumps(calibration.to_json(), allow_nan=False))
        assert type(calibration).from_json(again) == calibration
        for name in ADDED:  # parameters that the stored physics do not have
            assert again["physics"]["values"].pop(name) == ADDED[name]
            assert again["physics"]["uncertainty"].pop(name) == 0.0
        assert again["physics"].pop("n_parameters") is None
        shipped = RECORDS.parents[2] / "llm_runtime" / "simulator" / "shipped"
        assert again in [json.loads(file.read_text()) for file in shipped.glob("*.json")]


def test_a_fault_is_one_line_with_record_field_rule_and_value() -> None:
    content = json.loads((RECORDS / "cost_table.json").read_text())
    with pytest.raises(ValueError, match=r"^cost table: rows.0.kind: Input should be 'step' or 'forward', got 'stop'$"):
        CostTable.from_json(content | {"rows": [content["rows"][0] | {"kind": "stop"}]})
    with pytest.raises(ValueError, match=r"^cost table fields missing or unknown: colour, rows.0.batch_size$"):
        CostTable.from_json(content | {"rows": [{"kind": "step", "precision": "fp32", "cost": None}], "colour": "red"})
    with pytest.raises(ValueError, match=r"^telemetry: requested: batch_size must be a whole number .*, got 0$"):
        Telemetry.from_json(json.loads((RECORDS / "telemetry.json").read_text()) | {"requested": {"batch_size": 0}})
