"""A controller decides from telemetry alone, without SB3, and takes up an interrupted run where it was."""

import subprocess
import sys

import numpy as np
from fakes import TOY_CASE, ToyPlant

from trainpilot.agents.bundle import PolicyBundle
from trainpilot.agents.controller import Controller, DecisionRecord, keep
from trainpilot.envs.action import KEEP, Action
from trainpilot.envs.decision import Preference


def steer(controller: Controller, plant: ToyPlant, decisions: int) -> list[DecisionRecord]:
    records: list[DecisionRecord] = []
    telemetry = None
    for _ in range(decisions):
        telemetry = plant.advance(controller.decide(telemetry), 1 / TOY_CASE.decisions)
        records.append(controller.record(telemetry))
    return records


def zigzag(observation: np.ndarray, masks: np.ndarray) -> Action:
    """Depend on the observation, so that a wrong state shows."""
    return (int(3 + 3 * np.sin(100 * observation.sum())), *KEEP[1:])


def test_keep_is_the_base_schedule() -> None:
    plant = ToyPlant()
    controller = Controller(keep, plant.limits(), Preference())
    records = steer(controller, plant, TOY_CASE.decisions)
    assert all(record.telemetry.requested == TOY_CASE.start() for record in records)


def test_decisions_repeated_from_records_lead_on_as_fresh_ones_do() -> None:
    whole = steer(Controller(zigzag, ToyPlant().limits(), Preference()), ToyPlant(), 12)
    plant = ToyPlant()
    first = steer(Controller(zigzag, plant.limits(), Preference()), plant, 7)
    restored = [DecisionRecord.from_json(record.to_json()) for record in first]
    again = Controller(zigzag, plant.limits(), Preference())
    for record in restored:
        telemetry = record.telemetry
        again.repeat(record)
        if record is not restored[-1]:
            again.state.observe(telemetry)
    rest = []
    for _ in range(5):
        telemetry = plant.advance(again.decide(telemetry), 1 / TOY_CASE.decisions)
        rest.append(again.record(telemetry))
    assert [r.to_json() for r in first + rest] == [r.to_json() for r in whole]
    assert len({r.allowed for r in whole}) > 3


def test_masked_wishes_become_keep_with_a_reason() -> None:
    plant = ToyPlant()
    controller = Controller(lambda o, m: (3, 2, 3, 1, 1), plant.limits(), Preference())
    record = steer(controller, plant, 1)[0]
    assert record.allowed == KEEP
    assert len(record.refusals) == 4
    assert record.masked["precision bf16"] == "a toy multiplies nothing"


def test_deciding_needs_no_sb3() -> None:
    code = (
        "import sys, trainpilot.agents.controller as c; "
        "assert not {'stable_baselines3', 'sb3_contrib', 'torch'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert PolicyBundle({}, {}).decisions == 50
