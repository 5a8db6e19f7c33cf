"""Weigh quality, energy and time against each other: one number per objective, part of the observation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Preference:
    """Weights on the three objectives; only their ratios count."""

    quality: float = 0.7
    """Weight of the loss reached, as compute-equivalent."""
    energy: float = 0.15
    """Weight of joules, relative to the reference run."""
    time: float = 0.15
    """Weight of seconds, relative to the reference run."""

    def __post_init__(self) -> None:
        weights = {"quality": self.quality, "energy": self.energy, "time": self.time}
        for name, weight in weights.items():
            if not (np.isfinite(weight) and weight >= 0):
                raise ValueError(f"preference {name} must be a number >= 0, got {weight}")
        if sum(weights.values()) <= 0:
            raise ValueError(
                "preference must have one weight above 0, got only zeros; try quality=0.7,energy=0.15,time=0.15"
            )

    def weights(self) -> np.ndarray:
        """Return the weights (quality, energy, time), float64 of shape (3,), which sum to 1."""
        weights = np.array([self.quality, self.energy, self.time], dtype=np.float64)
        weights /= weights.sum()
        return weights

    @classmethod
    def parse(cls, text: str) -> Preference:
        """Read `quality=0.7,energy=0.2,time=0.1`; what is not named weighs nothing.

        Raises:
            ValueError: an unknown name, or a weight that is not a number.
        """
        weights = {"quality": 0.0, "energy": 0.0, "time": 0.0}
        for part in text.split(","):
            name, equals, value = part.partition("=")
            if name.strip() not in weights or not equals:
                raise ValueError(f"preference must look like quality=0.7,energy=0.15,time=0.15, got {text!r}")
            try:
                weights[name.strip()] = float(value)
            except ValueError:
                raise ValueError(f"preference {name.strip()} must be a number, got {value!r}") from None
        return cls(**weights)

    @classmethod
    def draw(cls, random: np.random.Generator) -> Preference:
        """Draw a preference for training: quality weighs at least half, the rest is shared at random."""
        quality = float(random.uniform(0.5, 1.0))
        energy = float(random.uniform(0.0, 1.0 - quality))
        return cls(quality=quality, energy=energy, time=1.0 - quality - energy)

    def __str__(self) -> str:
        quality, energy, time = self.weights()
        return f"quality={quality:.3g},energy={energy:.3g},time={time:.3g}"
