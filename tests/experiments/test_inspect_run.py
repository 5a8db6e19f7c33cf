from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from decision_records import decision_record, decision_records, write_run
from rich.console import Console

from trainpilot.agents.logging.tags import opening_link
from trainpilot.envs.action import KEEP
from trainpilot.experiments.inspect_policy import print_bundle
from trainpilot.experiments.inspect_run import _tokens, inspect_paths, print_run, sparkline

SUMMARY = {
    "model": "llama-nano",
    "policy": "policy.safetensors",
    "tokens": 4000,
    "final_validation_loss": 2.1,
    "final_test_loss": None,
    "time_s": 8.0,
    "energy_j": 40.0,
    "energy_source": "measured_counter",
    "reference": {"final_validation_loss": 3.0, "time_s": 10.0, "energy_j": 80.0, "time_ratio": 0.8},
}


def shown(folder: Path, width: int = 120, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=width, **options)
    print_run(folder, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def row(text: str, label: str) -> list[str]:
    """Return the cells of the line that begins with `label`."""
    line = next(line for line in text.splitlines() if line.strip().startswith(label))
    return [cell.strip() for cell in line.strip().removeprefix(label).split("  ") if cell.strip()]


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    write_run(tmp_path, decision_records())
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY), encoding="utf-8")
    return tmp_path


def test_key_figures_stand_beside_the_reference(finished: Path) -> None:
    text = shown(finished)

    assert "llama-nano, policy policy.safetensors, finished at 100% of the budget, 4,000 tokens" in text
    assert row(text, "validation loss, nats/token") == ["2.1000", "3.0000"]
    assert row(text, "test loss, nats/token") == ["unknown"]
    assert row(text, "energy, J") == ["40.0", "80.0"]
    assert row(text, "time over the reference") == ["0.800"]


def test_time_and_energy_are_split_among_the_parts(finished: Path) -> None:
    text = shown(finished)

    # Four intervals of 2 s and 10 J, of which 0.5 s probe and 0.25 s switching; 1 s of evaluation before each.
    assert row(text, "training  ") == ["5.00", "41.7%", "25.00"]
    assert row(text, "curvature probe") == ["2.00", "16.7%", "10.00"]
    assert row(text, "switching controls") == ["1.00", "8.3%", "5.00"]
    assert row(text, "evaluation") == ["4.00", "33.3%", "not counted"]


def test_decisions_and_refusals_are_counted(tmp_path: Path) -> None:
    double, faster = (3, 2, 0, 0, 0), (6, 1, 0, 0, 0)
    refusals = [(f"batch_size double: {size} sequences outside [4, 8]",) for size in (16, 32)]
    records = [
        decision_record(0, requested=double, allowed=double),
        decision_record(1, requested=double, allowed=KEEP, refusals=refusals[0]),
        decision_record(2, requested=double, allowed=KEEP, refusals=refusals[1]),
        decision_record(3, requested=faster, allowed=faster),
    ]
    write_run(tmp_path, records)

    text = shown(tmp_path)

    assert row(text, "batch_size") == ["1", "double: 1"]
    assert row(text, "learning_rate") == ["1", "x2: 1"]
    assert row(text, "finish  ") == ["0", "-"]
    assert row(text, "batch_size double: 16 sequences outside [4, 8]")[-1] == "2", "numbers apart, one reason"


def test_it_says_how_to_open_tensorboard_on_one_line(finished: Path) -> None:
    (finished / "tb").mkdir()
    assert f"tensorboard --logdir {finished / 'tb'}\n" in shown(finished, width=40)
    assert f"then open {opening_link()}\n" in shown(finished, width=40)
    assert f"trainpilot report {finished} --out {finished.name}.html\n" in shown(finished, width=40)


def test_an_unfinished_run_is_shown_without_summary(tmp_path: Path) -> None:
    write_run(tmp_path, decision_records()[:1])
    (tmp_path / "summary.json").write_text("{", encoding="utf-8")

    text = shown(tmp_path)

    assert "not finished at 25% of the budget" in text
    assert "Key figures" not in text


def test_a_diverged_run_without_energy_is_shown(tmp_path: Path) -> None:
    nothing: dict[str, Any] = {"energy_j": None, "power_w": None, "energy_source": None, "validation_loss": None}
    records = [decision_record(0, **nothing), decision_record(1, train_loss=float("nan"), diverged=True, **nothing)]
    write_run(tmp_path, records)

    text = shown(tmp_path)

    assert "diverged at" in text
    assert "energy, J (no meter)" in text
    assert row(text, "training  ")[-1] == "unknown"


