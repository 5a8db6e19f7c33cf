"""Write a steered run and its reference run to TensorBoard.

The x-axis counts tokens. The events are written to two folders, `run` and `reference`, under the same tags, so that
TensorBoard draws both runs into one chart. The tags are explained in `tags`. `scalars` returns the same numbers as a
dictionary, for frameworks that have a logger of their own.
"""

from __future__ import annotations

import html
import math
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainpilot.agents.controller import DecisionRecord
from trainpilot.agents.logging.tags import NAMES, TAGS, run_layout
from trainpilot.envs.action import ACTION_FIELDS
from trainpilot.envs.reward import OBJECTIVES, Reference, RewardTerms
from trainpilot.llm_runtime.config import PRECISIONS
from trainpilot.llm_runtime.plain_values import one_line
from trainpilot.llm_runtime.telemetry import Telemetry

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings into one mapping with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def hparams(settings: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """Flatten settings into the numbers, booleans and texts that TensorBoard's HPARAMS tab accepts."""
    flat = flatten(settings)
    return {text(key): value if isinstance(value, bool | int | float) else text(value) for key, value in flat.items()}


def text(value: Any) -> str:
    """Format a value for one table cell; `None` becomes `unknown`."""
    if value is None:
        return "unknown"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(text(item) for item in value)
    return one_line(value)


def markdown_table(settings: Mapping[str, Any]) -> str:
    """Return settings as a Markdown table with one row per key."""
    rows = [f"| {_cell(key)} | {_cell(value)} |" for key, value in flatten(settings).items()]
    return "\n".join(["| | |", "|---|---|", *rows])


def _cell(value: Any) -> str:
    """Format a value for a cell of a Markdown table, in which it is neither a border nor HTML."""
    return _plain(value).replace("|", chr(92) + "|")


def _plain(value: Any) -> str:
    """Format a value for Markdown, in which it is no HTML."""
    return html.escape(text(value), quote=False)


Scalars = dict[str, float | None]
"""Values by tag; tags whose value is `None` are not written."""


@dataclass
class Totals:
    """Energy, time and reward terms summed over the intervals so far."""

    energy_j: float | None = 0.0
    time_s: float = 0.0
    reward: dict[str, float] = field(default_factory=lambda: dict.fromkeys(OBJECTIVES, 0.0))

    def add(self, telemetry: Telemetry, reward: RewardTerms | None = None) -> None:
        """Add one interval. The energy sum becomes `None` once the energy of one interval is unknown."""
        known = self.energy_j is not None and telemetry.energy_j is not None
        self.energy_j = self.energy_j + telemetry.energy_j if known else None  # type: ignore[operator]
        self.time_s += telemetry.time_s
        if reward is not None:
            for name in OBJECTIVES:
                self.reward[name] += getattr(reward, name)


def _event_writer(folder: Path, purge_step: int | None = None) -> SummaryWriter:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"TensorBoard charts need {error.name}: pip install tensorboard", name=error.name
        ) from error
    return SummaryWriter(str(folder), purge_step=purge_step)


