"""`trainpilot export` writes whole folders and one table, and turns every fault into one line."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from live_runs import text_by_rule
from rich.console import Console
from transformers import AutoModelForCausalLM

from trainpilot.experiments import cli
from trainpilot.experiments.export import job
from trainpilot.experiments.export.command import export
from trainpilot.experiments.options import ExportOptions, ReplayOptions
from trainpilot.experiments.replay import replay
from trainpilot.llm_runtime.export import formats
from trainpilot.llm_runtime.export.formats import FORMATS

CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
OWN = ("bf16", "pot", "pot2", "bcq")
"""Formats that need no package."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run."""
    place = tmp_path_factory.mktemp("run")
    (place / "text.txt").write_text(text_by_rule(40_000), encoding="utf-8")
    (place / "model.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    options = ReplayOptions(
        out=place / "finished",
        model=str(place / "model.json"),
        text=(str(place / "text.txt"),),
        tokens=20_000,
        batch_size=8,
        sequence_length=32,
        base_learning_rate=1e-2,
        decisions=4,
        device="cpu",
        probe=False,
    )
    replay(options, Console(file=io.StringIO()))
    return place / "finished"


def done(run: Path, out: Path, **options: Any) -> tuple[dict[str, Any], str]:
    """Export, and return the content of `export.json` and what was printed."""
    console = Console(file=io.StringIO(), width=80)
    usual: dict[str, Any] = {"format": ",".join(OWN), "speed": False, "threads": 1, "device": "cpu"}
    export(ExportOptions(path=run, out=out, **(usual | options)), console)
    assert isinstance(console.file, io.StringIO)
    return json.loads((out / "export.json").read_text(encoding="utf-8")), console.file.getvalue()


def test_an_export_holds_what_it_promises(run: Path, tmp_path: Path) -> None:
    found, said = done(run, tmp_path / "out")

    rows = {row["format"]: row for row in found["rows"]}
    assert list(rows) == ["fp32", *OWN]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*OWN, "export.json", "export.md", "export.png"}
    summary = json.loads((run / "summary.json").read_text())
    assert rows["fp32"]["test_loss"] == pytest.approx(summary["final_test_loss"], abs=1e-5)
    assert found["run_test_loss"] == summary["final_test_loss"]
    assert found["trained_tokens"] == summary["tokens"]
    assert rows["bf16"]["weight_bytes"] == pytest.approx(rows["fp32"]["weight_bytes"] / 2, rel=0.1)
    assert rows["pot"]["packed_bytes"] < rows["bf16"]["weight_bytes"] < rows["pot"]["weight_bytes"]
    losses = {name: abs(row["test_loss"] - rows["fp32"]["test_loss"]) for name, row in rows.items()}
    assert losses["bf16"] < 0.01
    assert 0 < losses["pot2"] < losses["pot"]
    assert all(row["score"] is row["decode_tokens_per_s"] is row["cost"] is None for row in rows.values())
    assert "bcq" in said
    assert "+" in said
    assert max(map(len, said.splitlines()[:-1])) <= 80
    assert "| pot | ~" in (tmp_path / "out" / "export.md").read_text()


def test_plain_transformers_loads_the_folders(run: Path, tmp_path: Path) -> None:
    done(run, tmp_path / "out")

    for name in OWN:
        model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / name)
        generated = model.generate(torch.tensor([[116, 104]]), max_new_tokens=3, do_sample=False)
        assert generated.shape[1] == 5


def test_speed_and_joules_are_measured_against_the_unquantised_model(run: Path, tmp_path: Path) -> None:
    found, said = done(run, tmp_path / "out", format="bf16,pot", speed=True, prompt_tokens=8, new_tokens=4)

    fp32, bf16, pot = found["rows"]
    assert fp32["score"] == fp32["time_ratio"] == 1
    assert bf16["cost"]["prompt_tokens"] == 8
    assert bf16["time_ratio"] == pytest.approx(
        bf16["cost"]["request"]["time_s"] / bf16["unquantised_cost"]["request"]["time_s"]
    )
    expected = bf16["perplexity_ratio"] ** 1.5 * (bf16["time_ratio"] + (bf16["energy_ratio"] or 0)) / 2
    assert bf16["energy_ratio"] is None or bf16["score"] == pytest.approx(expected)
    assert bf16["runtime"] == "transformers on cpu, bfloat16"
    assert pot["cost"] is None
    assert pot["score"] is None
    assert "nothing here packs or runs them" in " ".join(said.split())


def test_all_leaves_out_what_cannot_be_written_here(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "find_spec", lambda name: None)

    found, said = done(run, tmp_path / "out", format="all")

    assert [row["format"] for row in found["rows"]] == ["fp32", *OWN]
    assert list(found["left_out"]) == [name for name in FORMATS if name not in OWN]
    assert 'pip install "trainpilot[export]"' in " ".join(said.split())


