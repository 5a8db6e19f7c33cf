from __future__ import annotations

import math
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
from decision_records import decision_record, decision_records, reference_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from trainpilot.agents.logging.run_log import RunWriter, flatten, markdown_table
from trainpilot.agents.logging.run_log import scalars as logged
from trainpilot.envs.decision import Advice
from trainpilot.llm_runtime.config import Controls


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0})
    events.Reload()
    return events


def scalars(events: EventAccumulator, tag: str) -> list[tuple[int, Any]]:
    return [(event.step, pytest.approx(event.value, rel=1e-6)) for event in events.Scalars(tag)]


def texts(events: EventAccumulator, tag: str) -> list[tuple[int, str]]:
    found = events.Tensors(f"{tag}/text_summary")
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in found]


def test_values_stand_at_the_tokens_trained_on(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path)
    for record in decision_records(3):
        writer.write(record)
    writer.close()

    events = read(tmp_path / "run")
    assert scalars(events, "loss/train") == [(1000, 5.0), (2000, 4.0), (3000, 3.0)]
    assert scalars(events, "loss/validation") == [(2000, 4.1), (3000, 3.1)], "unknown is left out, not 0"
    assert scalars(events, "controls_requested/learning_rate_scale")[0] == (1000, 2.0)
    assert scalars(events, "controls_requested/batch_size")[0] == (1000, 8.0)
    assert scalars(events, "controls_effective/batch_size")[0] == (1000, 7.5)
    assert scalars(events, "controls_effective/precision")[0] == (1000, 2.0), "bf16 is the third of the formats"
    assert scalars(events, "energy/total") == [(1000, 10.0), (2000, 20.0), (3000, 30.0)]
    assert scalars(events, "energy/per_token")[0] == (1000, 0.01)
    assert scalars(events, "speed/tokens_per_s")[0] == (1000, 500.0)
    assert scalars(events, "speed/total")[-1] == (3000, 6.0)
    assert scalars(events, "reward/quality_total") == [(1000, 0.25), (2000, 0.5), (3000, 0.75)]
    assert scalars(events, "observation/noise_scale")[0] == (1000, 0.5)


def test_a_run_that_version_0_2_began_goes_on_in_its_folder(tmp_path: Path) -> None:
    (tmp_path / "steered").mkdir()
    writer = RunWriter(tmp_path)
    writer.write(decision_record(0))
    writer.close()

    assert scalars(read(tmp_path / "steered"), "loss/train") == [(1000, 5.0)]
    assert not (tmp_path / "run").exists()


def test_decisions_count_from_keep(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path)
    writer.write(decision_record(0, requested=(1, 2, 0, 1, 0), allowed=(1, 1, 0, 0, 0)))
    writer.close()

    events = read(tmp_path / "run")
    assert scalars(events, "decision/learning_rate") == [(1000, -2.0)]
    assert scalars(events, "decision/batch_size") == [(1000, 1.0)]
    assert scalars(events, "decision/batch_size_allowed") == [(1000, 0.0)]
    assert scalars(events, "decision/pruning") == [(1000, 1.0)]


def test_advice_stands_beside_what_was_done(tmp_path: Path) -> None:
    asked = Controls(batch_size=16, learning_rate_scale=4.0, precision="fp32", sparsity=0.1, finish=True)
    record = decision_record(0, requested=(6, 2, 1, 1, 1), advice=Advice(action=(6, 2, 1, 1, 1), controls=asked))
    writer = RunWriter(tmp_path)
    writer.write(record)
    writer.close()

    events = read(tmp_path / "run")
    known = {name: value for name, value in logged(record).items() if name.startswith("advice/")}
    assert known == {
        "advice/learning_rate_scale": 4.0, "advice/batch_size": 16.0, "advice/precision": 0.0, "advice/sparsity": 0.1,
        "advice/finish": 1.0,
    }  # fmt: skip
    for name, value in known.items():
        assert scalars(events, name) == [(1000, value)]
    assert scalars(events, "controls_requested/learning_rate_scale") == [(1000, 2.0)]
    assert not [name for name in logged(decision_record(0)) if name.startswith("advice/")]


