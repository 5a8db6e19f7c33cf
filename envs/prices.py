"""Keep the price list of runs: what a token costs in seconds and joules at other batches and precisions.

`PriceBook` holds the latest price of each batch and precision that was seen, and fills the gaps: a step takes a fixed
time and a time per sequence, so that a sequence costs a / B + c, where a is the same for every precision. The same
holds of joules. At the start a and the costs of the precisions come from a short measurement, later from the run
itself. Every value is an array with one number per run; unknown is NaN.
"""

from __future__ import annotations

import numpy as np

from trainpilot.llm_runtime.config import PRECISIONS
from trainpilot.llm_runtime.simulator.records import Floats, Ints, LimitBatch, TelemetryBatch

QUANTITIES = ("seconds", "joules")
_EACH_PRECISION = np.arange(len(PRECISIONS))[:, None]
BINS = 24
"""Powers of two of sequences that are told apart, and an empty bin on either side."""


class PriceBook:
    """Prices of a sequence in many runs, and those of other batches and precisions over the present one.

    Args:
        limits: Control limits of the runs, with the prices that were measured at the start.
    """

    def __init__(self, limits: LimitBatch) -> None:
        n_runs, n_quantities, n_precisions = len(limits.decisions), len(QUANTITIES), len(PRECISIONS)
        self._everyone = np.arange(n_runs)
        self._latest = np.full((n_quantities, n_precisions, BINS, n_runs), np.nan)
        self._newest: Ints = np.zeros((n_precisions, n_runs), dtype=np.int64)
        """Bin of the batch at which each precision was seen last."""
        self._fixed: Floats = np.full((n_quantities, n_runs), np.nan)
        """Cost of a step besides that of its sequences: a."""
        self._beside: Floats = np.full((n_quantities, n_precisions, n_runs), np.nan)
        """Cost of a sequence at each precision less that at the first one, as measured at the start."""
        self._precision: Ints = np.zeros(n_runs, dtype=np.int64)
        self._bins: Ints = np.zeros(n_runs, dtype=np.int64)
        self._over_present: Floats | None = None
        self.begin(self._everyone, limits)

    def begin(self, rows: Ints, limits: LimitBatch) -> None:
        """Begin new runs in these rows with the prices measured at the start; `limits` is of these runs."""
        precision, bins = limits.start.precision, _bins(limits.start.batch_size)
        prices = limits.prices.transpose(1, 2, 3, 0)  # (quantities, precisions, batches, rows)
        half, now, double = (prices[:, precision, batch, np.arange(len(rows))] for batch in range(3))
        self._latest[..., rows] = np.nan
        self._latest[:, precision, bins, rows] = now
        self._newest[:, rows] = 0
        self._newest[precision, rows] = bins
        self._fixed[:, rows] = np.maximum((half - double) / (2.0 ** (1 - bins) - 2.0 ** (-1 - bins)), 0.0)
        self._beside[..., rows] = prices[:, :, 1] - now[:, None]
        self._precision[rows], self._bins[rows] = precision, bins
        self._over_present = None

    def observe(self, telemetry: TelemetryBatch) -> None:
        """Add what the interval that has just ended has cost, of every run; probe and switching apart."""
        precision, bins, before = telemetry.precision, _bins(telemetry.batch_size), self._bins
        with np.errstate(all="ignore"):
            training_s = telemetry.time_s - telemetry.probe_time_s - telemetry.switch_time_s
            costs = np.array([training_s, telemetry.energy_j * (training_s / telemetry.time_s)])
            price = costs / (telemetry.steps * telemetry.batch_size)
            known = np.isfinite(price) & (price > 0)
            rise = price - self._latest[:, precision, before, self._everyone]
            fixed = np.maximum(rise / (2.0**-bins - 2.0**-before), 0.0)
        moved = known & np.isfinite(fixed) & (precision == self._precision)
        self._fixed = np.where(moved, fixed, self._fixed)
        last = self._latest[:, precision, bins, self._everyone]
        self._latest[:, precision, bins, self._everyone] = np.where(known, price, last)
        self._newest[precision, self._everyone] = bins
        self._precision, self._bins = precision.copy(), bins
        self._over_present = None

    @property
    def over_present(self) -> Floats:
        """Log2 of the price at half and at double the batch and at each precision, over the present price.

        Shape (quantities, 2 + number of precisions, n_runs).
        """
        if self._over_present is None:
            self._over_present = self._compared()
        return self._over_present

    def _compared(self) -> Floats:
        precision, bins, everyone = self._precision, self._bins, self._everyone
        now = self._latest[:, precision, bins, everyone]
        halved = self._latest[:, precision, bins - 1, everyone]
        doubled = self._latest[:, precision, bins + 1, everyone]
        per_sequence = 2.0**-bins
        with np.errstate(all="ignore"):
            prices: Floats = np.empty((len(QUANTITIES), 2 + len(PRECISIONS), len(everyone)))
            prices[:, 0] = np.where(np.isnan(halved), now + self._fixed * per_sequence, halved)
            prices[:, 1] = np.where(np.isnan(doubled), now - self._fixed * per_sequence / 2, doubled)
            moved = np.where(self._newest == bins, 0.0, self._fixed[:, None] * (per_sequence - 2.0**-self._newest))
            seen = self._latest[:, _EACH_PRECISION, self._newest, everyone] + moved
            unseen = now[:, None] + self._beside - self._beside[:, precision, everyone][:, None]
            prices[:, 2:] = np.where(np.isnan(seen), unseen, seen)
            prices /= now[:, None]
            return np.log2(prices, out=prices)


def _bins(batch_size: Ints | Floats) -> Ints:
    """Return the bins of batch sizes: 1 for one sequence, 2 for two. The first and the last bin stay empty."""
    with np.errstate(all="ignore"):
        powers = np.rint(np.log2(batch_size))
    powers = np.where(np.isfinite(powers), powers, 0.0)
    bins: Ints = np.minimum(np.maximum(1 + powers, 1), BINS - 2).astype(np.int64)
    return bins
