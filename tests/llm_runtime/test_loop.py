"""Copies of optimiser states are deep, also of tensors that are made of tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainpilot.llm_runtime.loop import clone_state


class Halves(Tensor):
    """Pretends to be float32, holds codes and a scale, and cannot be cloned: like 8-bit states of an optimiser."""

    codes: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> Halves:
        made = Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)  # type: ignore[attr-defined]
        made.codes, made.scale = codes, scale
        return made  # type: ignore[no-any-return]

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], _context: None, _size: Any, _stride: Any) -> Halves:
        return Halves(inner["codes"], inner["scale"])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{func} is not for halves")


def test_a_copy_shares_nothing() -> None:
    state = {"state": {0: {"exp_avg": torch.ones(2), "step": torch.tensor(3.0)}}, "param_groups": [{"betas": [0.9]}]}
    copy = clone_state(state)
    state["state"][0]["exp_avg"].zero_()  # type: ignore[index]
    state["param_groups"][0]["betas"][0] = 0.5  # type: ignore[index]
    assert copy["state"][0]["exp_avg"].tolist() == [1.0, 1.0]
    assert copy["param_groups"] == [{"betas": [0.9]}]


def test_tensors_made_of_tensors_are_copied_part_by_part() -> None:
    state = {"exp_avg": Halves(torch.tensor([1, 2], dtype=torch.uint8), torch.tensor([0.5]))}
    copy = clone_state(state)["exp_avg"]
    state["exp_avg"].codes.zero_()
    state["exp_avg"].scale.zero_()
    assert isinstance(copy, Halves)
    assert copy.codes.tolist() == [1, 2]
    assert copy.scale.tolist() == [0.5]