@pytest.mark.skipif(any(FORMATS[name].missing for name in FORMATS), reason="needs all packages of export")
def test_every_format_in_one_table(run: Path, tmp_path: Path) -> None:
    found, _ = done(run, tmp_path / "out", format="all")

    rows = {row["format"]: row for row in found["rows"]}
    assert set(rows) == {"fp32", *FORMATS}
    for name, row in rows.items():
        assert abs(row["test_loss"] - rows["fp32"]["test_loss"]) < 0.2, name
    assert (tmp_path / "out" / "gguf-q4" / "model.gguf").is_file()


@pytest.mark.skipif(FORMATS["gguf-q8"].missing, reason="needs the package gguf")
def test_gguf_that_nothing_runs_says_what_to_install(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "find_spec", lambda name: None)

    found, said = done(run, tmp_path / "out", format="gguf-q8", speed=True, prompt_tokens=4, new_tokens=2)

    assert found["rows"][1]["cost"] is None
    assert 'pip install "trainpilot[llama-cpp]"' in " ".join(said.split())


def test_a_model_folder_is_exported_with_its_text(run: Path, tmp_path: Path) -> None:
    text = json.loads((run / "config.json").read_text())["text"]
    found, _ = done(run / "model", tmp_path / "out", format="bf16", text=tuple(text), sequence_length=16)

    assert found["trained_tokens"] is None
    assert found["run_test_loss"] is None
    assert found["sequence_length"] == 16


def test_an_earlier_export_is_replaced_whole(run: Path, tmp_path: Path) -> None:
    done(run, tmp_path / "out")
    done(run, tmp_path / "out", format="bf16")

    assert {path.name for path in (tmp_path / "out").iterdir()} == {"bf16", "export.json", "export.md", "export.png"}


def test_a_fault_leaves_nothing_behind(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done(run, tmp_path / "out", format="pot")
    before = (tmp_path / "out" / "export.json").read_bytes()

    def fails(*arguments: Any) -> None:
        raise OSError(28, "No space left on device", "file")

    monkeypatch.setattr("trainpilot.experiments.export.command.draw_export", fails)
    with pytest.raises(OSError, match="No space left"):
        done(run, tmp_path / "out", format="bf16")

    assert (tmp_path / "out" / "export.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["trainpilot", "export", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--format", "int5"), "format must be all, or among bf16, int8,"),
        (("--sequence-length", "65"), "sequence_length must be in [1, 64], the model's context in tokens, got 65"),
        (("--prompt-tokens", "60", "--new-tokens", "4"), "prompt_tokens + new_tokens must stay below the model's"),
        (("--new-tokens", "0"), "new_tokens must be a whole number of at least 1, got 0"),
        (("--text", "nowhere.txt"), "text must be an existing file, folder or glob"),
        (("--device", "abacus"), "device must be auto, cpu, cuda or mps, got 'abacus'"),
    ],
)
def test_bad_options_are_one_line(
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(run.parent)
    assert call(monkeypatch, run, "--out", "out", *options) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (run.parent / "out").exists()


def test_a_missing_package_is_one_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    assert call(monkeypatch, run, "--format", "bf16,gguf-q4", "--out", tmp_path / "out") == 2
    assert capsys.readouterr().err == (
        "trainpilot: format 'gguf-q4' needs the package gguf, got no such package; "
        'run: pip install "trainpilot[export]", or leave it out of --format\n'
    )
    assert not (tmp_path / "out").exists()


def write_run(place: Path, **summary: Any) -> None:
    place.mkdir()
    (place / "config.json").write_text(json.dumps({"model": "llama-nano", "sequence_length": 8}))
    if summary:
        (place / "summary.json").write_text(json.dumps(summary))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda place: None, "which is no folder"),
        (lambda place: place.mkdir(), "which is neither"),
        (lambda place: write_run(place, diverged=True), "has left no model/, as it diverged"),
        (write_run, "has left no model/, as it is not finished; run the same replay again"),
    ],
)
def test_a_folder_without_a_model_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], make: Any, message: str
) -> None:
    make(tmp_path / "source")
    assert call(monkeypatch, tmp_path / "source", "--out", tmp_path / "out") == 2
    assert message in capsys.readouterr().err


def test_no_other_folder_is_replaced(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (run.parent / "export.json").write_text("{}")

    assert call(monkeypatch, run, "--out", tmp_path / "mine") == 2
    assert "out must be new, empty or an earlier export" in capsys.readouterr().err
    assert call(monkeypatch, run, "--out", run.parent) == 2
    assert "out must not hold the model that is read" in capsys.readouterr().err
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