class RunWriter:
    """Writes the TensorBoard events of a steered run, one decision at a time.

    A write error (a full disk, for example) ends the logging with a warning; the run continues.

    Args:
        folder: Folder in which `run` and `reference` are created; a run that version 0.2 began goes on in `steered`.
        purge_step: Number of tokens from which an interrupted run resumes; TensorBoard hides events written after it.
        earlier: The records before that point, from which the running totals are restored.
    """

    def __init__(self, folder: Path, *, purge_step: int | None = None, earlier: Iterable[DecisionRecord] = ()) -> None:
        self.folder = folder
        self._totals = Totals()
        self._tokens = 0
        self._texts: dict[str, str] = {}
        self._failed = False
        for record in earlier:
            self._totals.add(record.telemetry, record.reward)
            self._tokens = record.telemetry.tokens
        purge = None if purge_step is None else purge_step + 1  # TensorBoard purges the given step, too
        self._writer: SummaryWriter  # there is none if it cannot be made
        self._try(lambda: self._begin(purge))

    def _begin(self, purge_step: int | None) -> None:
        began_as = self.folder / "steered"  # also without a policy, so that the name misled
        self._writer = _event_writer(began_as if began_as.is_dir() else self.folder / "run", purge_step)
        self._writer.add_custom_scalars(run_layout())

    def write(self, record: DecisionRecord) -> None:
        """Write one decision and the telemetry of the interval that followed it."""
        telemetry = record.telemetry
        self._totals.add(telemetry, record.reward)
        self._tokens = telemetry.tokens
        if self._failed:
            return
        values = _of_telemetry(telemetry, self._totals) | _of_record(record, self._totals)
        self._scalars(self._writer, values, telemetry.tokens)
        self._text("energy/source", _plain(telemetry.energy_source))
        reasons = "\n".join(f"* {_plain(choice)}: {_plain(why)}" for choice, why in record.masked.items())
        self._text("masks/masked_reasons", reasons or "nothing is masked")
        if record.refusals:
            self._text("masks/refused_reasons", "\n".join(f"* {_plain(reason)}" for reason in record.refusals))
        self._try(self._writer.flush)

    def write_reference(self, reference: Reference) -> None:
        """Write the reference run. A second call replaces the events of the first."""
        self._try(lambda: self._write_reference(reference))

    def _write_reference(self, reference: Reference) -> None:
        totals = Totals()
        shutil.rmtree(self.folder / "reference", ignore_errors=True)
        with _event_writer(self.folder / "reference") as writer:
            for telemetry in reference.telemetry:
                totals.add(telemetry)
                self._scalars(writer, _of_telemetry(telemetry, totals), telemetry.tokens)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write the run's summary as a Markdown table."""
        self._text("run/summary", markdown_table(summary))

    def write_hparams(self, config: Mapping[str, Any], metrics: Mapping[str, float | None]) -> None:
        """Write settings and final figures for the HPARAMS tab.

        Args:
            config: The settings, flat or nested.
            metrics: Figures of the whole run by their names in the summary, for example `final_validation_loss` or
                `time_s`. They become the tags `final/validation_loss` and `final/time_s`; `None` is not written.
        """
        settings = hparams(config)
        figures = {
            TAGS[f"final/{name.removeprefix('final_')}"].name: value
            for name, value in metrics.items()
            if value is not None and math.isfinite(value)
        }
        self._try(lambda: self._writer.add_hparams(settings, figures, run_name=".", global_step=self._tokens))

    def close(self) -> None:
        """Flush and close the event files."""
        if not self._failed:
            self._try(self._writer.close)

    def _scalars(self, writer: SummaryWriter, values: Scalars, tokens: int) -> None:
        for tag, value in values.items():
            name = TAGS[tag].name
            if value is not None and math.isfinite(value):
                self._try(lambda name=name, value=value: writer.add_scalar(name, value, tokens))  # type: ignore[misc]

    def _text(self, tag: str, text: str) -> None:
        """Write a text if it differs from the last one written under this tag."""
        name = TAGS[tag].name
        if self._texts.get(name) != text:
            self._texts[name] = text
            self._try(lambda: self._writer.add_text(name, text, self._tokens))

    def _try(self, write: Callable[[], object]) -> None:
        if self._failed:
            return
        try:
            write()
        except OSError as error:
            if not self._failed:
                warnings.warn(f"no more TensorBoard events are written to {self.folder}: {error}", stacklevel=3)
            self._failed = True


