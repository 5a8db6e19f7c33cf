"""Twenty losses of one small run on a CPU, kept in a file: a change of the code that should not move them does not.

If a change is meant to move them, write the file anew, look at the difference, and say why in the pull request:

    .venv/bin/python tests/test_golden_losses.py
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
from live_runs import advance, case, live_run

GOLDEN = Path(__file__).parents[1] / "golden" / "llama_nano_cpu.json"


def golden_losses(folder: Path) -> list[float]:
    """Return the losses of a llama-nano: ten steps of 4 sequences, ten of 8, each in an interval of its own."""
    options = {"tokens": (10 * 4 + 10 * 8) * 32, "batch_size": 4, "sequence_length": 32, "decisions": 30}
    run = live_run(case(folder, "llama-nano", base_learning_rate=2e-3, warmup_tokens=512, **options), probe=True)
    losses = [advance(run, batch_size=batch_size).train_loss for batch_size in [4] * 10 + [8] * 10]
    assert run.finished
    return losses


def test_losses_are_those_on_file(tmp_path: Path) -> None:
    expected = json.loads(GOLDEN.read_text(encoding="utf-8"))

    losses = golden_losses(tmp_path)

    # Kernels differ from CPU to CPU in the last bits: one float32 rounding for each of the twenty steps.
    assert losses == pytest.approx(expected["losses"], rel=20 * torch.finfo(torch.float32).eps)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        content = {"torch": torch.__version__, "losses": golden_losses(Path(made))}
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
