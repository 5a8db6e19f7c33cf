"""Files from strangers do no harm where they are shown or resumed: one line if they are wrong, no control codes."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from decision_records import decision_record, decision_records, write_run
from matplotlib.figure import Figure
from policies import random_weights
from safetensors.numpy import save_file

from trainpilot.agents.bundle import field_tables
from trainpilot.agents.logging.run_log import markdown_table
from trainpilot.experiments import cli
from trainpilot.experiments.report.drawing import Panel, label, to_svg
from trainpilot.experiments.report.tensorboard import slug
from trainpilot.llm_runtime.files import save_checkpoint

GOLDEN = Path(__file__).parents[1] / "golden" / "version_0_1"
HOSTILE = (
    "\x1b[31mRED\x1b[0m \x1b]0;TITLE\x07\x1b[2J\x1b[H\x1b]8;;http://x\x1b\\ \u202eevil\u2066\x9b1m [red]markup[/x]"
)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    """Return what a command printed, none of which may act on a terminal."""
    monkeypatch.setattr(sys, "argv", ["trainpilot", *arguments])
    stopped = 0
    try:
        cli.main()
    except SystemExit as stop:
        stopped = int(stop.code or 0)
    out, err = capsys.readouterr()
    assert stopped == code, err
    assert all(each.isprintable() or each == "\n" for each in out + err), ascii(out + err)
    assert code == 0 or err.count("\n") == 1
    return out + err


def write_bundle(provenance: dict[str, Any]) -> None:
    header = {"format": 1, "fields": field_tables(), "provenance": provenance}
    save_file(random_weights(), "p.safetensors", {"trainpilot": json.dumps(header)})


def test_a_bundle_is_shown_without_its_control_codes(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nested = {HOSTILE: {HOSTILE: [HOSTILE, {HOSTILE: HOSTILE}]}}
    costs = {HOSTILE: 1.0}
    write_bundle({"recipe": HOSTILE, "list": [{HOSTILE: 1}, {HOSTILE: 2}], **nested, "scores": nested,
                  "training_cost": costs})  # fmt: skip
    shown = said(monkeypatch, capsys, "inspect", "p.safetensors")
    assert "\\x1b[31mRED" in shown
    assert "[red]markup[/x]" in shown


def test_a_bundle_of_twenty_thousand_keys_is_shown_at_once(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_bundle({f"k{index}": index for index in range(20_000)})
    assert "20000 more settings" in said(monkeypatch, capsys, "inspect", "p.safetensors")
    shown = said(monkeypatch, capsys, "inspect", "p.safetensors", "--all")
    assert "and 19,800 more" in shown
    assert shown.count("\n") < 300


def test_a_run_is_shown_without_its_control_codes(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [*decision_records(), decision_record(4, refusals=(HOSTILE,))]
    write_run(place / "run", records)
    summary = {"model": HOSTILE, "device": HOSTILE, "policy": HOSTILE, "energy_source": HOSTILE, "reference": [HOSTILE]}
    (place / "run" / "summary.json").write_text(json.dumps(summary))
    (place / "run" / "config.json").write_text(json.dumps({"policy": HOSTILE}))
    assert "evil" in said(monkeypatch, capsys, "inspect", "run")


@pytest.mark.parametrize(
    "line",
    ['{"a":1}', "[1,2]", "5", "null", "[" * 3_000 + "]" * 3_000, '{"telemetry": {"tokens": -1}}', "x" * 2**21 + "\n{}",
     json.dumps({HOSTILE: 1}), "{\n{}"],
)  # fmt: skip
def test_telemetry_that_cannot_be_is_one_line(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str
) -> None:
    (place / "run").mkdir()
    (place / "run" / "telemetry.jsonl").write_text(line + "\n")
    assert "line 1" in said(monkeypatch, capsys, "inspect", "run", code=2)


FINISHED = ("replay", "--model", "model.json", "--text", "text.txt", "--batch-size", "4", "--sequence-length", "16",
            "--threads", "1", "--tokens", "2048", "--decisions", "8", "--base-learning-rate", "1e-3", "--policy",
            "default.safetensors", "--preference", "quality=0.8,energy=0.2", "--reference", "--out",
            "finished")  # fmt: skip
KILLED = ("replay", "--model", "model.json", "--text", "text.txt", "--batch-size", "4", "--sequence-length", "16",
          "--threads", "1", "--tokens", "2560", "--decisions", "10", "--base-learning-rate", "2e-3", "--policy",
          "zigzag.safetensors", "--pruning", "magnitude", "--out", "killed")  # fmt: skip


@pytest.fixture
def golden(place: Path) -> Path:
    shutil.copytree(GOLDEN, place, dirs_exist_ok=True)
    config = json.loads((place / "finished" / "config.json").read_text())
    (place / "finished" / "config.json").write_text(json.dumps(config | {"policy": "default.safetensors"}))
    return place


@pytest.mark.parametrize(
    "change", [None, {"tokens": None}, {"model": 5}, {"reference": {"time_s": [1]}}, {"diverged": "x"}, {"time_s": "x"}]
)
def test_a_summary_that_cannot_be_is_one_line(
    golden: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], change: dict[str, Any] | None
) -> None:
    path = golden / "finished" / "summary.json"
    path.write_text("{}" if change is None else json.dumps(json.loads(path.read_text()) | change))
    assert "remove it or choose another --out" in said(monkeypatch, capsys, *FINISHED, code=2)


def test_a_summary_is_shown_again_without_control_codes(
    golden: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = golden / "finished" / "summary.json"
    hostile = {"energy_source": HOSTILE, "budget": HOSTILE, "advice": {HOSTILE: 1}, "model": HOSTILE, "policy": HOSTILE}
    path.write_text(json.dumps(json.loads(path.read_text()) | hostile))
    assert "\\x1b" in said(monkeypatch, capsys, *FINISHED)


def _set(path: tuple[Any, ...], value: Any) -> Any:
    def change(content: dict[str, Any]) -> None:
        inner: Any = content
        for name in path[:-1]:
            inner = inner[name]
        inner[path[-1]] = value(inner[path[-1]]) if callable(value) else value

    return change


@pytest.mark.parametrize(
    "change",
    [
        _set(("records",), []),
        _set(("records",), lambda records: records[:-1]),
        _set(("records",), 5),
        _set(("controller",), {}),
        _set(("controller", "seen"), [7]),
        _set(("snapshot",), {}),
        _set(("snapshot", "sequences"), -8),
        _set(("snapshot", "decision"), 9),
        _set(("snapshot", "stream"), {}),
        _set(("snapshot", "random_state", "cpu"), torch.zeros(3)),
        _set(("snapshot", "trainer", "batch_size"), 0),
        _set(("snapshot", "trainer", "weights", "model.embed_tokens.weight"), torch.zeros(2, 2)),
        _set(("snapshot", "trainer", "weights", "model.embed_tokens.weight"), lambda w: w * torch.nan),
        _set(("snapshot", "trainer", "optimizer", "state", 0, "exp_avg"), torch.zeros(3)),
        _set(("snapshot", "trainer", "optimizer", "state", 0, "exp_avg_sq"), lambda moment: moment.long()),
        _set(("snapshot", "trainer", "optimizer", "state", 0, "step"), lambda step: step * torch.nan),
        _set(("snapshot", "trainer", "optimizer", "state", 0), lambda state: {"step": state["step"]}),
        _set(("snapshot", "trainer", "optimizer", "param_groups", 0, "betas"), "x"),
        _set(("snapshot", "trainer", "optimizer", "param_groups", 0, "betas"), (0.9, 1e308)),
        _set(("snapshot", "trainer", "optimizer", "param_groups", 0, "params"), lambda numbers: numbers[::-1]),
        _set(("snapshot", "trainer", "optimizer", "param_groups", 0, "weight_decay"), 1e308),
        _set(("snapshot", "trainer", "optimizer", "param_groups", 0, "maximize"), True),
        _set(("snapshot", "trainer", "weights", "model.embed_tokens.weight"), lambda w: w.long()),
        _set(("snapshot", "trainer", "batch_size"), "4"),
        _set(("snapshot", "decision"), str),
        _set(("controller", "records", 0, "telemetry", "train_loss_std"), 1e308),
        _set(("snapshot", "trainer", "masks"), {}),
        _set(("initial_loss",), "x"),
    ],
)
def test_a_checkpoint_that_cannot_be_is_one_line(
    golden: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], change: Any
) -> None:
    path = golden / "killed" / "checkpoint.pt"
    content = torch.load(path, weights_only=True)
    change(content)
    save_checkpoint(path, content)
    assert "cannot be resumed" in said(monkeypatch, capsys, *KILLED, code=2)


def test_a_compressed_checkpoint_is_not_unpacked(
    golden: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import zipfile

    with zipfile.ZipFile(golden / "killed" / "checkpoint.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**8))
    assert "its content is larger than the file" in said(monkeypatch, capsys, *KILLED, code=2)


def test_a_name_that_looks_like_a_formula_is_drawn() -> None:
    figure = Figure()
    axes = figure.add_subplot()
    axes.set_yticks([0, 1], [label("policy m$\\frac{x$"), label("a\x1b\ud800b")])
    svg = to_svg(Panel("t\u202e", "y", figure, axes, ""), "c")
    assert "policy m$\\frac{x$" in svg
    assert "a\\x1b\\ud800b" in svg
    assert "\u202e" not in svg


def test_names_of_folders_and_tables_stay_short_and_plain() -> None:
    assert len(slug("policy:" + "\u4e2d" * 300)) < 80
    assert slug("x" * 300) != slug("x" * 301)
    table = markdown_table({"<script>": "a|b\x1b<img onerror=x>"})
    assert table.splitlines()[-1] == "| &lt;script&gt; | a\\|b\\x1b&lt;img onerror=x&gt; |"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("1e6,1e-3,8,128,1e300,3", "steps must be at most 1e+12, got '1e300'"),
        ("1e6,1e30,8,128,100,3", "learning_rate must be at most 1000"),
        ("1e6,\x1b[2J,8,128,100,3", "got '\\x1b[2J'"),
        ("1e6,1e-3,8,128,100,3,4,5", "a column for every value, got more values in sweep.csv:2"),
        ("1e6,1e-3,8,128,100," + "3" * 200_000, "sweep must be a CSV file that can be read"),
    ],
)
def test_a_sweep_that_cannot_be_is_one_line(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rows: str, message: str
) -> None:
    (place / "sweep.csv").write_text(
        f"parameters,learning_rate,batch_sequences,sequence_length,steps,final_loss\n{rows}\n"
    )
    assert message in said(monkeypatch, capsys, "fit-sweep", "sweep.csv", "--out", "o", code=2)
