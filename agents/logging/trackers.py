"""Log each decision of a steered run to an experiment tracker: W&B, MLflow, Aim, trackio or Comet, or to a folder.

    tracker = WandbTracker(settings, project="pilot")
    steering = Steering(model, optimizer, settings, on_decision=tracker)
    ...
    tracker.finish(steering.summary())

Every tracker gets the settings of the run with the digest of the policy, the values of each decision under the tags
that TensorBoard has (`docs/metrics.md`), over the tokens trained on, and at the end the summary. The package of a
tracker is imported when the tracker is made; none of them is needed by trainpilot.
"""

from __future__ import annotations

import json
import math
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from trainpilot.agents.bundle import PolicyBundle, policy_digest, policy_path
from trainpilot.agents.controller import DecisionRecord
from trainpilot.agents.logging.run_log import flatten, scalars, text
from trainpilot.agents.logging.tags import TAGS
from trainpilot.agents.steering.settings import SteeringSettings, name_of
from trainpilot.llm_runtime.files import whole_file, write_json

TOKENS = "tokens"
"""Name of the x-axis in the trackers that take one."""


def run_settings(settings: SteeringSettings) -> dict[str, Any]:
    """Return the settings of a run as plain JSON values, with the name of its policy and the digest of its file."""
    stated = {each.name: _plain(getattr(settings, each.name)) for each in fields(settings) if each.name != "policy"}
    policy = settings.policy
    digest = policy.digest() if isinstance(policy, PolicyBundle) else None
    if isinstance(policy, str | Path) and str(policy) != "none":
        digest = policy_digest(policy_path(str(policy)))
    return {"policy": name_of(policy), **({} if digest is None else {"policy_digest": digest}), **stated}


def _plain(value: Any) -> Any:
    """Return plain JSON values; what is not finite becomes `None`."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    return json.loads(json.dumps(value, default=str), parse_constant=lambda _: None)


class Tracker(ABC):
    """A function for `on_decision` that logs each decision, and closes the log with `finish`.

    Args:
        settings: Settings of the run, or a mapping of its settings as plain values.
        options: What the tracker's own package takes where a run is begun.

    Raises:
        ValueError: the package is not installed.
    """

    package: ClassVar[str]
    """Name of the package, as pip and Python know it."""
    module: ClassVar[str] = ""
    """What is imported, where that has another name."""

    def __init__(self, settings: SteeringSettings | Mapping[str, Any], **options: Any) -> None:
        library = _import(self.package, self.module or self.package)
        config = run_settings(settings) if isinstance(settings, SteeringSettings) else _plain(dict(settings))
        self._begin(library, config, options)

    def __call__(self, record: DecisionRecord) -> None:
        """Log the decision and the interval that followed it."""
        values = scalars(record) | {TAGS["masks/refused"].name: float(len(record.refusals))}
        self._log(values, record.telemetry.tokens)

    def finish(self, summary: Mapping[str, Any] | None = None) -> None:
        """Log the summary, such as that of `Steering.summary`, and close the run."""
        self._end(_plain(dict(summary or {})))

    @abstractmethod
    def _begin(self, library: Any, config: dict[str, Any], options: dict[str, Any]) -> None: ...

    @abstractmethod
    def _log(self, values: dict[str, float], tokens: int) -> None: ...

    @abstractmethod
    def _end(self, summary: dict[str, Any]) -> None: ...


def _import(package: str, module: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ValueError(f"{package} must be installed to log to it, got {error}; pip install {package}") from error


def _figures(summary: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a summary by dotted name."""
    flat = flatten(summary).items()
    numbers = {key: value for key, value in flat if isinstance(value, int | float) and not isinstance(value, bool)}
    return {key: float(value) for key, value in numbers.items() if math.isfinite(value)}


class WandbTracker(Tracker):
    """Log to Weights & Biases; `options` go to `wandb.init`, such as `project` and `mode="offline"`."""

    package = "wandb"

    def _begin(self, library: Any, config: dict[str, Any], options: dict[str, Any]) -> None:
        self._run = library.init(**{"config": config, **options})
        self._run.define_metric(
            "*", step_metric=TOKENS
        )  # steps of W&B never go back, as a run that is rolled back does

    def _log(self, values: dict[str, float], tokens: int) -> None:
        self._run.log({**values, TOKENS: tokens})

    def _end(self, summary: dict[str, Any]) -> None:
        self._run.summary.update(summary)
        self._run.finish()