def test_what_is_unknown_or_not_finite_is_left_out(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path)
    writer.write(decision_record(0, energy_j=None, power_w=None, energy_source=None))
    writer.write(decision_record(1, train_loss=math.nan, diverged=True))
    writer.close()

    events = read(tmp_path / "run")
    assert scalars(events, "loss/train") == [(1000, 5.0)]
    assert scalars(events, "run/diverged") == [(1000, 0.0), (2000, 1.0)]
    assert scalars(events, "energy/interval") == [(2000, 10.0)]
    assert "energy/total" not in events.Tags()["scalars"], "a sum with an unknown part is unknown"
    assert texts(events, "energy/source") == [(1000, "unknown"), (2000, "measured_counter")]


def test_reasons_are_written_as_text_when_they_change(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path)
    writer.write(decision_record(0))
    writer.write(decision_record(1, refusals=("precision tf32: an NVIDIA GPU format",)))
    writer.write(decision_record(2, masked={"finish cool down": "not before 20% of the budget"}))
    writer.write(decision_record(3, masked={}))
    writer.close()

    events = read(tmp_path / "run")
    assert texts(events, "masks/masked_reasons") == [
        (1000, "* precision tf32: an NVIDIA GPU format"),
        (3000, "* finish cool down: not before 20% of the budget"),
        (4000, "nothing is masked"),
    ]
    assert texts(events, "masks/refused_reasons") == [(2000, "* precision tf32: an NVIDIA GPU format")]
    assert scalars(events, "masks/masked") == [(1000, 1.0), (2000, 1.0), (3000, 1.0), (4000, 0.0)]
    assert [value for _, value in scalars(events, "masks/refused")] == [0.0, 1.0, 0.0, 0.0]


def test_the_reference_stands_beside_the_run_under_the_same_tags(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path)
    writer.write(decision_record(0))
    writer.write_reference(reference_run(2))
    writer.write_reference(reference_run(3))
    writer.close()

    assert sorted(path.name for path in tmp_path.iterdir()) == ["reference", "run"]
    events = read(tmp_path / "reference")
    assert scalars(events, "loss/train") == [(1000, 6.0), (2000, 5.0), (3000, 4.0)], (
        "the second takes the first's place"
    )
    assert scalars(events, "energy/total")[-1] == (3000, 60.0)


def test_going_on_hides_what_was_written_beyond_and_keeps_the_sums(tmp_path: Path) -> None:
    records = decision_records(4)
    interrupted = RunWriter(tmp_path)
    for record in records[:3]:
        interrupted.write(record)
    interrupted.close()
    time.sleep(1.1)  # TensorBoard reads a folder's files in the order of the seconds in their names

    writer = RunWriter(tmp_path, purge_step=2000, earlier=records[:2])
    for record in (decision_record(2, train_loss=2.5), records[3]):
        writer.write(record)
    writer.close()

    events = read(tmp_path / "run")
    assert scalars(events, "loss/train") == [(1000, 5.0), (2000, 4.0), (3000, 2.5), (4000, 2.0)]
    assert scalars(events, "energy/total") == [(1000, 10.0), (2000, 20.0), (3000, 30.0), (4000, 40.0)]
    assert scalars(events, "reward/time_total")[-1] == (4000, -0.4)


def test_the_summary_is_a_table_at_the_end_of_the_run(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path, earlier=decision_records(4))
    writer.write_summary({"model": "llama-nano", "energy_j": None, "versions": {"python": "3.11"}})
    writer.close()

    [(step, table)] = texts(read(tmp_path / "run"), "run/summary")
    assert step == 4000
    assert table.splitlines()[2:] == ["| model | llama-nano |", "| energy_j | unknown |", "| versions.python | 3.11 |"]


