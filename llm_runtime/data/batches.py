"""Cut token ids into sequences: a shuffled stream for training, evenly spaced windows for evaluation.

Letters: n sequences, T tokens a model reads in one sequence. A sequence holds T + 1 ids: the first T are the
input, the last T the targets.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Batch = npt.NDArray[np.int64]
"""Sequences of token ids, shape `(n, T + 1)`."""


class BatchStream:
    """Endless shuffled sequences, in an order that does not depend on how many are taken at a time.

    The ids are cut into windows of T + 1 with stride T, so every id but the first is a target once per
    epoch; a remainder shorter than T is left out. Every epoch has its own permutation, drawn from
    seed and epoch number.
    """

    def __init__(self, tokens: npt.NDArray[Any], sequence_length: int, seed: int) -> None:
        """Start at the first sequence of epoch 0.

        Args:
            tokens: ids, shape `(tokens,)`; a memory map stays on disk.
            sequence_length: T, in tokens.
            seed: from 0.

        Raises:
            ValueError: `seed` or `sequence_length` is out of range, the latter also for too few tokens.
        """
        if seed < 0:
            raise ValueError(f"seed must be >= 0, got {seed}")
        self._windows = _windows(tokens, sequence_length)[::sequence_length]  # (n_sequences, T + 1)
        self._seed = seed
        self._position = 0
        self._orders: dict[int, npt.NDArray[np.int64]] = {}

    @property
    def n_sequences(self) -> int:
        """Sequences per epoch."""
        return len(self._windows)

    @property
    def epochs_seen(self) -> float:
        """Passes over the tokens so far."""
        return self._position / self.n_sequences

    def take(self, n: int) -> Batch:
        """Return the next `n` sequences, shape `(n, T + 1)`, and advance. Raises `ValueError` if `n` < 1."""
        batch = self.peek(n)
        self._position += n
        return batch

    def peek(self, n: int) -> Batch:
        """Return what `take(n)` would, shape `(n, T + 1)`, without advancing: data not yet trained on, for a probe."""
        if n < 1:
            raise ValueError(f"n must be at least 1 sequence, got {n}")
        epochs, places = np.divmod(np.arange(self._position, self._position + n), self.n_sequences)
        rows = [self._order(int(epoch))[places[epochs == epoch]] for epoch in np.unique(epochs)]
        batch: Batch = self._windows[np.concatenate(rows)].astype(np.int64)
        return batch

    def state_dict(self) -> dict[str, int]:
        """Return the position, in sequences since the start of epoch 0."""
        return {"position": self._position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue at the position of `state_dict`. Raises `ValueError` if the position is missing or below 0."""
        position = state.get("position", -1)
        if position < 0:
            raise ValueError(f"state must hold a position >= 0, got {dict(state)}; use state_dict() of a BatchStream")
        self._position = int(position)

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        """Return the permutation of `epoch`, shape `(n_sequences,)`. Keeps the current one and the next."""
        if epoch not in self._orders:
            current = self._position // self.n_sequences
            self._orders = {e: order for e, order in self._orders.items() if e in (current, current + 1)}
            self._orders[epoch] = np.random.default_rng([self._seed, epoch]).permutation(self.n_sequences)
        return self._orders[epoch]


def fixed_batch(tokens: npt.NDArray[Any], sequence_length: int, n_sequences: int) -> Batch:
    """Return `n_sequences` evenly spaced windows from the first id to the last, always the same ones.

    Windows overlap if there are too few ids for `n_sequences` separate ones.

    Args:
        tokens: ids, shape `(tokens,)`.
        sequence_length: T, in tokens.
        n_sequences: how many windows.

    Returns:
        The windows, shape `(n_sequences, T + 1)`.

    Raises:
        ValueError: `n_sequences` or `sequence_length` is out of range, the latter also for too few tokens.
    """
    if n_sequences < 1:
        raise ValueError(f"n_sequences must be at least 1, got {n_sequences}")
    windows = _windows(tokens, sequence_length)
    starts = np.arange(n_sequences) * (len(windows) - 1) // max(n_sequences - 1, 1)
    batch: Batch = windows[starts].astype(np.int64)
    return batch


def _windows(tokens: npt.NDArray[Any], sequence_length: int) -> npt.NDArray[Any]:
    """Return a view of all windows of T + 1 ids, shape `(tokens - T, T + 1)`; nothing is copied."""
    if not 1 <= sequence_length < len(tokens):
        raise ValueError(
            f"sequence_length must be at least 1 and below the {len(tokens)} tokens of the split, "
            f"got {sequence_length}; use shorter sequences or more text"
        )
    # A plain array gathers faster than the memory map's own class.
    return np.lib.stride_tricks.sliding_window_view(np.asarray(tokens), sequence_length + 1)
