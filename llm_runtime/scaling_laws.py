"""Predict the best learning rate and batch of a model from its size and its budget, by published scaling laws.

    advice = step_law(n_parameters=500e6, tokens=10e9)
    advice.learning_rate, advice.batch_tokens                  # 1.3e-3, 0.30 M tokens

The law was fitted to transformers of up to 1 B parameters, trained from scratch with AdamW on billions of tokens. It is
good for a start without a sweep: there its authors found the loss at its advice within 0.1 % of the best. Below 100 M
parameters it is extrapolated: at 0.2 M the batch is of the right order, and the learning rate 2 to 10 times too high.
It says nothing of fine-tuning.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from trainpilot.llm_runtime.config import STEPS_PER_INTERVAL
from trainpilot.llm_runtime.schedules import neutral_factor


@dataclass(frozen=True, kw_only=True)
class Advice:
    """What a scaling law advises for a run."""

    learning_rate: float
    """Peak learning rate of AdamW at the advised batch."""
    batch_tokens: float
    """Batch, in tokens."""

    def batch_size(self, *, sequence_length: int, n_sequences: int, decisions: int) -> int:
        """Return the power of two of sequences that is nearest to the advised batch and leaves an interval its steps.

        Args:
            sequence_length: Tokens per sequence.
            n_sequences: Budget in sequences.
            decisions: Decisions in the run.
        """
        most = max(n_sequences // decisions // STEPS_PER_INTERVAL, 1)
        wanted = max(round(math.log2(self.batch_tokens / sequence_length)), 0)
        return int(2 ** min(wanted, int(math.log2(most))))

    def learning_rate_at(self, batch_tokens: float) -> float:
        """Return the learning rate at another batch: neutrally lower at a smaller one, and no higher at a larger one.

        In sweeps of 215 M to 1.07 B parameters the best learning rate rises with the batch below the best batch, and
        hardly above it.
        """
        return self.learning_rate * min(neutral_factor(batch_tokens, self.batch_tokens), 1.0)


def step_law(n_parameters: float, tokens: float) -> Advice:
    """Return what Step Law advises: learning rate e^0.586 N^-0.713 D^0.307, batch e^-0.544 D^0.571 tokens.

    Source: Li et al. 2025, arXiv 2503.04715.

    Args:
        n_parameters: Parameters N of the model without those of its vocabulary (embeddings and output layer).
        tokens: Budget D in tokens.

    Raises:
        ValueError: one of the two is not a positive number.
    """
    for name, value in (("n_parameters", n_parameters), ("tokens", tokens)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be a positive number, got {value!r}")
    return Advice(
        learning_rate=math.exp(0.586) * n_parameters**-0.713 * tokens**0.307,
        batch_tokens=math.exp(-0.544) * tokens**0.571,
    )
