"""Make a trained language model smaller by cutting what does least on a held text, as Minitron does.

Three parts can be cut, each to one size in all blocks: feed-forward channels (`ffn`), whole groups of attention heads
(`heads`) and whole blocks (`depth`). What goes is measured anew before each cut. Where several cuts are open, each is
tried on a copy, and the one that adds least loss per parameter comes first.

Shapes: n windows, T tokens of a window.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel

from trainpilot.llm_runtime.export.inference import LOSS_TOKENS_AT_ONCE, mean_loss
from trainpilot.llm_runtime.importance import block_influences, channel_activations, head_activations
from trainpilot.llm_runtime.json_records import JsonRecord
from trainpilot.llm_runtime.structure import (
    blocks,
    depth_fault,
    group_counts,
    heads_fault,
    heads_of,
    remove_blocks,
    remove_groups,
)
from trainpilot.llm_runtime.width import FFN_LAYOUTS, channels_for, ffn_width, remove_channels

Part = Literal["ffn", "heads", "depth"]
PARTS: tuple[Part, ...] = get_args(Part)
UNITS: Mapping[Part, str] = {"ffn": "feed-forward channels", "heads": "groups of heads", "depth": "blocks"}
"""What the size of a part counts."""
NOTCHES = 8
"""A search for a number of parameters cuts this share of the feed-forward channels at once."""

Windows = npt.NDArray[Any]
Progress = Callable[["Cut"], None]


@dataclass(frozen=True, kw_only=True)
class Cut(JsonRecord):
    """One cut that was made."""

    part: Part
    size_before: int
    """Channels, groups of heads or blocks before it."""
    size: int
    """The same after it."""
    n_parameters: int
    """Of the whole model after it."""
    loss: float
    """On the held text after it, in nats/token."""


def count_parameters(model: PreTrainedModel) -> int:
    """Return the number of parameters, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def part_fault(model: PreTrainedModel, part: Part) -> str | None:
    """Return why a part of the model cannot be cut, as the rest of a line; `None` where it can."""
    if part == "heads":
        return heads_fault(model)
    if part == "depth":
        return depth_fault(model)
    kind = model.config.model_type
    return None if kind in FFN_LAYOUTS else f"can only be cut in {', '.join(FFN_LAYOUTS)}, got {kind!r}"


def part_size(model: PreTrainedModel, part: Part) -> int:
    """Return the present size of a part that has no `part_fault`."""
    if part == "ffn":
        return ffn_width(model)
    return heads_of(model).groups if part == "heads" else len(blocks(model))


def size_of_share(model: PreTrainedModel, part: Part, share: float) -> int:
    """Return the size that comes nearest to a share of the present one, and that the architecture allows.

    Args:
        model: The model.
        part: One that has no `part_fault`.
        share: In (0, 1).

    Raises:
        ValueError: Nothing would be cut.
    """
    present = part_size(model, part)
    if part == "ffn":
        found = channels_for(1 - share, present)
    elif part == "heads":
        found = min(reversed(group_counts(model)), key=lambda count: abs(count - share * present))
    else:
        found = max(1, int(share * present + 0.5))
    if found == present:
        raise ValueError(f"{part} must leave fewer than all {present} {UNITS[part]}, got {share:g}, which leaves all")
    return found


