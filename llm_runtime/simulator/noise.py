"""Draw random numbers that belong to a run, not to its place in a batch: one run alone meets the same ones."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trainpilot.llm_runtime.simulator.records import Floats

Keys = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def mix(keys: Keys) -> Keys:
    """Return well-mixed numbers: the finaliser of SplitMix64 (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        z = keys + _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * _MIX_1
        z = (z ^ (z >> np.uint64(27))) * _MIX_2
        mixed: Keys = z ^ (z >> np.uint64(31))
    return mixed


def run_keys(seed: int, rows: NDArray[np.int64], episodes: NDArray[np.int64]) -> Keys:
    """Return a key for each run from the seed, its row and how many runs the row has had."""
    key = mix(np.full(len(rows), seed, dtype=np.uint64))
    key = mix(key ^ rows.astype(np.uint64))
    return mix(key ^ episodes.astype(np.uint64))


def uniforms(keys: Keys, counter: NDArray[np.int64] | int, channels: int) -> Floats:
    """Return uniform numbers in (0, 1), shape (n_runs, channels): the same for the same key and counter."""
    start = mix(keys ^ mix(np.asarray(counter, dtype=np.uint64) + np.zeros_like(keys)))
    numbers = mix(start[:, None] + np.arange(1, channels + 1, dtype=np.uint64) * _GOLDEN)
    values: Floats = ((numbers >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0**53
    return values


def normals(keys: Keys, counter: NDArray[np.int64] | int, channels: int) -> Floats:
    """Return standard normal numbers, shape (n_runs, channels), by the Box-Muller transform."""
    pairs = -(-channels // 2)
    drawn = uniforms(keys, counter, 2 * pairs)
    radius, angle = np.sqrt(-2.0 * np.log(drawn[:, :pairs])), 2.0 * np.pi * drawn[:, pairs:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)[:, :channels]