class TrackioTracker(Tracker):
    """Log to trackio; `options` go to `trackio.init`, such as `project` and `name`."""

    package = "trackio"

    def _begin(self, library: Any, config: dict[str, Any], options: dict[str, Any]) -> None:
        self._library = library
        library.init(**{"project": "trainpilot", "config": config, **options})

    def _log(self, values: dict[str, float], tokens: int) -> None:
        self._library.log({**values, TOKENS: tokens})

    def _end(self, summary: dict[str, Any]) -> None:
        if figures := _figures(summary):
            self._library.log({f"summary/{name}": value for name, value in figures.items()})
        self._library.finish()


class MlflowTracker(Tracker):
    """Log to MLflow; `options` go to `MlflowClient.create_run`, and `experiment` and `tracking_uri` say where.

    By default it logs into the experiment `trainpilot` at the tracking URI that is set.
    """

    package = "mlflow"

    def _begin(self, library: Any, config: dict[str, Any], options: dict[str, Any]) -> None:
        name = options.pop("experiment", "trainpilot")
        self._client = client = library.MlflowClient(tracking_uri=options.pop("tracking_uri", None))
        found = client.get_experiment_by_name(name)
        experiment = found.experiment_id if found is not None else client.create_experiment(name)
        self._run = client.create_run(experiment, **options).info.run_id
        self._metric = library.entities.Metric
        for key, value in flatten(config).items():
            client.log_param(self._run, key, text(value)[:LONGEST_PARAM])

    def _log(self, values: dict[str, float], tokens: int) -> None:
        """Log all values at once: a store on disk takes as long for one."""
        now = int(1000 * time.time())
        self._client.log_batch(self._run, [self._metric(name, value, now, tokens) for name, value in values.items()])

    def _end(self, summary: dict[str, Any]) -> None:
        figures = {NO_METRIC.sub("", name): value for name, value in _figures(summary).items()}
        self._log({f"summary/{name}"[:LONGEST_METRIC]: value for name, value in figures.items()}, 0)
        self._client.log_dict(self._run, summary, "summary.json")
        self._client.set_terminated(self._run)


LONGEST_PARAM = 6000
"""Characters that MLflow takes for a parameter."""
LONGEST_METRIC = 250
"""Characters that it takes for the name of a metric."""
NO_METRIC = re.compile(r"[^\w\-. /]")
"""What it refuses in such a name; the reasons of refusals have commas and brackets."""


class AimTracker(Tracker):
    """Log to Aim; `options` go to `aim.Run`, such as `repo` and `experiment`."""

    package = "aim"

    def _begin(self, library: Any, config: dict[str, Any], options: dict[str, Any]) -> None:
        self._run = library.Run(**options)
        self._run["settings"] = config

    def _log(self, values: dict[str, float], tokens: int) -> None:
        for name, value in values.items():
            self._run.track(value, name=name, step=tokens)

    def _end(self, summary: dict[str, Any]) -> None:
        self._run["summary"] = summary
        self._run.close()


class CometTracker(Tracker):
    """Log to Comet; `options` go to `comet_ml.start`, such as `project_name` and `online=False`."""

    package = "comet-ml"
    module = "comet_ml"

    def _begin(self, library: Any, config: dict[str, Any], options: dict[str, Any]) -> None:
        self._experiment = library.start(**options)
        self._experiment.log_parameters(flatten(config))

    def _log(self, values: dict[str, float], tokens: int) -> None:
        self._experiment.log_metrics(values, step=tokens)

    def _end(self, summary: dict[str, Any]) -> None:
        self._experiment.log_others(flatten(summary))
        self._experiment.end()


class FolderTracker:
    """Log into a folder that `trainpilot inspect` and `trainpilot report` show; it needs no package.

    Args:
        folder: Takes `config.json`, `telemetry.jsonl` with a line per decision, and at the end `summary.json`.
        settings: Settings of the run.
        resumes: Keep the lines that are there, for a run that goes on from a saved state; else they go.
    """

    def __init__(self, folder: str | Path, settings: SteeringSettings, *, resumes: bool = False) -> None:
        self.folder = Path(folder)
        config = run_settings(settings)
        if isinstance(settings.policy, PolicyBundle):
            settings.policy.save(self.folder / "policy.safetensors")
            path = self.folder / "policy.safetensors"
            config |= {"policy": str(path), "policy_digest": policy_digest(path)}
        write_json(self.folder / "config.json", config)
        (self.folder / "summary.json").unlink(missing_ok=True)
        if not resumes:
            with whole_file(self.folder / "telemetry.jsonl") as temporary:
                temporary.touch()

    def __call__(self, record: DecisionRecord) -> None:
        """Add a line for the decision and the interval that followed it."""
        with (self.folder / "telemetry.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record.to_json(), allow_nan=False) + "\n")

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the summary, that of `Steering.summary`."""
        write_json(self.folder / "summary.json", _plain(dict(summary)))
