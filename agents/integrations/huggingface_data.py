"""Draw any number of sequences from the data loader of a Trainer, and resume at the same sequence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import skip_first_batches
from torch.utils.data import DataLoader

from trainpilot.agents.steering.loader_batches import LoaderBatches, set_epoch

MicroBatch = dict[str, Any]


class MicroBatches(list[MicroBatch]):
    """The micro-batches of one optimiser step."""

    @property
    def rows(self) -> int:
        """Sequences of all of them."""
        return sum(rows_of(batch) for batch in self)


class SampleStream(LoaderBatches):
    """An endless stream of the sequences of a Trainer's data loader; a micro-batch is a batch of it, or a part of one.

    Args:
        loader: Makes the micro-batches, as `accelerator.prepare` returned it.
        micro_batch_size: Sequences in each, but for the last of an epoch.
    """

    def __init__(self, loader: DataLoader[Any], micro_batch_size: int) -> None:
        super().__init__(loader)
        self._accelerated, self._micro_batch_size = loader, micro_batch_size

    def take(self, sequences: int, *, within_epoch: bool = False) -> MicroBatches:
        """Return the next `sequences` in micro-batches, and advance the position.

        Args:
            sequences: How many.
            within_epoch: Return fewer where the epoch ends before.

        Raises:
            ValueError: there are no data, or they cannot be divided into sequences.
        """
        return MicroBatches(super().take(sequences, within_epoch=within_epoch))

    def _rows(self, batch: MicroBatch) -> int:
        return rows_of(batch)

    def _part(self, batch: MicroBatch, start: int, end: int) -> MicroBatch:
        return cut(batch, start, end)

    def _checked(self, batch: Any) -> MicroBatch:
        if not isinstance(batch, Mapping):
            raise ValueError(f"data_collator must return a mapping of tensors by name, got {type(batch).__name__}")
        if self._micro_batch_size > 1 and _is_flat(batch):
            raise ValueError(
                "data_collator must keep one row for each sequence, got all of them in one row; set TRL's "
                "packing_strategy='wrapped' or padding_free=False, or per_device_train_batch_size=1, with "
                "gradient_accumulation_steps for the batch, and count rows as sequences"
            )
        return dict(batch)

    def _begin_epoch(self, skip: int) -> Iterator[Any]:
        shared = getattr(getattr(self._accelerated, "batch_sampler", None), "batch_sampler", None)
        set_epoch((self._accelerated, shared), self._epoch)
        return iter(skip_first_batches(self._accelerated, skip) if skip else self._accelerated)

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and the rest of the micro-batch that was divided last."""
        return super().state_dict() | {"micro_batch_size": self._micro_batch_size}

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
        random = state["random"]  # of version 0.1: torch's alone
        super().load_state_dict(
            {**state, "random": random if isinstance(random, Mapping) else {"torch": random, "own": []}}
        )


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