def test_charts_are_drawn_where_plotext_is_installed(finished: Path) -> None:
    pytest.importorskip("plotext")

    assert "┌" in shown(finished)
    assert "2 k" in shown(finished), "the axis counts tokens"


@pytest.mark.parametrize("replacement", [None, object()])
def test_sparklines_do_without_plotext(finished: Path, monkeypatch: pytest.MonkeyPatch, replacement: object) -> None:
    monkeypatch.setitem(sys.modules, "plotext", replacement)  # not installed, or a version of another interface

    text = shown(finished)

    assert "┌" not in text
    assert row(text, "training loss, nats/token")[0] == "█▆▃▁"


def test_a_terminal_without_unicode_gets_ascii(finished: Path) -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    print_run(finished, Console(file=file, width=100))
    file.flush()

    assert isinstance(file.buffer, io.BytesIO)
    assert b"training loss, nats/token" in file.buffer.getvalue()


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"telemetry\.jsonl"):
        shown(tmp_path)
    (tmp_path / "telemetry.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="at least one decision"):
        shown(tmp_path)


def test_a_sparkline_takes_means_and_spans_the_range() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, 0, 7, 7], 2) == "▁█"
    assert sparkline([2, 2, 2], 10) == "▁▁▁", "a constant is a flat line"
    assert sparkline([1], 10) == "▁"


def test_a_bundle_shows_its_provenance() -> None:
    console = Console(file=io.StringIO(), width=120)
    cases = [{"model": "llama-nano", "seed": 0}, {"model": "gpt2-nano", "seed": 0}]
    print_bundle({"recipe": "demo[x]", "ppo": {"n_steps": 100}, "training_cases": cases, "created": None}, console)

    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert row(text, "recipe")[-1] == "demo[x]"
    assert row(text, "ppo.n_steps")[-1] == "100"
    assert row(text, "training_cases")[-1] == "2; model llama-nano, gpt2-nano"
    assert row(text, "created")[-1] == "unknown"


@pytest.mark.parametrize(
    ("tokens", "shown"), [(999, "999"), (999_936, "1 M"), (250_000, "250 k"), (1_234_567, "1.23 M"), (999_400, "999 k")]
)
def test_tokens_have_three_digits_and_the_right_unit(tokens: int, shown: str) -> None:
    assert _tokens(tokens) == shown


def test_several_runs_are_a_line_each(tmp_path: Path) -> None:
    write_run(tmp_path / "done", decision_records())
    (tmp_path / "done" / "summary.json").write_text(json.dumps(SUMMARY), encoding="utf-8")
    double, refusals = (3, 2, 0, 0, 0), ("batch_size double: 16 sequences outside [4, 8]",)
    lost: dict[str, Any] = {"train_loss": float("nan"), "diverged": True, "energy_j": None}
    write_run(
        tmp_path / "lost",
        [decision_record(0, requested=double, allowed=double), decision_record(1, refusals=refusals, **lost)],
    )
    texts = {}
    for width in (120, 80):
        console = Console(file=io.StringIO(), width=width)
        inspect_paths([tmp_path / "done", tmp_path / "lost"], console)
        assert isinstance(console.file, io.StringIO)
        texts[width] = console.file.getvalue()

    # Four intervals of 2 s and 10 J; the summary's loss counts. The lost run changed once and was refused once.
    figures = ["policy.safetensors", "finished", "2.1000", "unknown", "4 k", "8.0", "40.0", "0", "0", "0"]
    assert row(texts[120], "done") == figures
    assert row(texts[120], "lost") == [
        "unknown",
        "diverged",
        "unknown",
        "unknown",
        "2 k",
        "4.0",
        "unknown",
        "1",
        "1",
        "0",
    ]
    assert row(texts[80], "done") == ["finished", "2.1000", "4 k", "8.0", "40.0", "0", "0", "0"]
    with pytest.raises(ValueError, match=r"^path must hold a run's telemetry.jsonl, got "):
        inspect_paths([tmp_path / "done", tmp_path], Console(quiet=True))
    with pytest.raises(ValueError, match=r"^path must be given, got none"):
        inspect_paths([], Console(quiet=True))