def _of_telemetry(telemetry: Telemetry, totals: Totals) -> Scalars:
    """Return the values that are logged for steered runs and reference runs alike."""
    t = telemetry
    return {
        "loss/train": t.train_loss,
        "loss/train_std": t.train_loss_std,
        "loss/train_max": t.train_loss_max,
        "loss/validation": t.validation_loss,
        **_of_controls(t),
        "energy/interval": t.energy_j,
        "energy/total": totals.energy_j,
        "energy/power": t.power_w,
        "energy/per_token": t.energy_per_token_j,
        "speed/tokens_per_s": t.tokens_per_s,
        "speed/interval": t.time_s,
        "speed/total": totals.time_s,
        "speed/probe": t.probe_time_s,
        "speed/switch": t.switch_time_s,
        "speed/evaluation": t.evaluation_time_s,
        "gradient/norm": t.gradient_norm,
        "gradient/clipped_share": t.clipped_share,
        "gradient/noise_scale": t.noise_scale,
        "gradient/relative_update": t.relative_update,
        "gradient/probe_linear": t.probe_linear,
        "gradient/probe_quadratic": t.probe_quadratic,
        "run/budget_used": t.budget_used,
        "run/decision": t.decision,
        "run/steps": t.steps,
        "run/epochs": t.epochs_seen,
        "run/memory_share": t.memory_share,
        "run/diverged": t.diverged,
    }


def _of_record(record: DecisionRecord, totals: Totals) -> Scalars:
    """Return the values that only a steered run has: decision, observation, masks and reward."""
    values: Scalars = {"masks/masked": len(record.masked), "masks/refused": len(record.refusals)}
    for action, asked, allowed in zip(ACTION_FIELDS, record.requested, record.allowed, strict=True):
        values[f"decision/{action.name}"] = asked - action.keep
        values[f"decision/{action.name}_allowed"] = allowed - action.keep
    values |= {f"observation/{name}": value for name, value in record.observation.items()}
    values |= _of_advice(record)
    if record.reward is not None:
        values |= {f"reward/{name}": getattr(record.reward, name) for name in OBJECTIVES}
        values |= {f"reward/{name}_total": totals.reward[name] for name in OBJECTIVES}
    return values


def _of_advice(record: DecisionRecord) -> Scalars:
    if record.advice is None:
        return {}
    return tagged("advice", record.advice.controls, NAMES["advice"])


def _of_controls(telemetry: Telemetry) -> Scalars:
    requested, effective = "controls_requested", "controls_effective"
    return tagged(requested, telemetry.requested, NAMES[requested]) | tagged(effective, telemetry, NAMES[effective])


def tagged(prefix: str, record: object, names: Iterable[str]) -> Scalars:
    """Return fields of a record by the tags that have their names; a precision becomes its code."""
    values = {f"{prefix}/{name}": getattr(record, name) for name in names}
    return {tag: _code(value) if isinstance(value, str) else value for tag, value in values.items()}


def _code(precision: str) -> float | None:
    return float(PRECISIONS.index(precision)) if precision in PRECISIONS else None


LEFT_OUT = ("controls_requested/finish", "controls_effective/micro_batch_size", "controls_effective/precision")
"""Tags of controls that `scalars` leaves out, to be short."""


def scalars(record: DecisionRecord) -> dict[str, float]:
    """Return the values of one decision by tag; the tags are explained in `docs/metrics.md`."""
    telemetry = record.telemetry
    values: dict[str, float | None] = {
        "loss/train": telemetry.train_loss,
        "loss/validation": telemetry.validation_loss,
        **_of_controls(telemetry),
        "gradient/norm": telemetry.gradient_norm,
        "gradient/noise_scale": telemetry.noise_scale,
        "energy/interval": telemetry.energy_j,
        "energy/power": telemetry.power_w,
        "speed/interval": telemetry.time_s,
        "speed/tokens_per_s": telemetry.tokens_per_s,
        "run/budget_used": telemetry.budget_used,
        "run/decision": telemetry.decision,
        **_of_advice(record),
    }
    shown = {name: value for name, value in values.items() if value is not None and name not in LEFT_OUT}
    known = {TAGS[name].name: float(value) for name, value in shown.items()}
    return {name: value for name, value in known.items() if math.isfinite(value)}
