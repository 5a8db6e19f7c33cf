"""`trainpilot cut` writes a smaller model and its figures, or nothing and one line."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from live_runs import GPT2, LLAMA, text_by_rule
from rich.console import Console
from transformers import AutoModelForCausalLM

from trainpilot.experiments import cli
from trainpilot.experiments import cut as command
from trainpilot.experiments.cut import CutResult, cut
from trainpilot.experiments.export import source
from trainpilot.experiments.options import CutOptions, ReplayOptions
from trainpilot.experiments.replay import replay
from trainpilot.llm_runtime import live_run
from trainpilot.llm_runtime.models import load_model

MODEL = LLAMA | {"intermediate_size": 64, "num_key_value_heads": 2}


@pytest.fixture(scope="module", autouse=True)
def _short_evaluations() -> Iterator[None]:
    """Let evaluations take few tokens, the same in runs and in cuts."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (live_run, source):
            patch.setattr(module, "MIN_EVALUATION_TOKENS", 512)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run."""
    place = tmp_path_factory.mktemp("run")
    (place / "text.txt").write_text(text_by_rule(20_000), encoding="utf-8")
    (place / "model.json").write_text(json.dumps(MODEL), encoding="utf-8")
    replayed(place, place / "finished", model=str(place / "model.json"))
    return place / "finished"


def replayed(place: Path, out: Path, **options: Any) -> dict[str, Any]:
    usual: dict[str, Any] = {"tokens": 6_400, "batch_size": 4, "sequence_length": 16, "decisions": 4, "threads": 1}
    usual |= {"text": (str(place / "text.txt"),), "base_learning_rate": 1e-2, "device": "cpu", "probe": False}
    return replay(ReplayOptions(**(usual | {"out": out} | options)), Console(file=io.StringIO()))


def done(run: Path, out: Path, **options: Any) -> tuple[CutResult, str]:
    console = Console(file=io.StringIO(), width=100)
    result = cut(CutOptions(path=run, out=out, threads=1, device="cpu", **options), console)
    assert isinstance(console.file, io.StringIO)
    return result, console.file.getvalue()


def test_a_cut_model_loads_plain_and_learns_from_its_origin(run: Path, tmp_path: Path) -> None:
    result, said = done(run, tmp_path / "out", ffn=0.5, heads=0.5, depth=0.5)

    written = json.loads((tmp_path / "out" / "cut.json").read_text(encoding="utf-8"))
    assert written["after"]["sizes"] == {"ffn": 32, "heads": 1, "depth": 1}
    assert written["before"]["test_loss"] == pytest.approx(
        json.loads((run / "summary.json").read_text())["final_test_loss"], abs=1e-5
    )
    assert len(written["cuts"]) == 3
    assert CutResult.from_json(written).to_json() == result.to_json()
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sum(p.numel() for p in model.parameters()) == written["after"]["n_parameters"]
    assert (model.config.num_hidden_layers, model.config.intermediate_size) == (1, 32)
    assert model.generate(torch.tensor([[116, 104]]), max_new_tokens=3, do_sample=False).shape[1] == 5
    assert f"{result.after.test_loss:.4f}" in said
    assert f"replay --model {tmp_path / 'out'} --teacher {run}" in said

    summary = replayed(run.parent, tmp_path / "learned", model=str(tmp_path / "out"), teacher=str(run))
    assert summary["teacher_parameters"] == result.before.n_parameters
    assert summary["distillation_weight"] == 0.5
    assert summary["initial_validation_loss"] == pytest.approx(result.after.validation_loss, abs=1e-4)
    assert summary["final_test_loss"] < result.after.test_loss


def test_a_share_of_the_parameters_replaces_an_earlier_cut(run: Path, tmp_path: Path) -> None:
    done(run, tmp_path / "out", ffn=0.5)
    (tmp_path / "out" / "old").touch()

    result, _ = done(run, tmp_path / "out", parameters=0.8)

    assert result.after.n_parameters <= 0.8 * result.before.n_parameters
    assert not (tmp_path / "out" / "old").exists()


def test_a_model_folder_is_cut_as_far_as_its_architecture_allows(run: Path, tmp_path: Path) -> None:
    (tmp_path / "gpt2.json").write_text(json.dumps(GPT2), encoding="utf-8")
    load_model(str(tmp_path / "gpt2.json"), 0).save(tmp_path / "gpt2")
    own: dict[str, Any] = {"text": (str(run.parent / "text.txt"),), "sequence_length": 16}

    result, _ = done(tmp_path / "gpt2", tmp_path / "out", ffn=0.5, depth=0.5, **own)

    assert result.after.sizes == {"ffn": 32, "depth": 1}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.n_layer == 1
    with pytest.raises(ValueError, match=r"heads can only be cut in .*, got 'gpt2'; .*; leave --heads out"):
        done(tmp_path / "gpt2", tmp_path / "none", heads=0.5, **own)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "one of ffn, heads, depth and parameters must be given, got none"),
        (("--ffn", "1.0"), "ffn must be in (0, 1), got 1.0"),
        (("--depth", "0.9"), "depth must leave fewer than all 2 blocks, got 0.9, which leaves all"),
        (("--parameters", "1000000"), "got 1,000,000"),
        (("--parameters", "2"), "what is left once ffn, heads, depth are cut as far as they may be, got 2"),
        (("--ffn", "0.5", "--out", "taken"), "out must be new, empty or an earlier cut, got taken"),
        (("--ffn", "0.5", "--out", "."), "out must not hold the model that is read"),
    ],
)
def test_what_cannot_be_cut_ends_with_one_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").touch()
    monkeypatch.chdir(tmp_path if arguments[-1:] != (".",) else run.parent)
    out = () if "--out" in arguments else ("--out", "out")
    monkeypatch.setattr(sys, "argv", ["trainpilot", "cut", str(run), *arguments, *out, "--device", "cpu"])
    error = io.StringIO()
    with contextlib.redirect_stderr(error), pytest.raises(SystemExit) as stop:
        cli.main()
    said = error.getvalue()
    assert stop.value.code == 2
    assert message in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_fault_while_writing_leaves_nothing_behind(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(command, "write_json", broken)
    with pytest.raises(OSError, match="No space left"):
        done(run, tmp_path / "out", ffn=0.5)
    assert list(tmp_path.iterdir()) == []
