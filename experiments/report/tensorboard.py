"""Write every judged run of a comparison to TensorBoard: one folder per case, method and seed; the x-axis is tokens.

The records are written directly, without torch: its writer starts a thread for each run, and there are hundreds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import summary_v2
from tensorboard.summary.writer.record_writer import RecordWriter

from trainpilot.agents.logging.run_log import hparams, tagged, text
from trainpilot.agents.logging.tags import TAGS
from trainpilot.experiments.report.report_data import ReportData
from trainpilot.experiments.results import IntervalResult, Row, RunResult
from trainpilot.llm_runtime.files import digest, whole_folder
from trainpilot.llm_runtime.telemetry import READ_BACK

LONGEST_NAME = 60
"""Characters of a folder's name, before a digest stands for the rest; some letters take four bytes of a file system's
255."""
SETTINGS = ("tokens", "batch_size", "base_learning_rate", "schedule", "precision", "optimizer", "seed")
EFFECTIVE = tuple(name for name in READ_BACK if name != "finishing")
"""Controls that are written as they were read back."""


def write_events(folder: Path, data: ReportData) -> None:
    """Write the runs of all methods; what stood in `folder` before goes."""
    with whole_folder(folder) as temporary:
        for row in data.comparison.rows:
            result = data.results.get(row.key)
            if row.role == "method" and result is not None and result.intervals:
                _write_run(temporary / slug(row.case) / slug(row.method) / f"seed-{row.seed}", row, result)


def slug(name: str) -> str:
    """Return a name that may be a folder's."""
    plain = re.sub(r"[^\w.@+-]+", "-", name).strip(".-") or "unnamed"
    return plain if len(plain) <= LONGEST_NAME else f"{plain[:LONGEST_NAME]}-{digest(name, 4)}"


def _write_run(folder: Path, row: Row, result: RunResult) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "events.out.tfevents.0.trainpilot").open("wb") as stream:
        writer = RecordWriter(stream)
        writer.write(Event(file_version="brain.Event:2").SerializeToString())
        for step, values in _scalars(result):
            writer.write(Event(step=step, wall_time=float(step), summary=_summary(values)).SerializeToString())
        writer.write(Event(step=result.tokens, summary=_hparams(row, result)).SerializeToString())
        writer.flush()


def _scalars(result: RunResult) -> Iterator[tuple[int, dict[str, float | None]]]:
    yield 0, {"loss/validation": result.initial_validation_loss}
    for interval in result.intervals:
        yield interval.tokens, _of_interval(interval)
    finals = {"validation_loss": result.final_validation_loss, "test_loss": result.final_test_loss}
    yield result.tokens, {f"final/{name}": value for name, value in finals.items()} | {"final/tokens": result.tokens}


def _of_interval(interval: IntervalResult) -> dict[str, float | None]:
    return {
        "loss/train": interval.train_loss,
        "loss/validation": interval.validation_loss,
        "controls_requested/learning_rate_scale": interval.learning_rate_scale,
        **tagged("controls_effective", interval, EFFECTIVE),
    }


def _summary(values: dict[str, float | None]) -> Summary:
    """Return scalars under the tags that steered runs use; what is unknown or not finite is left out."""
    known = {TAGS[tag].name: value for tag, value in values.items() if value is not None and math.isfinite(value)}
    return Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in known.items()])


def _hparams(row: Row, result: RunResult) -> Summary:
    """Return the run's settings for the HPARAMS tab; its metrics are the `final/` scalars."""
    config = asdict(result.spec.config)
    settings = {"case": row.case, "method": row.method, **{name: config[name] for name in SETTINGS}}
    trial = text(f"{row.case} {row.method} {row.seed}")
    return summary_v2.hparams_pb(hparams(settings), trial_id=trial, start_time_secs=0.0)
