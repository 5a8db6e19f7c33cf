"""Hold what the parts of a run cost on one device, and interpolate between the settings that were measured.

Seconds and joules of a real run hold whatever else the machine did meanwhile. A run's modelled cost does not: it is
what the run did (steps, passes, switches) times this table, which `costs.measure` fills. Knows no torch.
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
"""The optimiser and the ways of pruning that the table's rows already hold."""


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
    """What the parts of a run cost on one device, for one model and one sequence length.

    Between the measured batch sizes a cost is piecewise linear in the batch, and it is linear in the share of removed
    channels. Outside, the outermost piece goes on. Beyond the batches two bounds hold that noise could break: a
    smaller pass costs no less per sequence than the smallest measured, a larger one no less than the largest.
    """

    device: str
    """Device, its cores and the threads in use, for people."""
    model: str
    """As `RunConfig.model`, for people."""
    sequence_length: int
    """Tokens per sequence."""
    energy_source: EnergySource | None
    """Where the joules come from; `None` without a meter."""
    rows: tuple[CostRow, ...]
    probe_overhead: Cost
    """A curvature probe without its forward passes: the update's direction, and copies of the weights."""
    extras: Mapping[str, Cost] = field(default_factory=dict)
    """What a step costs more than AdamW's, by optimiser and by kind of weight masks."""
    switches: Mapping[str, Cost] = field(default_factory=dict)
    """One change of `batch` or `precision`, and what raising the sparsity costs an interval, by kind of pruning."""
    rounds: int
    """How often each setting was visited."""
    spread: float
    """Slowest over fastest visit, median over the settings: well above 1 on a busy machine."""

    def step(
        self,
        batch_size: float,
        precision: str,
        *,
        removed: float = 0.0,
        optimizer: str = "adamw",
        pruning: str = "none",
    ) -> Cost:
        """Return what an optimiser step costs.

        Args:
            batch_size: Sequences, a mean over steps if need be.
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
        """Return what the loss of `sequences` costs, taken through the model in batches of `batch_size`."""
        batch = max(round(batch_size), 1)
        full, rest = divmod(sequences, batch)
        cost = self._between("forward", "fp32", batch, removed) * full
        return cost + self._between("forward", "fp32", rest, removed) if rest else cost

    def probe(self, sequences: int, batch_size: float, *, removed: float = 0.0) -> Cost:
        """Return what a curvature probe on `sequences` costs."""
        return self.evaluation(sequences, batch_size, removed=removed) * PROBE_PASSES + self.probe_overhead

    def switch(self, name: str) -> Cost:
        """Return what a switch costs: `batch`, `precision`, or a kind of pruning; nothing if it was not measured."""
        return self.switches.get(name, NOTHING)

    @cached_property
    def _levels(self) -> Mapping[tuple[str, str], Mapping[float, list[tuple[float, Cost]]]]:
        """Costs by batch size, rising, for each kind and precision and each share of removed channels, rising."""
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
    """Return the cost at a batch size from those at rising ones; from a single one, in proportion."""
    (first, least), (last, most) = points[0], points[-1]
    cost = _along(points if len(points) > 1 else [(0.0, least * 0.0), *points], batch_size)
    if batch_size < first:
        return max(cost, least * (batch_size / first), key=_time)
    return max(cost, most, key=_time) if batch_size > last else cost


def _along(points: Sequence[tuple[float, Cost]], position: float) -> Cost:
    """Return the cost at `position` on the line through its two neighbours, or through the two nearest outside."""
    right = next((index for index in range(1, len(points) - 1) if position < points[index][0]), len(points) - 1)
    (x0, before), (x1, after) = points[right - 1], points[right]
    share = (position - x0) / (x1 - x0)
    return before * (1 - share) + after * share


def _time(cost: Cost) -> float:
    return cost.time_s
