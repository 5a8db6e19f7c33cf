"""Each tracker gets the settings, every decision over the tokens, and the summary; a missing package is one line."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from decision_records import decision_record, decision_records
from policies import random_weights

from trainpilot.agents import (
    AimTracker,
    CometTracker,
    FolderTracker,
    MlflowTracker,
    PolicyBundle,
    SteeringSettings,
    TrackioTracker,
    WandbTracker,
)
from trainpilot.agents.bundle import policy_digest, policy_path
from trainpilot.agents.logging.trackers import Tracker, run_settings
from trainpilot.experiments.stored_run import read_run

SETTINGS = SteeringSettings(sequences=1_600, batch_size=8)
REFUSED = "learning_rate x1.19 refused: more than x16, above which the loss fell behind (100 %)" + " of it" * 40
SUMMARY = {
    "tokens": 4000, "policy": "default", "contract": {"held": True}, "loss": float("nan"), "time_s": 8.0,
    "refusals": {REFUSED: 2},
}  # fmt: skip
TRACKERS = {
    "wandb": WandbTracker,
    "trackio": TrackioTracker,
    "mlflow": MlflowTracker,
    "aim": AimTracker,
    "comet_ml": CometTracker,
}


class Library:
    """A package and everything in it: notes each call, and answers with itself."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.items: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        if name == "get_experiment_by_name":
            return lambda _: None
        if name == "create_run":
            return lambda *_, **__: SimpleNamespace(info=SimpleNamespace(run_id="7"))
        if name == "entities":
            return SimpleNamespace(Metric=lambda *each: each)
        if name == "log_batch":
            return self._log_batch
        if name in ("summary", "MlflowClient"):
            return self if name == "summary" else lambda **_: self
        return lambda *args, **options: self.calls.append((name, args, options)) or self  # type: ignore[func-returns-value]

    def _log_batch(self, run: str, metrics: list[tuple[str, float, int, int]]) -> None:
        for name, *_ in metrics:
            if re.fullmatch(r"[/\w.\- ]{1,250}", name) is None:  # what MLflow takes on every system
                raise RuntimeError(f"Invalid value {name!r} for parameter 'name' supplied")
        self.calls.append(("log_batch", (run, metrics), {}))

    def __setitem__(self, name: str, value: Any) -> None:
        self.items[name] = value

    def named(self, name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        return [(args, options) for called, args, options in self.calls if called == name]


@pytest.fixture(params=TRACKERS)
def logged(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Library]:
    library = Library()
    module = ModuleType(request.param)
    module.__dict__["__getattr__"] = library.__getattr__
    monkeypatch.setitem(sys.modules, request.param, module)
    kind: Any = TRACKERS[request.param]
    tracker: Tracker = kind(SETTINGS)
    for record in [decision_record(0), decision_record(1), decision_record(0, refusals=("taken back: a spike",))]:
        tracker(record)
    tracker.finish(SUMMARY)
    return request.param, library


def told(name: str, library: Library) -> tuple[dict[str, Any], list[tuple[float, float]], set[str]]:
    """Return the settings, tokens and training loss of each decision, and the calls that close the run."""
    loss = "loss/train"
    closing = {"finish", "end", "close", "set_terminated"} & {call for call, _, _ in library.calls}
    if name in ("wandb", "trackio"):
        rows = [args[0] for args, _ in library.named("log") if loss in args[0]]
        return library.named("init")[0][1]["config"], [(row["tokens"], row[loss]) for row in rows], closing
    if name == "mlflow":
        params = {args[1]: args[2] for args, _ in library.named("log_param")}
        steps = [(at, value) for a, _ in library.named("log_batch") for key, value, _, at in a[1] if key == loss]
        return params, steps, closing
    if name == "aim":
        steps = [(o["step"], a[0]) for a, o in library.named("track") if o["name"] == loss]
        return library.items["settings"], steps, closing
    steps = [(o["step"], a[0][loss]) for a, o in library.named("log_metrics")]
    return library.named("log_parameters")[0][0][0], steps, closing


def test_settings_decisions_and_end_are_logged(logged: tuple[str, Library]) -> None:
    settings, steps, closing = told(*logged)

    assert steps == [(1000, 5.0), (2000, 4.0), (1000, 5.0)], "a rollback goes back"
    assert settings["policy_digest"] == policy_digest(policy_path("default"))
    assert str(settings["sequences"]) == "1600"
    assert len(closing) == 1


@pytest.mark.parametrize("tracker", TRACKERS.values())
def test_a_missing_package_is_one_line(tracker: type[Tracker], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, tracker.module or tracker.package, None)

    with pytest.raises(
        ValueError, match=rf"^{tracker.package} must be installed to .*; pip install {tracker.package}$"
    ):
        tracker(SETTINGS)


def test_the_settings_name_the_policy() -> None:
    bundle = PolicyBundle(random_weights())
    of_bundle = run_settings(SteeringSettings(sequences=1_600, batch_size=8, policy=bundle))

    assert of_bundle["policy_digest"] == bundle.digest()
    assert "policy_digest" not in run_settings(SteeringSettings(sequences=1_600, batch_size=8, policy="none"))
    assert json.loads(json.dumps(of_bundle)) == of_bundle


def test_a_folder_is_shown_like_that_of_a_replay(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = SteeringSettings(sequences=1_600, batch_size=8, policy=PolicyBundle(random_weights()))
    for resumes in (False, False, True):  # a second run replaces the first; one that goes on keeps its lines
        tracker = FolderTracker(folder, settings, resumes=resumes)
        for record in decision_records()[2 if resumes else 0 :]:
            tracker(record)
    assert not (folder / "summary.json").exists()
    tracker.finish(SUMMARY)
    run = read_run(folder)

    assert [record.telemetry.decision for record in run.records] == [0, 1, 2, 3, 2, 3]
    assert len(run.standing) == 4
    assert run.summary["loss"] is None
    assert PolicyBundle.load(run.config["policy"]).digest() == settings.policy.digest()  # type: ignore[union-attr]
