"""Define the cost table: seconds and joules of the parts of a run on one device, interpolated between measurements.

Measured seconds and joules of a real run are affected by other programs. A run's modelled cost is not: it is the number
of its steps, passes and switches times this table, which `costs.measure` fills. This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from trainpilot.llm_runtime.energy.meter import EnergySource
from trainpilot.llm_runtime.json_records import JsonRecord
from trainpilot.llm_runtime.schedules import PROBE_PASSES
from trainpilot.llm_runtime.timing import Cost

WITHOUT_EXTRA = ("adamw", "none", "width")
"""Optimiser and kinds of pruning whose costs are part of the table's rows."""


NOTHING = Cost(time_s=0.0, energy_j=0.0)


@dataclass(frozen=True, kw_only=True)
class CostRow(JsonRecord):
    """One setting that was measured."""

    kind: Literal["step", "forward"]
    """An optimiser step of AdamW (forward, backward, clipping, update), or the forward pass of an evaluation."""
    precision: str
    """Number format of the matrix products; evaluations are always in fp32."""
    batch_size: int
    """Sequences per pass."""
    removed: float = 0.0
    """Share of the feed-forward channels removed."""
    cost: Cost


@dataclass(frozen=True, kw_only=True)
class CostTable(JsonRecord):
    """Costs of the parts of a run on one device, for one model and one sequence length.

    Costs are piecewise linear in the batch size and linear in the share of removed channels, and are extrapolated
    linearly. Two bounds keep noise from distorting the extrapolation in the batch size: a smaller pass costs at least
    as much per sequence as the smallest measured one, and a larger pass at least as much as the largest.
    """

    device: str
    """Device, its cores and the threads in use, for display."""
    model: str
    """As `RunConfig.model`, for display."""
    sequence_length: int
    """Tokens per sequence."""
    energy_source: EnergySource | None
    """Source of the joules; `None` without a meter."""
    rows: tuple[CostRow, ...]
    probe_overhead: Cost
    """Cost of a curvature probe without its forward passes: the update's direction, and copies of the weights."""
    extras: Mapping[str, Cost] = field(default_factory=dict)
    """Extra cost of a step over AdamW's, by optimiser and by kind of weight masks."""
    switches: Mapping[str, Cost] = field(default_factory=dict)
    """Cost of one change of `batch` or `precision`, and of raising the sparsity in an interval by kind of pruning."""
    rounds: int
    """Number of visits per setting."""
    spread: float
    """Slowest over fastest visit, as a median over the settings: well above 1 on a busy machine."""

    def step(
        self,
        batch_size: float,
        precision: str,
        *,
        removed: float = 0.0,
        optimizer: str = "adamw",
        pruning: str = "none",
    ) -> Cost:
        """Return the cost of an optimiser step.

        Args:
            batch_size: Sequences per step; may be a mean over steps.
            precision: Number format of the matrix products.
            removed: Share of the feed-forward channels removed.
            optimizer: As `RunConfig.optimizer`.
            pruning: `magnitude` or `evolution` where weights are masked, otherwise `none` or `width`.

        Raises:
            ValueError: the table was measured without that precision, optimiser or kind of pruning.
        """
        cost = self._between("step", precision, batch_size, removed)
        return cost + self._extra("optimizer", optimizer) + self._extra("pruning", pruning)

    def evaluation(self, sequences: int, batch_size: float, *, removed: float = 0.0) -> Cost:
        """Return the cost of evaluating the loss of `sequences` in batches of `batch_size`."""
        batch = max(round(batch_size), 1)
        full, rest = divmod(sequences, batch)
        cost = self._between("forward", "fp32", batch, removed) * full
        return cost + self._between("forward", "fp32", rest, removed) if rest else cost

    def probe(self, sequences: int, batch_size: float, *, removed: float = 0.0) -> Cost:
        """Return the cost of a curvature probe on `sequences`."""
        return self.evaluation(sequences, batch_size, removed=removed) * PROBE_PASSES + self.probe_overhead

    def switch(self, name: str) -> Cost:
        """Return the cost of a switch: `batch`, `precision`, or a kind of pruning; zero if it was not measured."""
        return self.switches.get(name, NOTHING)

    @cached_property
    def _levels(self) -> Mapping[tuple[str, str], Mapping[float, list[tuple[float, Cost]]]]:
        """Costs by ascending batch size, for each kind and precision and each share of removed channels."""
        levels: dict[tuple[str, str], dict[float, list[tuple[float, Cost]]]] = {}
        for row in sorted(self.rows, key=lambda row: (row.removed, row.batch_size)):
            found = levels.setdefault((row.kind, row.precision), {})
            found.setdefault(row.removed, []).append((row.batch_size, row.cost))
        return levels

    def _between(self, kind: str, precision: str, batch_size: float, removed: float) -> Cost:
        levels = self._levels.get((kind, precision))
        if levels is None:
            measured = ", ".join(name for kind_, name in self._levels if kind_ == kind)
            raise ValueError(
                f"precision must be one that the cost table has for a {kind} ({measured}), got {precision!r}; "
                "measure the table with it"
            )
        points = [(level, _at_batch(batches, batch_size)) for level, batches in levels.items()]
        if len(points) > 1:
            return _along(points, removed)
        if removed != points[0][0]:
            raise ValueError(
                f"removed must be {points[0][0]} in a cost table of one width, got {removed}; "
                "measure the table with pruning 'width'"
            )
        return points[0][1]

    def _extra(self, setting: str, name: str) -> Cost:
        if name in WITHOUT_EXTRA:
            return NOTHING
        if name not in self.extras:
            raise ValueError(
                f"{setting} must be one that the cost table has ({', '.join((*WITHOUT_EXTRA, *self.extras))}), "
                f"got {name!r}; measure the table with it"
            )
        return self.extras[name]


def _at_batch(points: Sequence[tuple[float, Cost]], batch_size: float) -> Cost:
    """Interpolate the cost at a batch size; with a single measured batch size, the cost is proportional."""
    (first, least), (last, most) = points[0], points[-1]
    cost = _along(points if len(points) > 1 else [(0.0, least * 0.0), *points], batch_size)
    if batch_size < first:
        return max(cost, least * (batch_size / first), key=_time)
    return max(cost, most, key=_time) if batch_size > last else cost


def _along(points: Sequence[tuple[float, Cost]], position: float) -> Cost:
    """Interpolate linearly at `position`, or extrapolate from the two nearest points."""
    right = next((index for index in range(1, len(points) - 1) if position < points[index][0]), len(points) - 1)
    (x0, before), (x1, after) = points[right - 1], points[right]
    share = (position - x0) / (x1 - x0)
    return before * (1 - share) + after * share


def _time(cost: Cost) -> float:
    return cost.time_s