def test_hparams_carry_settings_and_final_metrics_in_the_same_run(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path)
    writer.write(decision_record(0))
    config = {"seed": 3, "text": ("stdlib", "a.txt"), "warmup_tokens": None, "ppo": {"clip_range": 0.2}}
    writer.write_hparams(config, {"final_validation_loss": 2.5, "time_s": 8.0, "energy_j": None})
    writer.close()

    events = read(tmp_path / "run")
    assert scalars(events, "final/validation_loss") == [(1000, 2.5)]
    assert scalars(events, "final/time_s") == [(1000, 8.0)]
    assert "final/energy_j" not in events.Tags()["scalars"]
    settings = session(events)
    assert settings["seed"].number_value == 3
    assert settings["text"].string_value == "stdlib, a.txt"
    assert settings["warmup_tokens"].string_value == "unknown"
    assert settings["ppo.clip_range"].number_value == 0.2
    assert [path.name for path in tmp_path.iterdir()] == ["run"], "no run of its own for the table"


def session(events: EventAccumulator) -> Any:
    """Return what the HPARAMS tab knows of a run."""
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    return plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams


def test_nothing_becomes_html_or_acts_on_what_is_shown(tmp_path: Path) -> None:
    nasty = "<script>alert(1)</script> \x1b[2J \u202e"
    writer = RunWriter(tmp_path)
    writer.write(decision_record(0, refusals=(nasty,), masked={nasty: nasty}, energy_source=nasty))
    writer.write_summary({nasty: nasty})
    writer.write_hparams({nasty: nasty}, {"time_s": 8.0})
    writer.close()

    events = read(tmp_path / "run")
    tags = ("masks/refused_reasons", "masks/masked_reasons", "energy/source", "run/summary")
    told = "\n".join(shown for tag in tags for _, shown in texts(events, tag))
    assert told.count("&lt;script&gt;") == 6
    assert "<" not in told
    assert told.replace("\n", "").isprintable()
    [(name, value)] = session(events).items()
    assert name == value.string_value == "<script>alert(1)</script> \\x1b[2J \\u202e", "that tab shows no HTML"


def test_the_layout_shows_requested_beside_effective(tmp_path: Path) -> None:
    RunWriter(tmp_path).close()

    events = read(tmp_path / "run")
    [event] = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for part in layout.category for chart in part.chart}
    assert [part.title for part in layout.category] == ["Loss", "Controls", "Energy and time", "Reward"]
    assert charts["batch requested and in force (sequences)"] == [
        r"^controls_requested/batch_size$",
        r"^controls_effective/batch_size$",
    ]


def test_a_metric_that_is_not_in_the_table_is_our_mistake(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path)
    with pytest.raises(KeyError):
        writer.write_hparams({}, {"accuracy": 1.0})
    writer.close()


def test_a_full_disk_costs_the_charts_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = RunWriter(tmp_path)

    def full(*_args: object, **_options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer._writer, "add_scalar", full)
    with pytest.warns(UserWarning, match="no more TensorBoard events"):
        writer.write(decision_record(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        writer.write(decision_record(1))
        writer.close()


def test_a_full_disk_at_the_start_costs_the_charts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object, **_options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", full)
    with pytest.warns(UserWarning, match="no more TensorBoard events are written") as warned:
        writer = RunWriter(tmp_path)
    writer.write_reference(reference_run())
    writer.write(decision_record(0))
    writer.write_summary({"loss": 1.0})
    writer.close()
    assert len(warned) == 1


def test_a_full_disk_under_the_reference_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = RunWriter(tmp_path)

    def full(*_args: object, **_options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.close", full)
    with pytest.warns(UserWarning, match="no more TensorBoard events are written"):
        writer.write_reference(reference_run())


def test_an_unknown_precision_leaves_no_value(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path)
    writer.write(decision_record(0, precision="fp8"))
    writer.close()

    events = read(tmp_path / "run")
    assert "controls_effective/precision" not in events.Tags()["scalars"]
    assert scalars(events, "controls_requested/precision") == [(1000, 2.0)]


def test_settings_are_flattened_with_dots_and_cells_are_escaped() -> None:
    assert flatten({"a": {"b": {"c": 1}}, "d": 2}) == {"a.b.c": 1, "d": 2}
    assert markdown_table({"a": "x|y\nz"}).splitlines()[-1] == "| a | x\\|y z |"
