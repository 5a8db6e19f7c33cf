"""Check what a loop does in its steps: how many sequences go through the model, and whether its loss is repeatable."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trainpilot.agents.steering.loader_batches import first_tensor

EQUAL = 1e-4
"""Two losses of the same sequences under the same weights differ by less than this share; float32 on a GPU too."""


class RowWatch:
    """Notes the shapes of what a model reads in its forward passes between `begin` and `check`.

    Args:
        model: The model as the loop calls it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.shapes: list[tuple[int, ...]] | None = None
        """What was read since `begin`; `None` while nothing is noted."""
        self._handle = model.register_forward_pre_hook(_NoteShape(self), with_kwargs=True)

    def close(self) -> None:
        """Let the model go."""
        self._handle.remove()

    def begin(self) -> None:
        """Note the forward passes from here on."""
        self.shapes = []

    def check(self, batch_size: int) -> None:
        """Raise `ValueError` if the forward passes since `begin` have read another number of sequences.

        Sequences may be the first or the second dimension, and be spread over several forward passes. Inputs of a
        single dimension, and a single row, which may hold all sequences one after the other, are not judged.

        Args:
            batch_size: Sequences that the loop counts.
        """
        shapes, self.shapes = [shape for shape in self.shapes or () if len(shape) > 1 and shape[0] > 1], None
        sizes = {size for shape in shapes for size in shape[:2]} | {sum(shape[0] for shape in shapes)}
        if shapes and batch_size not in sizes:
            raise ValueError(
                f"step.backward must get the sequences that the step asks for, {batch_size}, got a model input of "
                f"{' x '.join(map(str, shapes[0]))}; draw step.batch_size of them (trainpilot.batches(loader) cuts any "
                "data loader to it), or say sequences=... where a row is not a sequence"
            )


class _NoteShape:
    """Tells a watch the shape of a model's input. A model may be copied or pickled with it, and is then not watched."""

    def __init__(self, watch: RowWatch) -> None:
        self._watch: weakref.ref[RowWatch] | None = weakref.ref(watch)

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        watch = self._watch() if self._watch is not None else None
        if watch is not None and watch.shapes is not None and (tensor := first_tensor([*inputs, named])) is not None:
            watch.shapes.append(tuple(tensor.shape))

    def __getstate__(self) -> dict[str, Any]:
        return {"_watch": None}


def check_repeatable(loss: Callable[[], Tensor]) -> Tensor:
    """Return a loss that is the same when it is called again under the same weights and random numbers.

    Raises:
        ValueError: it is another one, because the function draws new data with every call.
    """
    first, second = loss(), loss()
    one, other = float(first), float(second)
    if math.isfinite(one) and math.isfinite(other) and not math.isclose(one, other, rel_tol=EQUAL):
        raise ValueError(
            f"loss must return the same value when it is called again, got {one:.6g} and then {other:.6g}: it draws "
            "new data every time, and the curvature probe calls it three times more; draw the data before "
            "step.backward, or set probe=False in SteeringSettings"
        )
    return first
