"""What the checks on a GPU are made with: two models of 30 M and 120 M parameters, their text, and a dry run's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from trainpilot.experiments.compare.cases import model_file
from trainpilot.llm_runtime.config import Precision, RunConfig

STARTS = (0.1, 1.0, 10.0)
"""Starting learning rates over the sweep's best."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model that is trained from scratch on bytes, and its budget."""

    model: Mapping[str, Any]
    """A transformers config."""
    tokens: int
    rates: tuple[float, ...]
    """Learning rates that the sweep begins with, rising, a factor of 2 apart."""


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """The live runs that a policy goes on learning from: another model and another text than the judged ones."""

    model: Mapping[str, Any]
    text: str
    tokens: int
    learning_rate: float = 1e-3
    """Of the reference runs, not tuned; the runs themselves start at `STARTS` times it."""
    decisions: int = 600
    n_steps: int = 100
    """Decisions between two updates."""


@dataclass(frozen=True, kw_only=True)
class Bed:
    """Everything that the figures depend on, but for the policy."""

    sizes: Mapping[str, Size]
    text: str
    text_said: str
    """The text without a path of this machine."""
    batch_size: int
    sequence_length: int
    device: str
    tuning: FineTuning

    def config(self, name: str, precision: Precision = "fp32") -> RunConfig:
        """Return the run of a model; schedule, learning rate and seed are set by whoever asks for runs."""
        size = self.sizes[name]
        return self._config(size.model, self.text, size.tokens, size.rates[len(size.rates) // 2], precision)

    def tuning_config(self, precision: Precision = "fp32") -> RunConfig:
        """Return the run that a policy is fine-tuned on."""
        tuning = self.tuning
        return self._config(tuning.model, tuning.text, tuning.tokens, tuning.learning_rate, precision)

    def _config(self, model: Mapping[str, Any], text: str, tokens: int, rate: float, precision: Precision) -> RunConfig:
        return RunConfig(
            model=str(model_file(model)),
            text=(text,),
            tokens=tokens,
            batch_size=self.batch_size,
            sequence_length=self.sequence_length,
            base_learning_rate=rate,
            precision=precision,
            device=self.device,
        )

    def smaller(self, budget: float, names: tuple[str, ...] = ()) -> Bed:
        """Return the same with all budgets times `budget`, and with the models of these names only.

        Raises:
            ValueError: an unknown name, or a budget that is not positive.
        """
        if not budget > 0:
            raise ValueError(f"budget must be a positive factor, got {budget}")
        if unknown := [name for name in names if name not in self.sizes]:
            raise ValueError(f"models must be among {', '.join(self.sizes)}, got {unknown[0]!r}")
        sizes = {name: self.sizes[name] for name in names or self.sizes}
        sizes = {name: replace(size, tokens=round(size.tokens * budget)) for name, size in sizes.items()}
        return replace(
            self, sizes=sizes, tuning=replace(self.tuning, tokens=round(self.tuning.tokens * budget))
        )  # fmt: skip


def _llama(hidden: int, width: int, layers: int, heads: int, context: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": context,
        "tie_word_embeddings": False,
        "attention_dropout": 0.0,
    }


def _gpt2(hidden: int, layers: int, heads: int, context: int) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "n_embd": hidden,
        "n_layer": layers,
        "n_head": heads,
        "n_positions": context,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }


def full_bed() -> Bed:
    """Return the bed for a GPU: each run of the two models is meant to take about a minute on an H100.

    The judged text, torch's own Python sources, is long enough that no run of the whole budget sees a byte twice.
    """
    return Bed(
        sizes={
            "llama-30m": Size(
                model=_llama(512, 1408, 9, 8, 1024), tokens=32_768_000, rates=(5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
            ),
            "llama-120m": Size(
                model=_llama(1024, 2816, 9, 16, 1024), tokens=16_384_000, rates=(2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)
            ),
        },
        text=str(Path(torch.__file__).parent / "**" / "*.py"),
        text_said=f"the Python sources of torch {torch.__version__}",
        batch_size=32,
        sequence_length=512,
        device="cuda",
        tuning=FineTuning(model=_gpt2(512, 9, 8, 1024), text="stdlib", tokens=8_192_000),
    )


def tiny_bed(device: str) -> Bed:
    """Return the bed of a dry run, which shows that everything runs and nothing else."""
    return Bed(
        sizes={
            "llama-tiny": Size(model=_llama(16, 32, 1, 2, 64), tokens=12_800, rates=(2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2))
        },
        text="stdlib:json",
        text_said="stdlib:json",
        batch_size=16,
        sequence_length=16,
        device=device,
        tuning=FineTuning(model=_gpt2(16, 1, 2, 64), text="stdlib:logging", tokens=12_800, decisions=60, n_steps=30),
    )
