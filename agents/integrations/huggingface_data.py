"""Draw any number of sequences from a data loader, epoch after epoch, and resume at the same sequence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import skip_first_batches
from torch.utils.data import DataLoader

MicroBatch = dict[str, Any]


class MicroBatches(list[MicroBatch]):
    """The micro-batches of one optimiser step."""

    @property
    def rows(self) -> int:
        """Sequences of all of them."""
        return sum(rows_of(batch) for batch in self)


class SampleStream:
    """An endless stream of a data loader's sequences, in the loader's order, epoch after epoch.

    The position is counted in sequences: the batches drawn in this epoch, and the rest of the last of them. A
    micro-batch is a batch of the data loader, or the part of it that a step still needs.

    Args:
        loader: Makes the micro-batches, as `accelerator.prepare` returned it.
        micro_batch_size: Sequences in each, but for the last of an epoch.
    """

    def __init__(self, loader: DataLoader[Any], micro_batch_size: int) -> None:
        self._loader, self._micro_batch_size = loader, micro_batch_size
        self._epoch, self._drawn = 0, 0
        self._rest: MicroBatch | None = None
        self._next: MicroBatch | None = None
        self._batches: Iterator[Any] | None = None
        self._random: torch.Tensor | None = None

    def take(self, sequences: int, *, within_epoch: bool = False) -> MicroBatches:
        """Return the next `sequences` in micro-batches, and advance the position.

        Args:
            sequences: How many.
            within_epoch: Return fewer where the epoch ends before.

        Raises:
            ValueError: there are no data, or they cannot be divided into sequences.
        """
        taken, wanted = MicroBatches(), sequences
        while wanted > 0:
            batch = self._rest if self._rest is not None else self._draw(go_on=not (taken and within_epoch))
            if batch is None:
                break
            rows = rows_of(batch)
            taken.append(batch if rows <= wanted else cut(batch, 0, wanted))
            self._rest = None if rows <= wanted else cut(batch, wanted, rows)
            wanted -= rows
        return taken

    def _draw(self, *, go_on: bool) -> MicroBatch | None:
        """Return the next batch of the data loader, of this epoch or of the next; `None` at its end unless to go on."""
        if self._batches is None:
            self._begin(0)
        batch = self._pull()
        if batch is None:
            if not go_on:
                return None
            if not self._drawn:
                raise ValueError(
                    "train_dataset must not be empty, and an iterable one must begin anew with every iterator"
                )
            self._epoch, self._drawn = self._epoch + 1, 0
            self._begin(0)
            return self._draw(go_on=True)
        self._drawn += 1
        return batch

    def _pull(self) -> MicroBatch | None:
        batch, self._next = self._next, None
        if batch is None:
            assert self._batches is not None, "_begin comes first"
            found = next(self._batches, None)
            batch = None if found is None else self._checked(found)
        return batch

    def _checked(self, batch: Any) -> MicroBatch:
        if not isinstance(batch, Mapping):
            raise ValueError(f"data_collator must return a mapping of tensors by name, got {type(batch).__name__}")
        if self._micro_batch_size > 1 and _is_flat(batch):
            raise ValueError(
                "data_collator must keep one row for each sequence, got all of them in one row; turn padding-free "
                "batches off, or set per_device_train_batch_size to 1 and count rows as sequences"
            )
        return dict(batch)

    def _begin(self, skip: int) -> None:
        """Begin the epoch, and skip its first `skip` batches."""
        self.close()
        self._random = torch.get_rng_state()  # some samplers shuffle by it
        shared = getattr(getattr(self._loader, "batch_sampler", None), "batch_sampler", None)
        for place in (self._loader, shared):
            set_epoch = getattr(place, "set_epoch", None)
            if set_epoch is not None:
                set_epoch(self._epoch)
        loader = skip_first_batches(self._loader, skip) if skip else self._loader
        self._batches = iter(loader)

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and the rest of the micro-batch that was divided last."""
        rest = None if self._rest is None else {name: _kept(value) for name, value in self._rest.items()}
        state = {"epoch": self._epoch, "drawn": self._drawn, "rest": rest, "random": self._random}
        return state | {"micro_batch_size": self._micro_batch_size}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Move to the position at which `state_dict` was called.

        Raises:
            ValueError: the position was counted in other micro-batches.
        """
        if state["drawn"] and state["micro_batch_size"] != self._micro_batch_size:
            raise ValueError(
                f"per_device_train_batch_size must be {state['micro_batch_size']}, as when the state was saved, got "
                f"{self._micro_batch_size}: the position in the data is counted in it; with ignore_data_skip the epoch "
                "begins anew"
            )
        self._epoch, self._drawn = state["epoch"], state["drawn"]
        self._rest = None if state["rest"] is None else dict(state["rest"])
        self._next = None
        if not self._drawn:
            self.close()
            return
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(state["random"])
            self._begin(self._drawn)
            self._next = self._pull()  # here, not later: beginning an epoch draws random numbers

    def close(self) -> None:
        """Stop the data loader's workers."""
        close = getattr(self._batches, "close", None)
        if close is not None:
            close()
        self._batches = None


def rows_of(batch: Mapping[str, Any]) -> int:
    """Return how many sequences a batch holds."""
    tensors = [value for value in batch.values() if isinstance(value, torch.Tensor) and value.ndim]
    if not tensors:
        raise ValueError(f"data_collator must return tensors, got {', '.join(batch) or 'nothing'}")
    return len(batch["input_ids"]) if "input_ids" in batch else len(tensors[0])


def cut(batch: Mapping[str, Any], start: int, end: int) -> MicroBatch:
    """Return the sequences from `start` to `end` of a batch.

    Raises:
        ValueError: the batch holds tensors whose rows are not its sequences.
    """
    rows = rows_of(batch)
    for name, value in batch.items():
        if isinstance(value, torch.Tensor) and value.ndim and len(value) != rows:
            raise ValueError(
                f"data_collator must return one row of {name} for each of {rows} sequences, got {len(value)}: a batch "
                "that is divided differently is not exact; hold the batch by min_batch_size = max_batch_size"
            )
    return {name: value[start:end] if _is_by_row(value, rows) else value for name, value in batch.items()}


def _is_flat(batch: Mapping[str, Any]) -> bool:
    """Return whether a collator has laid all sequences of a batch into one row."""
    if rows_of(batch) != 1:
        return False
    if "cu_seq_lens_q" in batch:
        return len(batch["cu_seq_lens_q"]) > 2
    return "position_ids" in batch and int((batch["position_ids"] == 0).sum()) > 1


def _is_by_row(value: Any, rows: int) -> bool:
    return (isinstance(value, torch.Tensor) and value.ndim > 0) or (isinstance(value, list) and len(value) == rows)


def _kept(value: Any) -> Any:
    return value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value
