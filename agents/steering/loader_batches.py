"""Cut the batches of any data loader to any size, epoch after epoch, and keep the position in the data.

    data = batches(DataLoader(dataset, batch_size=8, shuffle=True))
    for batch in data.take(step.batch_size): ...

The loader's batch is the most that goes through the model at once. A sequence is a row: a batch is a tensor with a row
for each sequence, or dictionaries, tuples and lists of such tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from trainpilot.llm_runtime.ranges import COUNT


class LoaderBatches:
    """An endless stream of a data loader's sequences in the loader's order, which can be cut anywhere and resumed.

    The position is counted in batches of the loader and the rest of the last one. It does not depend on how many
    sequences are taken at a time, so a run whose batch size changes sees the same data in the same order.

    Pass it as `data=` to `Steering`, which then takes the data back with a rollback and knows the epochs.

    Args:
        loader: A `DataLoader`, or anything that gives batches and begins anew with every iterator. A sampler's
            `set_epoch` is called.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self._loader = loader
        self._epoch, self._drawn = 0, 0
        self._rest: Any = None
        self._rest_share = 0.0
        """Share of the batch that was drawn last and is not taken yet."""
        self._next: Any = None
        self._batches: Iterator[Any] | None = None
        self._random: dict[str, Any] = {}
        self._epoch_batches: int | None = None
        """Batches of an epoch, as counted in the last one."""

    def take(self, sequences: int, *, within_epoch: bool = False) -> list[Any]:
        """Return the next `sequences` as batches of at most the loader's size, and advance the position.

        Args:
            sequences: How many.
            within_epoch: Return fewer where the epoch ends before.

        Raises:
            ValueError: `sequences` is below 1, there are no data, or a batch cannot be divided into sequences.
        """
        if sequences < 1:
            raise ValueError(f"sequences must be at least 1, got {sequences}")
        taken: list[Any] = []
        wanted = sequences
        while wanted > 0:
            batch, share = self._rest, self._rest_share
            if batch is None:
                batch, share = self._draw(go_on=not (taken and within_epoch)), 1.0
            if batch is None:
                break
            rows = self._rows(batch)
            fits = rows <= wanted
            taken.append(batch if fits else self._part(batch, 0, wanted))
            self._rest = None if fits else self._part(batch, wanted, rows)
            self._rest_share = 0.0 if fits else share * (rows - wanted) / rows
            wanted -= rows
        return taken

    @property
    def epochs_seen(self) -> float | None:
        """Passes over the data so far; `None` in the first epoch of a loader without a length."""
        try:
            length: int | None = len(self._loader)  # type: ignore[arg-type]
        except (TypeError, NotImplementedError):
            length = self._epoch_batches
        return None if not length else self._epoch + (self._drawn - self._rest_share) / length

    # What kinds of loaders and batches differ in ---------------------------------------------------------------------

    def _rows(self, batch: Any) -> int:
        return sequences_in(batch)

    def _part(self, batch: Any, start: int, end: int) -> Any:
        return part_of(batch, start, end)

    def _checked(self, batch: Any) -> Any:
        """Return a batch as it was drawn, or raise `ValueError` if it cannot be counted in sequences."""
        return batch

    def _begin_epoch(self, skip: int) -> Iterator[Any]:
        """Return the batches of the epoch but the first `skip`, which are drawn and dropped."""
        sampler, batch_sampler = (getattr(self._loader, name, None) for name in ("sampler", "batch_sampler"))
        set_epoch((self._loader, sampler, batch_sampler), self._epoch)
        iterator = iter(self._loader)
        for _ in range(skip):
            next(iterator, None)
        return iterator

    # The position ----------------------------------------------------------------------------------------------------

    def _draw(self, *, go_on: bool = True) -> Any:
        """Return the next batch of the loader, of this epoch or of the next; `None` at its end unless to go on."""
        if self._batches is None:
            self._begin(0)
        batch = self._pull()
        if batch is None:
            if not go_on:
                return None
            if not self._drawn:
                raise ValueError(
                    "a data loader must not be empty, and must begin anew with every iterator, got no batch from "
                    f"{type(self._loader).__name__} in epoch {self._epoch}"
                )
            self._epoch_batches = self._drawn
            self._epoch, self._drawn = self._epoch + 1, 0
            self._begin(0)
            return self._draw()
        self._drawn += 1
        return batch

    def _pull(self) -> Any:
        batch, self._next = self._next, None
        if batch is None:
            assert self._batches is not None, "_begin comes first"
            found = next(self._batches, None)
            batch = None if found is None else self._checked(found)
        return batch

    def _begin(self, skip: int) -> None:
        self.close()
        self._random = self._random_now()
        self._batches = self._begin_epoch(skip)

    def _random_now(self) -> dict[str, Any]:
        """Return the states of the random numbers that samplers shuffle by: torch's, or those of their generators."""
        own = [generator.get_state() for generator in self._generators()]
        return {"torch": torch.get_rng_state(), "own": own}

    def _generators(self) -> list[torch.Generator]:
        """Return the loader's own random numbers: its generator is often its sampler's too."""
        owners = (self._loader, getattr(self._loader, "sampler", None))
        found = [getattr(owner, "generator", None) for owner in owners]
        return list({id(each): each for each in found if isinstance(each, torch.Generator)}.values())

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and the rest of the batch that was divided last; `torch.save` can write it."""
        return {
            "epoch": self._epoch,
            "drawn": self._drawn,
            "rest": None
            if self._rest is None
            else map_tensors(self._rest, lambda tensor: tensor.detach().cpu().clone()),
            "rest_share": self._rest_share,
            "random": dict(self._random) if self._drawn else self._random_now(),
            "epoch_batches": self._epoch_batches,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Move to the position at which `state_dict` was called, with a loader of the same data.

        The batches of the epoch so far are drawn once more and dropped.

        Raises:
            ValueError: it is no position; nothing has changed then.
        """
        for name in ("epoch", "drawn"):
            COUNT.check(f"state: {name}", state.get(name))
        if not {"rest", "random"} <= state.keys() or not isinstance(state["random"], Mapping):
            raise ValueError("state must be what state_dict returned, got one without rest or random")
        self._epoch, self._drawn = state["epoch"], state["drawn"]
        self._rest = copy.copy(state["rest"])
        self._rest_share = 0.0 if self._rest is None else state.get("rest_share", 0.0)
        self._epoch_batches = state.get("epoch_batches")
        self._next = None
        for generator, own in zip(self._generators(), state["random"]["own"], strict=False):
            generator.set_state(own)
        if not self._drawn:
            self.close()
            return
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(state["random"]["torch"])
            self._begin(self._drawn)
            self._next = self._pull()  # here, not later: beginning an epoch draws random numbers

    def close(self) -> None:
        """Stop the loader's workers; the position stays."""
        close = getattr(self._batches, "close", None)
        if close is not None:
            close()
        self._batches = None


