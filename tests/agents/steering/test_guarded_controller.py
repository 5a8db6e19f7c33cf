"""A guarded controller bounds any policy, takes back what went wrong, and gives up for the base schedule."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from fakes import TOY_CASE, ToyPlant, make_limits

from trainpilot.agents.bundle import PolicyBundle, policy_path
from trainpilot.agents.controller import Controller, Policy, keep
from trainpilot.agents.steering.contract import QualityContract
from trainpilot.agents.steering.guarded_controller import GuardedController, GuardedDecision
from trainpilot.agents.steering.guardrails import Guardrails, GuardrailSettings
from trainpilot.envs.action import KEEP, Action
from trainpilot.envs.decision import Preference
from trainpilot.llm_runtime.config import ControlLimits, Controls
from trainpilot.llm_runtime.simulator.runs import Pool, SimulatedRun, Start, default_pool
from trainpilot.llm_runtime.telemetry import Plant, Telemetry


def always(*action: int) -> Policy:
    return lambda observation, masks: action


RAISE = always(6, *KEEP[1:])


class BatchPlant(ToyPlant):
    """A toy that offers several batches."""

    def limits(self) -> ControlLimits:
        return replace(super().limits(), min_batch_size=4, max_batch_size=32)


class FragilePlant(ToyPlant):
    """A toy that breaks for good under a learning-rate scale above `most`."""

    def __init__(self, most: float, loss: float = math.nan) -> None:
        super().__init__()
        self.most = most
        self.broken_loss = loss
        self.broken = False

    def advance(self, controls: Controls, share: float) -> Telemetry:
        self.broken = self.broken or controls.learning_rate_scale > self.most
        telemetry = super().advance(controls, share)
        if not self.broken:
            return telemetry
        return replace(telemetry, train_loss=self.broken_loss, diverged=math.isnan(self.broken_loss))


@dataclass
class Owner:
    """Does what a guarded controller asks for, in order."""

    plant: Plant
    guarded: GuardedController
    share: float = 1 / TOY_CASE.decisions
    telemetry: Telemetry | None = None
    decisions: list[GuardedDecision] = field(default_factory=list)
    used: list[Controls] = field(default_factory=list)
    snapshot: dict[str, Any] | None = None
    follower: GuardedController | None = None
    news: list[int] = field(default_factory=list)
    """How long each piece of news was."""

    def tell(self) -> None:
        if self.follower is not None:
            news = json.dumps(self.guarded.broadcast_state())
            self.news.append(len(news))
            self.follower.load_broadcast(json.loads(news))
            assert where(self.follower) == where(self.guarded)

    def step(self) -> bool:
        decision = self.guarded.decide(self.telemetry)
        self.tell()
        self.decisions.append(decision)
        if decision.roll_back:
            assert self.snapshot is not None
            self.plant.restore(self.snapshot)
            controls = self.guarded.rolled_back()
            self.tell()
        else:
            controls = decision.controls
            if self.telemetry is not None and self.telemetry.diverged:
                return False
        if decision.snapshot:
            self.snapshot = self.plant.snapshot()
            self.guarded.snapshotted()
        self.used.append(controls)
        self.telemetry = self.plant.advance(controls, self.share)
        self.guarded.record(self.telemetry)
        if self.follower is not None:
            self.follower.record(self.telemetry)
        return not self.telemetry.finished or self.telemetry.diverged

    def train(self, most: int = 200) -> Owner:
        for _ in range(most):
            if not self.step():
                return self
        raise AssertionError("the run does not end")


def owner(
    policy: Policy, plant: Plant | None = None, contract: QualityContract | None = None, **settings: Any
) -> Owner:
    plant = plant or ToyPlant()
    controller = Controller(policy, plant.limits(), Preference())
    bounds = GuardrailSettings(**{"cautious": False, "throughput_floor": 0, **settings})
    return Owner(plant, GuardedController(controller, Guardrails(bounds), contract))


def where(guarded: GuardedController) -> dict[str, Any]:
    """Return where a controller stands, but for when a snapshot was taken."""
    state = guarded.state_dict()
    del state["guardrails"]["past"]["since_snapshot"]
    return state


def scales(run: Owner) -> list[float]:
    return [controls.learning_rate_scale for controls in run.used]


def test_keep_within_guardrails_is_the_base_schedule() -> None:
    run = owner(keep).train()
    assert all(controls == TOY_CASE.start() for controls in run.used)
    assert run.guarded.summary() == {
        "rollbacks": [],
        "refusals": {},
        "fallen_back": None,
        "fallen_back_at_decision": None,
        "contract": None,
    }


def test_quiet_runs_are_copied_every_ten_decisions() -> None:
    run = owner(keep).train()
    assert [i for i, decision in enumerate(run.decisions) if decision.snapshot] == [0, 10]


def test_a_break_is_taken_back_with_half_the_learning_rate() -> None:
    run = owner(RAISE, FragilePlant(most=4), hold=3).train()
    assert scales(run)[:4] == [2, 4, 8, 2]  # 4 was in force when 8 was chosen, and that was taken back
    assert run.guarded.summary()["rollbacks"][0] == {"after_decision": 2, "reason": "training loss is not finite"}
    assert run.decisions[3].roll_back
    assert run.decisions[3].reasons == ("training loss is not finite",)
    assert scales(run)[3:7] == [2, 2, 2, 2]  # held


def test_the_controller_forgets_what_was_taken_back() -> None:
    run = owner(RAISE, FragilePlant(most=4))
    for _ in range(4):
        run.step()
    assert run.guarded.controls.learning_rate_scale == 2
    assert [t.decision for t in run.guarded.controller.state.telemetry] == [0, 1]
    assert [record.telemetry.decision for record in run.guarded.records] == [0, 1, 2, 2]
    assert run.guarded.records[-1].refusals == ("taken back: training loss is not finite",)


def test_the_fourth_break_leaves_the_run_to_its_base_schedule() -> None:
    run = owner(RAISE, FragilePlant(most=4), hold=1).train()
    summary = run.guarded.summary()
    assert len(summary["rollbacks"]) == 4  # three to try again, one to fall back from a sound model
    assert summary["fallen_back"] == "training loss is not finite"
    assert run.decisions[-1].fallen_back
    assert run.used[-1] == TOY_CASE.start()
    assert run.telemetry is not None
    assert run.telemetry.finished
    assert math.isfinite(run.telemetry.train_loss)


def test_a_spike_is_taken_back_too() -> None:
    run = owner(RAISE, FragilePlant(most=4, loss=20.0)).train()
    assert "spike" in run.guarded.summary()["rollbacks"][0]["reason"]


def test_without_a_snapshot_the_run_falls_back_and_is_not_taken_back() -> None:
    run = owner(RAISE, FragilePlant(most=1))
    run.guarded.decide(None)
    run.guarded.record(telemetry := run.plant.advance(Controls(learning_rate_scale=2.0, batch_size=8), 0.05))
    decision = run.guarded.decide(telemetry)
    assert (decision.roll_back, decision.fallen_back) == (False, True)
    assert decision.controls == TOY_CASE.start()
    with pytest.raises(ValueError, match="snapshot"):
        run.guarded.rolled_back()


@pytest.mark.parametrize(
    "policy",
    [
        lambda o, m: (float("nan"), 1, 0, 0, 0),
        lambda o, m: (99, 1, 0, 0, 0),
        lambda o, m: (3, 1),
        lambda o, m: (2.5, 1, 0, 0, 0),
        lambda o, m: None,
        lambda o, m: 1 / 0,
    ],
    ids=["nan", "no such choice", "too short", "no whole number", "nothing", "raises"],
)
def test_a_policy_that_fails_keeps_and_after_five_times_falls_back(policy: Policy) -> None:
    run = owner(policy).train()
    assert all(controls == TOY_CASE.start() for controls in run.used)
    assert [decision.fallen_back for decision in run.decisions[:6]] == [False] * 4 + [True] * 2
    assert run.decisions[0].reasons[0].startswith("policy failed: ")
    assert run.guarded.summary()["fallen_back_at_decision"] == 4


def test_a_policy_that_fails_now_and_then_is_asked_again() -> None:
    calls = iter(range(1_000))

    def moody(observation: np.ndarray, masks: np.ndarray) -> Action:
        if next(calls) % 4:
            raise RuntimeError("not now")
        return KEEP

    assert owner(moody).train().guarded.fallen_back is None


def test_a_batch_that_flips_each_decision_is_held() -> None:
    flip = iter([2, 0] * 100)
    run = owner(lambda o, m: (3, next(flip), 0, 0, 0), BatchPlant()).train()
    sizes = [controls.batch_size for controls in run.used]
    changes = sum(a != b for a, b in pairwise(sizes))
    assert changes <= 8
    assert any("changes of direction" in reason for reason in run.guarded.summary()["refusals"])


def test_a_held_batch_may_grow_where_that_is_asked_for_again_and_again() -> None:
    # Three changes of direction; then the policy wants a larger batch, and the third request in a row is heard.
    wanted = iter([0, 2, 0, 2, *[2] * 100])
    run = owner(lambda o, m: (3, next(wanted), 0, 0, 0), BatchPlant()).train()
    sizes = [controls.batch_size for controls in run.used]
    assert sizes[:8] == [4, 8, 4, 4, 4, 8, 16, 32]
    refused = {name: n for name, n in run.guarded.summary()["refusals"].items() if name.startswith("batch_size")}
    assert sum(n for name, n in refused.items() if "held" in name or "changes of direction" in name) == 2


def test_bounds_on_the_learning_rate_at_its_base_leave_the_base_schedule() -> None:
    bundle = PolicyBundle.load(policy_path("default"))
    bounds = Guardrails(GuardrailSettings(learning_rate_range=(1e-3, 1e-3)), base_learning_rate=1e-3)
    controller = Controller.of_bundle(bundle, ToyPlant().limits(), Preference())
    run = Owner(ToyPlant(), GuardedController(controller, bounds)).train()
    assert set(scales(run)) == {1.0}


def test_a_policy_that_begins_lower_begins_within_the_bounds() -> None:
    bundle = PolicyBundle.load(policy_path("default"))
    bundle = replace(bundle, provenance={**bundle.provenance, "start_scale": 0.25})

    def begun(lowest: float) -> GuardedController:
        bounds = Guardrails(GuardrailSettings(learning_rate_range=(lowest, 1.0)), base_learning_rate=1e-3)
        return GuardedController(Controller.of_bundle(bundle, ToyPlant().limits(), Preference()), bounds)

    for lowest, scale in ((1e-5, 0.25), (5e-4, 0.5), (5e-3, 1.0)):
        assert begun(lowest).controls.learning_rate_scale == pytest.approx(scale)
    assert begun(1e-5).base_controls().learning_rate_scale == 1


def reference(plant: ToyPlant) -> list[tuple[float, float]]:
    base = owner(keep, plant).train()
    return [(record.telemetry.budget_used, record.telemetry.train_loss) for record in base.guarded.records]


def test_broken_contract_rolls_back_and_falls_back_to_the_base_schedule() -> None:
    known = reference(ToyPlant())
    lower = iter([0, 0, 0, *[3] * 100])
    run = owner(lambda o, m: (next(lower), *KEEP[1:]), contract=QualityContract(reference=known)).train()
    summary = run.guarded.summary()
    assert summary["contract"]["held"] is False
    assert summary["fallen_back"].startswith("quality contract broken: training loss")
    assert run.telemetry is not None
    assert run.telemetry.train_loss == pytest.approx(known[-1][1])  # taken back to the start: nothing is lost


def test_weights_better_than_their_copy_stay_where_the_budget_does() -> None:
    lower = iter([0, 0, 0, *[3] * 100])
    run = owner(lambda o, m: (next(lower), *KEEP[1:]), contract=QualityContract(reference=reference(ToyPlant())))
    run.guarded._rewinds = lambda: False  # the owner has no data to take back
    run.train()
    summary = run.guarded.summary()
    assert summary["contract"]["held"] is False
    assert summary["rollbacks"] == []  # the loss was lower than where the copy was made
    assert run.used[-1] == TOY_CASE.start()


@pytest.mark.parametrize(("from_start", "copied"), [(False, [0, 10]), (True, [0])])
def test_a_contract_may_keep_the_beginning_to_go_back_to(from_start: bool, copied: list[int]) -> None:
    contract = QualityContract(reference=reference(ToyPlant()), from_start=from_start)
    run = owner(keep, contract=contract).train()
    assert [i for i, decision in enumerate(run.decisions) if decision.snapshot] == copied


def test_a_contract_that_is_kept_says_so() -> None:
    rises = iter([6, 6, *[3] * 100])  # to a scale of 4, the best
    run = owner(lambda o, m: (next(rises), *KEEP[1:]), contract=QualityContract(reference=reference(ToyPlant())))
    summary = run.train().guarded.summary()
    assert summary["contract"]["held"] is True
    assert summary["contract"]["loss_increase"] < -0.1
    assert summary["rollbacks"] == []


def test_while_a_contract_gathers_evidence_everything_is_kept() -> None:
    run = owner(RAISE, contract=QualityContract(evidence_share=0.2)).train()
    assert scales(run)[:5] == [1] * 5  # the first interval cannot tell whether the warm-up is over
    assert max(scales(run)) > 1
    assert any("gathers evidence" in reason for reason in run.guarded.summary()["refusals"])


def test_a_contract_refuses_to_end_early_with_a_loss_too_high() -> None:
    run = owner(always(3, 1, 0, 0, 1), contract=QualityContract(reference=reference(ToyPlant()))).train()
    assert run.telemetry is not None
    assert run.telemetry.budget_used > 0.9


def zigzag(observation: np.ndarray, masks: np.ndarray) -> Action:
    return (int(3 + 3 * np.sin(100 * observation.sum())), *KEEP[1:])


def test_state_in_json_goes_on_as_if_nothing_had_happened() -> None:
    plant = FragilePlant(most=3.0)
    whole = owner(zigzag, FragilePlant(most=3.0), hold=1, max_rise=64.0)
    parts = owner(zigzag, plant, hold=1, max_rise=64.0)
    for _ in range(9):
        whole.step()
        parts.step()
    state = json.loads(json.dumps(parts.guarded.state_dict(), allow_nan=False))
    again = owner(zigzag, plant, hold=1, max_rise=64.0)
    again.guarded.load_state_dict(state)
    again.telemetry = parts.telemetry
    # the snapshot stays with whoever took it; here it is known to both
    again.snapshot, again.guarded._rollback_point = parts.snapshot, parts.guarded._rollback_point
    again.guarded.guardrails.past.since_snapshot = parts.guarded.guardrails.past.since_snapshot
    whole.train()
    again.train()
    assert scales(again) == scales(whole)[9:]
    assert again.guarded.summary() == whole.guarded.summary()
    assert [r.to_json() for r in again.guarded.records] == [r.to_json() for r in whole.guarded.records]


@pytest.mark.parametrize("contract", [None, QualityContract(evidence_share=0.2)])
def test_a_follower_of_all_broadcasts_has_the_state_of_the_first(contract: QualityContract | None) -> None:
    run = owner(RAISE, FragilePlant(most=2.0), contract, hold=1, max_rise=64.0)
    run.follower = owner(keep, ToyPlant(), contract, hold=1, max_rise=64.0).guarded
    run.train()
    assert len(run.guarded.summary()["rollbacks"]) > 1
    heard, decided = run.follower.controller, run.guarded.controller
    assert np.array_equal(heard.state.observation(), decided.state.observation())
    assert np.array_equal(heard.state.action_masks(), decided.state.action_masks())
    assert run.follower.summary() == run.guarded.summary()


def test_broadcast_states_do_not_grow_with_the_run() -> None:
    run = owner(keep)
    run.follower = owner(keep).guarded
    run.train()
    assert len(run.news) > 15
    assert run.news[-1] < 1.5 * run.news[len(run.news) // 2]


def test_after_loading_the_next_decision_asks_for_a_snapshot() -> None:
    run = owner(keep)
    for _ in range(3):
        run.step()
    again = owner(keep)
    again.guarded.load_state_dict(run.guarded.state_dict())
    assert again.guarded.decide(run.telemetry).snapshot


def test_held_controls_are_resumed_by_a_plain_controller_too() -> None:
    run = owner(RAISE, FragilePlant(most=4))
    for _ in range(4):
        run.step()
    standing = [run.guarded.records[place] for place in (0, 1, 3)]
    plain = Controller(keep, run.plant.limits(), Preference())
    for record in standing:
        plain.repeat(record)
        plain.state.observe(record.telemetry)
    assert plain.state.controls == run.guarded.controls


def test_holding_a_precision_counts_as_a_switch() -> None:
    controller = Controller(keep, make_limits(), Preference())
    controller.state.hold(Controls(batch_size=8, precision="bf16"))
    controller.state.hold(Controls(batch_size=8, precision="bf16"))
    assert controller.state.precision_switches == 1
    assert controller.state.controls.precision == "bf16"


@pytest.fixture(scope="module")
def pool() -> Pool:
    return default_pool(16)


def simulated(pool: Pool, row: int) -> SimulatedRun:
    return SimulatedRun(seed=5, row=row, pool=pool, start=Start(rates=(1.0, 1.0001)))


def final(run: Owner) -> float:
    assert isinstance(run.plant, SimulatedRun)
    return float(run.plant.runs.expected_loss[0])


def simulate(pool: Pool, row: int, policy: Policy, contract: QualityContract | None = None, **bounds: Any) -> Owner:
    run = owner(policy, simulated(pool, row), contract, **bounds)
    run.share = 0.02
    return run.train()


@pytest.mark.parametrize("row", range(2))
@pytest.mark.parametrize("policy", [RAISE, always(4, *KEEP[1:])], ids=["x2", "x1.19"])
def test_policy_that_always_raises_ends_within_2_percent_under_a_contract(pool: Pool, row: int, policy: Policy) -> None:
    base = simulate(pool, row, keep)
    losses = [(record.telemetry.budget_used, record.telemetry.train_loss) for record in base.guarded.records]
    bare = SimulatedLoop(simulated(pool, row)).train(policy)
    contract = QualityContract(reference=losses, max_slowdown=10.0)
    bounded = simulate(pool, row, policy, contract)
    assert bare > 1.02 * final(base)
    assert final(bounded) < 1.02 * final(base)
    assert len(bounded.used) <= 2 * 50  # a second run is the most that taking it back can cost


def test_the_shipped_policy_is_hardly_held_back(pool: Pool) -> None:
    policy = PolicyBundle.load(policy_path("default")).act
    ratios = [
        final(simulate(pool, row, policy, cautious=True)) / SimulatedLoop(simulated(pool, row)).train(policy)
        for row in range(3)
    ]
    assert float(np.median(ratios)) < 1.005
    assert max(ratios) < 1.03


@dataclass
class SimulatedLoop:
    """The same without guardrails."""

    plant: SimulatedRun

    def train(self, policy: Policy) -> float:
        controller, telemetry = Controller(policy, self.plant.limits(), Preference()), None
        while not self.plant.finished:
            telemetry = self.plant.advance(controller.decide(telemetry), 0.02)
        return float(self.plant.runs.expected_loss[0])


def test_what_owners_call_is_typed() -> None:
    decide: Callable[[Telemetry | None], GuardedDecision] = owner(keep).guarded.decide
    assert decide(None).controls == TOY_CASE.start()
