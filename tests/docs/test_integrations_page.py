"""Every snippet of docs/integrations.md runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from live_runs import LLAMA, case, live_run
from torch.nn import functional as F

from trainpilot.llm_runtime.data.batches import BatchStream

PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"
SNIPPETS = re.findall(r"^## (.+?)$(.*?)(?=^## |\Z)", PAGE.read_text(encoding="utf-8"), flags=re.M | re.S)
CODE = [(title, re.findall(r"```python\n(.*?)```", text, flags=re.S)) for title, text in SNIPPETS]
NEEDS = {"Hugging Face Trainer": "accelerate", "Accelerate": "accelerate", "Lightning": "lightning"}


def loss_of(model: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def around(folder: Path) -> dict[str, Any]:
    """Return what the page takes for granted: a model, data, an optimiser and settings."""
    from trainpilot.agents.steering.settings import SteeringSettings
    from trainpilot.agents.steering.steering import Steering

    run = live_run(case(folder, LLAMA))
    stream = BatchStream(run.corpus.train, 32, 0)
    model = run.loaded.model.train()
    dataset = [{"input_ids": row, "labels": row} for row in torch.from_numpy(stream.take(1_000))[:, :-1]]
    settings = SteeringSettings(sequences=1_600, batch_size=8)
    known: dict[str, Any] = {"model": model, "dataset": dataset, "out": str(folder / "out"), "settings": settings}
    known |= {"loss_of": loss_of, "take": lambda n: torch.from_numpy(stream.take(n)), "Steering": Steering}
    known |= {"SteeringSettings": SteeringSettings, "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3)}
    known["loader"] = torch.utils.data.DataLoader(known["dataset"], batch_size=8)
    return known


def with_module(known: dict[str, Any]) -> dict[str, Any]:
    import lightning.pytorch as pl

    model = known["model"]

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: dict[str, torch.Tensor], _index: int) -> torch.Tensor:
            loss: torch.Tensor = self.model(**batch).loss
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    return known | {"module": Module()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("title", [title for title, code in CODE if code and title != "Several processes"])
def test_a_section_s_snippets_run_one_after_the_other(title: str, tmp_path: Path) -> None:
    if title in NEEDS:
        pytest.importorskip(NEEDS[title])
    known = around(tmp_path)
    if title == "Lightning":
        known = with_module(known)
    for snippet in dict(CODE)[title]:
        exec(compile(snippet, title, "exec"), known)


def test_the_page_has_a_snippet_for_every_form() -> None:
    assert {"A plain PyTorch loop", "Hugging Face Trainer", "Lightning", "Guardrails", "Quality contract"} <= {
        title for title, code in CODE if code
    }
    assert "## When not to use it" in PAGE.read_text(encoding="utf-8")
