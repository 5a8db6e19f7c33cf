"""Policies that mean harm, and a training run of seconds to set them on: shared by the benchmark and the tests.

The run is a plain network of 50,000 weights that predicts the next byte of Python's own documentation from the eight
before it, at the rate tuned for it. `HOSTILE` names the policies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainpilot.agents.bundle import BaseSchedule, PolicyBundle, policy_path
from trainpilot.agents.controller import Policy
from trainpilot.agents.steering.settings import SteeringSettings
from trainpilot.agents.steering.steering import Steering
from trainpilot.envs.action import ACTION_FIELDS, KEEP, N_CHOICES, Action
from trainpilot.llm_runtime.energy.meter import NoMeter

SEQUENCES, BATCH, LENGTH, CONTEXT, DECISIONS = 2_400, 8, 32, 8, 50
TUNED_RATE = 1.6e-2
"""Learning rate at which the base schedule ends lowest, of powers of two (`benchmarks/hostile_policies.py --tune`)."""
BASE = BaseSchedule(schedule="wsd", warmup_share=0.1)


def _only(name: str, choice: int, action: Action = KEEP) -> Action:
    """Return an action with another choice of one control."""
    return tuple(choice if each.name == name else own for each, own in zip(ACTION_FIELDS, action, strict=True))


UP, DOWN = _only("learning_rate", 6), _only("learning_rate", 0)
SMALLER, LARGER = _only("batch_size", 0), _only("batch_size", 2)
FINISH = _only("finish", 1)


class Scripted:
    """A policy that knows nothing but the number of its decision.

    Args:
        action: Returns the action of a decision, by its number.
    """

    def __init__(self, action: Callable[[int], Action]) -> None:
        self.action, self.decision = action, -1

    def __call__(self, observation: np.ndarray, masks: np.ndarray) -> Action:
        """Return the action of the next decision."""
        self.decision += 1
        return self.action(self.decision)


def _drawn(seed: int, finishes: bool) -> Policy:
    random = np.random.default_rng(seed)

    def action(_: int) -> Action:
        drawn = tuple(int(random.integers(n)) for n in N_CHOICES)
        return drawn if finishes else _only("finish", 0, drawn)

    return Scripted(action)


def _walks(seed: int) -> Policy:
    """Return a policy that walks in one direction for some decisions, and then in another."""
    random = np.random.default_rng(seed)
    ways = [(int(random.choice([0, 3, 6])), int(random.integers(3)), 0, 0, 0) for _ in range(DECISIONS)]
    lengths = random.integers(2, 8, size=DECISIONS)
    plan = [way for way, length in zip(ways, lengths, strict=True) for _ in range(length)]
    return Scripted(lambda decision: plan[decision])


HOSTILE: Mapping[str, Callable[[int], Policy]] = {
    "always up": lambda seed: Scripted(lambda i: UP),
    "up, smallest batch": lambda seed: Scripted(lambda i: (6, 0, 0, 0, 0)),
    "largest batch": lambda seed: Scripted(lambda i: LARGER),
    "smallest batch": lambda seed: Scripted(lambda i: SMALLER),
    "always down": lambda seed: Scripted(lambda i: DOWN),
    "down, largest batch": lambda seed: Scripted(lambda i: (0, 2, 0, 0, 0)),
    "random": lambda seed: _drawn(seed, finishes=True),
    "random, no finish": lambda seed: _drawn(seed, finishes=False),
    "random walks": _walks,
    "flips": lambda seed: Scripted(lambda i: UP if i % 2 else DOWN),
    "flips slowly": lambda seed: Scripted(lambda i: UP if i // 4 % 2 == 0 else DOWN),
    "flips the batch": lambda seed: Scripted(lambda i: LARGER if i // 3 % 2 else SMALLER),
    "two up, one down": lambda seed: Scripted(lambda i: DOWN if i % 3 == 2 else UP),
    "creeps up": lambda seed: Scripted(lambda i: (4, *KEEP[1:])),
    "creeps down": lambda seed: Scripted(lambda i: (2, *KEEP[1:])),
    "finish early": lambda seed: Scripted(lambda i: FINISH),
    "up, then finish": lambda seed: Scripted(lambda i: UP if i < 12 else FINISH),
    "down, then finish": lambda seed: Scripted(lambda i: DOWN if i < 12 else FINISH),
    "up from 10": lambda seed: Scripted(lambda i: UP if i >= 10 else KEEP),
    "up from 25": lambda seed: Scripted(lambda i: UP if i >= 25 else KEEP),
    "up from 40": lambda seed: Scripted(lambda i: UP if i >= 40 else KEEP),
    "down from 10": lambda seed: Scripted(lambda i: DOWN if i >= 10 else KEEP),
    "down from 25": lambda seed: Scripted(lambda i: DOWN if i >= 25 else KEEP),
    "up, down, up": lambda seed: Scripted(lambda i: DOWN if 12 <= i < 24 else UP),
    "down, then up": lambda seed: Scripted(lambda i: DOWN if i < 12 else UP),
    "pumps the batch": lambda seed: Scripted(lambda i: (6, 2, 0, 0, 0) if i // 4 % 2 else (3, 0, 0, 0, 0)),
}
"""Hostile policies by name; each takes a seed, which only the random ones use."""


def default(_: int) -> PolicyBundle:
    """Return the shipped policy."""
    return PolicyBundle.load(policy_path("default"))


@dataclass
class Bytes:
    """Rows of text in an order that a seed decides, and that goes back to where its state was taken."""

    rows: Tensor
    """Byte values, shape (n_rows, CONTEXT + LENGTH)."""
    seed: int
    at: int = 0
    """Rows handed out."""

    def take(self, count: int) -> Tensor:
        """Return the next rows, shape (count, CONTEXT + LENGTH)."""
        places = [(self.seed * 7_919 + (self.at + i) * 104_729) % len(self.rows) for i in range(count)]
        self.at += count
        return self.rows[places]

    def state_dict(self) -> dict[str, Any]:
        """Return the position."""
        return {"at": self.at}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a position that `state_dict` returned."""
        self.at = state["at"]