def cut_part(
    model: PreTrainedModel,
    part: Part,
    size: int,
    sequences: Tensor,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    at_once: int | None = None,
) -> None:
    """Measure what does least on a text, and cut a part to a size in place.

    Args:
        model: The model.
        part: One that has no `part_fault`.
        size: Channels, groups of heads or blocks to keep.
        sequences: Token ids on the model's device, of shape (n, T).
        optimizer: The optimiser of the model, whose state is cut too; `None` where nothing trains it.
        at_once: Sequences that go through the model together; by default some 4,096 tokens.

    Raises:
        ValueError: The size is none that the part can have; nothing has changed then.
    """
    together = at_once or max(LOSS_TOKENS_AT_ONCE // sequences.shape[1], 1)
    if part == "ffn":
        remove_channels(model, optimizer, size, channel_activations(model, sequences, together))
    elif part == "heads":
        remove_groups(model, optimizer, size, head_activations(model, sequences, together))
    else:
        remove_blocks(model, optimizer, size, block_influences(model, sequences, together))


def cut_in_training(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, sizes: Mapping[Part, int], windows: Windows
) -> None:
    """Cut several parts of a model in training in place, channels first and blocks last, each measured anew.

    Args:
        model: The model.
        optimizer: Its optimiser, whose state is cut too.
        sizes: Size that each part is cut to.
        windows: Text on which it is measured what does least, token ids of shape (n, T + 1).

    Raises:
        ValueError: A size is none that the part can have.
    """
    sequences = torch.from_numpy(windows[:, :-1]).to(model.device)
    for part in PARTS:
        if part in sizes:
            cut_part(model, part, sizes[part], sequences, optimizer=optimizer)


def config_changes(model: PreTrainedModel, sizes: Mapping[Part, int]) -> dict[str, Any]:
    """Return the fields of a model's config, with their new values, that cuts to these sizes change.

    Args:
        model: The model; it is left as it is.
        sizes: Size that each part is cut to.

    Raises:
        ValueError: A size is none that the part can have.
    """
    small = copy.deepcopy(model)
    nothing = torch.zeros((1, 2), dtype=torch.long, device=model.device)  # the shape does not depend on the text
    for part, size in sizes.items():
        cut_part(small, part, size, nothing)
    before, after = model.config.to_dict(), small.config.to_dict()
    changes = {name: value for name, value in after.items() if before.get(name) != value}
    if "heads" in sizes and "head_dim" in after:  # configs that leave it out derive it from the number of heads
        changes["head_dim"] = after["head_dim"]
    return changes


def cut_to_sizes(
    model: PreTrainedModel, sizes: Mapping[Part, int], windows: Windows, progress: Progress | None = None
) -> tuple[PreTrainedModel, list[Cut]]:
    """Return a smaller copy of a model, with the cuts that were made in their order.

    Args:
        model: The model; it is left as it is.
        sizes: Size that each part is cut to.
        windows: Held text, token ids of shape (n, T + 1).
        progress: Called after each cut.

    Raises:
        ValueError: A size is none that the part can have.
    """
    search = _Search(model, windows, progress)
    open_parts = dict(sizes)
    while open_parts:
        open_parts.pop(search.step(open_parts.items()))
    return search.model, search.cuts


def cut_to_parameters(
    model: PreTrainedModel,
    n_parameters: int,
    windows: Windows,
    *,
    least: Mapping[Part, int] | None = None,
    progress: Progress | None = None,
) -> tuple[PreTrainedModel, list[Cut]]:
    """Return a copy of a model with at most `n_parameters`, with the cuts that were made in their order.

    It is made smaller bit by bit: by an eighth of the feed-forward channels, a group of heads or a block.

    Args:
        model: The model; it is left as it is.
        n_parameters: Parameters to keep, at most.
        windows: Held text, token ids of shape (n, T + 1).
        least: Sizes below which parts are not cut.
        progress: Called after each cut.

    Raises:
        ValueError: It cannot be made so small.
    """
    search = _Search(model, windows, progress)
    parts = [part for part in PARTS if part_fault(model, part) is None]
    lower = {part: _lower_sizes(model, part, (least or {}).get(part, 1)) for part in parts}
    smallest = search.smallest({part: sizes[-1] for part, sizes in lower.items() if sizes})
    if smallest > n_parameters:
        raise ValueError(
            f"parameters must be at least {smallest:,}, what is left once {', '.join(parts)} are cut as far as they "
            f"may be, got {n_parameters:,}"
        )
    while count_parameters(search.model) > n_parameters:
        moves = {part: sizes[0] for part, sizes in lower.items() if sizes}
        lower[search.step(moves.items())].pop(0)
    return search.model, search.cuts


def _lower_sizes(model: PreTrainedModel, part: Part, least: int) -> list[int]:
    """Return the sizes that a search cuts a part to, one after the other."""
    present = part_size(model, part)
    if part == "ffn":
        found = [channels_for(notch / NOTCHES, present) for notch in range(1, NOTCHES)]
    elif part == "heads":
        found = group_counts(model)
    else:
        found = list(range(1, present))
    return sorted({size for size in found if least <= size < present}, reverse=True)


class _Search:
    """A model that becomes smaller by the cut, of several, that adds least loss per parameter."""

    def __init__(self, model: PreTrainedModel, windows: Windows, progress: Progress | None) -> None:
        self.model, self.cuts = copy.deepcopy(model), list[Cut]()
        self.model.eval()  # type: ignore[no-untyped-call]
        self._windows, self._progress = windows, progress
        self._sequences = torch.from_numpy(windows[:, :-1]).to(model.device)
        self._loss = mean_loss(self.model, windows)

    def step(self, moves: Iterable[tuple[Part, int]]) -> Part:
        """Try each of the cuts, make the cheapest, and return its part."""
        trials = [self._trial(part, size) for part, size in moves]
        rate = partial(self._price, count_parameters(self.model))
        self.model, cut = min(trials, key=rate)
        self.cuts.append(cut)
        self._loss = cut.loss
        if self._progress is not None:
            self._progress(cut)
        return cut.part

    def smallest(self, sizes: Mapping[Part, int]) -> int:
        """Return the parameters that are left with these sizes."""
        model = copy.deepcopy(self.model)
        for part, size in sizes.items():
            cut_part(model, part, size, self._sequences[:1])
        return count_parameters(model)

    def _trial(self, part: Part, size: int) -> tuple[PreTrainedModel, Cut]:
        model, before = copy.deepcopy(self.model), part_size(self.model, part)
        cut_part(model, part, size, self._sequences)
        loss, n_parameters = mean_loss(model, self._windows), count_parameters(model)
        return model, Cut(part=part, size_before=before, size=size, n_parameters=n_parameters, loss=loss)

    def _price(self, n_parameters: int, trial: tuple[PreTrainedModel, Cut]) -> float:
        """Return the loss that a cut adds per parameter that it removes."""
        return (trial[1].loss - self._loss) / max(n_parameters - trial[1].n_parameters, 1)