def batches(loader: Iterable[Any]) -> LoaderBatches:
    """Return a stream of a data loader's sequences, from which a step takes as many as it asks for.

        data = batches(DataLoader(dataset, batch_size=8, shuffle=True))
        while not steering.finished:
            with steering.step() as step:
                for batch in data.take(step.batch_size):
                    step.backward(loss_of, batch=batch)

    Args:
        loader: A `DataLoader` of any kind, or anything else that gives batches and begins anew with every iterator. Its
            batch is the most that goes through the model at once.
    """
    return LoaderBatches(loader)


def set_epoch(places: Iterable[Any], epoch: int) -> None:
    """Tell samplers and the like which epoch begins, from 0, where they shuffle by it."""
    for place in places:
        tell = getattr(place, "set_epoch", None)
        if tell is not None:
            tell(epoch)


# Batches of any layout -----------------------------------------------------------------------------------------------


def first_tensor(batch: Any) -> Tensor | None:
    """Return the first tensor with rows in a batch, `input_ids` before all others; `None` if there is none."""
    if isinstance(batch, Tensor):
        return batch if batch.ndim else None
    parts: Iterable[Any] = ()
    if isinstance(batch, Mapping):
        parts = [batch.get("input_ids"), *batch.values()]
    elif isinstance(batch, (tuple, list)):
        parts = batch
    return next((found for part in parts if (found := first_tensor(part)) is not None), None)


def sequences_in(batch: Any) -> int:
    """Return how many sequences a batch holds: the rows of its first tensor.

    Raises:
        ValueError: it holds no tensor.
    """
    tensor = first_tensor(batch)
    if tensor is None:
        raise ValueError(f"a batch must hold a tensor with a row for each sequence, got {type(batch).__name__}")
    return len(tensor)


def part_of(batch: Any, start: int, end: int) -> Any:
    """Return the sequences from `start` to `end` of a batch; lists of as many words or numbers are cut too.

    Raises:
        ValueError: the batch holds tensors whose rows are not its sequences.
    """
    rows = sequences_in(batch)

    def cut(tensor: Tensor) -> Tensor:
        if tensor.ndim and len(tensor) != rows:
            raise ValueError(
                f"a batch must have one row for each of its {rows} sequences in every tensor, got {len(tensor)} rows: "
                "it cannot be divided; hold the batch size at the loader's by min_batch_size = max_batch_size"
            )
        return tensor[start:end] if tensor.ndim else tensor

    return map_tensors(batch, cut, lambda values: values[start:end] if len(values) == rows else values)


def map_tensors(
    value: Any,
    change: Callable[[Tensor], Tensor],
    change_list: Callable[[list[Any]], list[Any]] = lambda values: values,
) -> Any:
    """Return a copy of nested dictionaries, tuples and lists with every tensor in them changed.

    Args:
        value: The containers; what is neither a container nor a tensor stays.
        change: Changes a tensor.
        change_list: Changes a list or tuple that holds neither tensors nor containers.
    """
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        changed = {name: map_tensors(each, change, change_list) for name, each in value.items()}
        if not isinstance(value, MutableMapping):
            return changed
        result = copy.copy(value)  # of the same class: a tokenizer's has attributes
        result.update(changed)
        return result
    if isinstance(value, (tuple, list)):
        plain = not any(isinstance(each, Tensor | Mapping | tuple | list) for each in value)
        parts = change_list(list(value)) if plain else [map_tensors(each, change, change_list) for each in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def first_sequences(batch: Any, count: int, of: int) -> Any:
    """Return the first `count` of a batch's `of` sequences, or the whole batch if its layout is unknown.

    Args:
        batch: A tensor with a row for each sequence, or dictionaries, tuples and lists of such tensors.
        count: Sequences to return.
        of: Sequences of the batch.
    """
    if not (0 < count < of and _has_rows(batch, of)):
        return batch
    return map_tensors(batch, lambda tensor: tensor[:count] if tensor.ndim else tensor)


def _has_rows(value: Any, of: int) -> bool:
    """Return whether all tensors in `value`, except scalars, have a row for each sequence."""
    if isinstance(value, Tensor):
        positions = value.ndim > 2 and not value.is_floating_point()  # three-part ones have another first dimension
        return value.ndim == 0 or (len(value) == of and not positions)
    if isinstance(value, MutableMapping):
        return all(_has_rows(each, of) for each in value.values())
    if isinstance(value, (tuple, list)):
        return all(_has_rows(each, of) for each in value)
    return value is None or isinstance(value, (bool, int, float))