@cache
def text_rows() -> tuple[Tensor, Tensor]:
    """Return rows of text to train on and to validate on, each of shape (n_rows, CONTEXT + LENGTH)."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics)).encode()
    width = CONTEXT + LENGTH
    rows = torch.from_numpy(np.frombuffer(text, dtype=np.uint8)[: len(text) // width * width].copy()).view(-1, width)
    held_out = torch.arange(len(rows)) % 20 == 0
    return rows[~held_out].long(), rows[held_out].long()


class NextByte(nn.Module):
    """Predicts each byte from the `CONTEXT` before it."""

    def __init__(self, hidden: int = 128) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, 16)
        self.inner = nn.Linear(CONTEXT * 16, hidden)
        self.out = nn.Linear(hidden, 256)

    def forward(self, rows: Tensor) -> Tensor:
        """Return the mean loss over rows of shape (n_rows, CONTEXT + LENGTH), in nats/token."""
        windows = rows[:, :-1].unfold(1, CONTEXT, 1)  # (n_rows, LENGTH, CONTEXT)
        inner = torch.tanh(self.inner(self.embed(windows).flatten(2)))
        return F.cross_entropy(self.out(inner).flatten(0, 1), rows[:, CONTEXT:].flatten())


class SmallRun:
    """A steered run of the small network.

    Args:
        policy: As `SteeringSettings.policy`.
        seed: Decides the initial weights and the order of the data.
        rate: Learning rate over the tuned one.
        rewinds: Whether a rollback takes the data back too.
        options: Further fields of `SteeringSettings`.
    """

    def __init__(self, policy: Any, seed: int = 0, *, rate: float = 1.0, rewinds: bool = False, **options: Any) -> None:
        torch.manual_seed(seed)
        self.model = NextByte()
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=TUNED_RATE * rate, betas=(0.9, 0.95), fused=True)
        train, self.validation = text_rows()
        self.data = Bytes(train, seed)
        settings = {
            "sequences": SEQUENCES, "batch_size": BATCH, "sequence_length": LENGTH, "decisions": DECISIONS,
            "base_schedule": BASE, "probe": True, "policy": policy,
        }  # fmt: skip
        self.steering = Steering(
            self.model,
            optimizer,
            SteeringSettings(**settings | options),
            meter=NoMeter("a small run"),
            data=self.data if rewinds else None,
        )
        self.taken = 0
        """Sequences that were trained on, those of intervals that were taken back included."""

    def train(self, spoil: Callable[[int, Tensor], Tensor] | None = None) -> float:
        """Train to the end, and return the validation loss.

        Args:
            spoil: Returns what is trained on from the number of a step and the rows that are due.
        """
        number = 0
        while not self.steering.finished:
            with self.steering.step() as step:
                rows = self.data.take(step.batch_size)
                if spoil is not None:
                    rows = spoil(number, rows)
                step.backward(self.model, batch=rows)
                self.taken += step.batch_size
            number += 1
        with torch.no_grad():
            loss = float(self.model(self.validation))
        return loss
