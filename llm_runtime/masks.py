"""Prune single weights of a causal language model while it trains: masks hold the chosen weights at zero.

The weights stay plain parameters under their own names, so the optimiser state is unchanged and a saved model
loads without this package. Masks save neither memory nor time; `width` does, because it removes whole channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from trainpilot.llm_runtime.layers import is_linear
from trainpilot.llm_runtime.optimizer import full_tensor, laid_out_like
from trainpilot.llm_runtime.plain_values import printable, shown
from trainpilot.llm_runtime.saved_loop import Count, Number, SavedRecord

Criterion = Literal["magnitude", "evolution"]


def prunable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the matrices of the attention and feed-forward blocks by name, each matrix once.

    These are the weights of `nn.Linear` and of GPT-2's `Conv1D` inside the stack of layers (`nn.ModuleList`).
    Embeddings, the output head (tied or not), projections around the stack, norms and biases are left out.
    """
    seen = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    found: dict[str, nn.Parameter] = {}
    for stack_name, stack in model.named_modules():
        if not isinstance(stack, nn.ModuleList):
            continue
        for name, module in stack.named_modules(prefix=stack_name):
            if is_linear(module) and id(module.weight) not in seen:
                seen.add(id(module.weight))
                found[f"{name}.weight"] = model.get_parameter(f"{name}.weight")
    return found


@dataclass(frozen=True, kw_only=True)
class _SavedMasks(SavedRecord):
    """The form of the masks' state."""

    criterion: str
    steps: Count
    threshold_r: Number | None
    masks: dict[str, Any]
    mean: dict[str, Any]


class WeightMasks:
    """Masks over the prunable matrices of a model, grown by one of two criteria.

    `magnitude` ranks a weight by its size |w|, over all matrices together.

    `evolution` ranks it by the mean of its values after every step, in which later steps weigh more:

        Wbar_T = sum(t * w_t for t = 1..T) / sum(t for t = 1..T)

    and removes weight i of matrix l when |Wbar_i| < r * std(|Wbar_l|). Rule: Islam, Belhaouari and Bermak
    2025, arXiv 2502.17071, with code at github.com/ashhadulislam/pruneTinyGPT. They choose r by hand and
    prune embeddings, norms and biases too; here r is one number for all matrices, chosen so that the wanted
    sparsity is reached. Until the first `observe`, the weights at construction take the place of the mean.

    After every `optimizer.step()` call `apply`, then `observe`; call `prune_to` to raise the sparsity.
    Make the masks when the model is on the one device where it trains, or sharded over several (FSDP2): the masks
    are sharded like their matrices, and `prune_to` gathers all scores in every process. `evolution` keeps one more
    copy of the matrices, in float32 or wider.

    Attributes:
        criterion: How weights are ranked.
        steps: Optimiser steps observed, T.
        threshold_r: The r of the last pruning by `evolution`: the largest score it removed. Otherwise `None`.
    """

    def __init__(self, model: nn.Module, criterion: Criterion) -> None:
        if criterion not in get_args(Criterion):
            raise ValueError(f"criterion must be one of {', '.join(get_args(Criterion))}, got {criterion!r}")
        parameters = prunable_parameters(model)
        if not parameters:
            raise ValueError(f"model must have linear layers in an nn.ModuleList, {type(model).__name__} has none")
        self.criterion = criterion
        self.steps = 0
        self.threshold_r: float | None = None
        self._names = list(parameters)
        self._weights: list[Tensor] = list(parameters.values())
        self._total = sum(weight.numel() for weight in self._weights)
        # True where a weight is trained, False where it is held at zero.
        self._masks = [torch.ones_like(weight, dtype=torch.bool) for weight in self._weights]
        self._masked = 0
        averaged = self._weights if criterion == "evolution" else []
        self._mean = [_widened(weight).clone() for weight in averaged]

    @torch.no_grad()
    def observe(self) -> None:
        """Update the mean with the weights w_t after an optimiser step.

            Wbar_t = Wbar_(t-1) + 2 / (t + 1) * (w_t - Wbar_(t-1)),    as t / (1 + ... + t) = 2 / (t + 1)

        Does nothing for `magnitude`.
        """
        if self.criterion != "evolution":
            return
        self.steps += 1
        current = [_widened(weight) for weight in self._weights]
        torch._foreach_lerp_(self._mean, current, 2 / (self.steps + 1))

    @torch.no_grad()
    def prune_to(self, sparsity: float) -> None:
        """Mask exactly round(sparsity * n) of the n prunable weights and zero them; masked weights stay masked.

        Among weights of equal score the earlier matrix and the lower index go first. A sparsity below the one
        already reached changes nothing.

        Args:
            sparsity: Wanted share of masked weights, in [0, 1).

        Raises:
            ValueError: If `sparsity` is outside [0, 1).
        """
        if not 0 <= sparsity < 1:
            raise ValueError(f"sparsity must be in [0, 1), got {sparsity}")
        wanted = round(sparsity * self._total)
        if wanted > self._masked:
            self._mask_smallest(wanted)
        self.apply()

    @torch.no_grad()
    def apply(self) -> None:
        """Multiply the weights by their masks; costs nothing while nothing is masked."""
        if self._masked:
            torch._foreach_mul_(self._weights, self._masks)

    @torch.no_grad()
    def sparsity(self) -> float:
        """Return the share of prunable weights that are zero now, counted in the weights, in [0, 1]."""
        alive = torch.stack([full_tensor(torch.count_nonzero(weight)) for weight in self._weights]).sum()
        return 1 - int(alive) / self._total

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the state for `load_state_dict`: tensors, numbers and text only."""
        return {
            "criterion": self.criterion,
            "steps": self.steps,
            "threshold_r": self.threshold_r,
            "masks": {name: mask.clone() for name, mask in zip(self._names, self._masks, strict=True)},
            "mean": {name: mean.clone() for name, mean in zip(self._names, self._mean, strict=False)},
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state from `state_dict`, also one with fewer masked weights; the weights are not changed.

        Raises:
            ValueError: If the state was made with another criterion, or for a model of other matrices.
        """
        self.check_state(state)
        for name, mask in zip(self._names, self._masks, strict=True):
            mask.copy_(state["masks"][name])
        for name, mean in zip(self._names, self._mean, strict=False):
            mean.copy_(state["mean"][name])
        self.steps, self.threshold_r = state["steps"], state["threshold_r"]
        self._masked = self._count_masked()

    def _scores(self) -> list[Tensor]:
        """Return the importance of each weight, in the shapes of the matrices; the smallest are pruned first."""
        if self.criterion == "magnitude":
            return [full_tensor(weight.detach()).abs() for weight in self._weights]
        sizes = [full_tensor(mean).abs() for mean in self._mean]
        # A matrix of equal entries has no spread: the clamp keeps its scores from 0 / 0.
        return [size / size.std().clamp_min(torch.finfo(size.dtype).tiny) for size in sizes]

    def _mask_smallest(self, wanted: int) -> None:
        """Grow the masks to the `wanted` lowest scores; masked weights score -inf and so come first."""
        scores = [
            score.masked_fill(~full_tensor(mask), -torch.inf).flatten()
            for score, mask in zip(self._scores(), self._masks, strict=True)
        ]
        chosen, threshold = _smallest(torch.cat(scores), wanted)
        parts = torch.split(chosen, [mask.numel() for mask in self._masks])
        for mask, part in zip(self._masks, parts, strict=True):
            mask.logical_and_(laid_out_like(mask, ~part.view(mask.shape)))
        self._masked = self._count_masked()
        if self.criterion == "evolution":
            self.threshold_r = float(threshold)

    def _count_masked(self) -> int:
        alive = torch.stack([full_tensor(torch.count_nonzero(mask)) for mask in self._masks]).sum()
        return self._total - int(alive)

    def check_state(self, state: object) -> None:
        """Raise `ValueError` for a state that `load_state_dict` cannot load: of another model, criterion or form."""
        saved = _SavedMasks.from_json(state)  # type: ignore[arg-type]
        if saved.criterion != self.criterion:
            raise ValueError(f"criterion of the state must be {self.criterion!r}, got {shown(saved.criterion)}")
        for what, tensors, own in (("masks", saved.masks, self._masks), ("mean", saved.mean, self._mean)):
            expected = {name: tuple(each.shape) for name, each in zip(self._names, own, strict=False)}
            received = {name: tuple(getattr(each, "shape", ())) for name, each in tensors.items()}
            if expected != received:
                names = printable(", ".join(sorted(name for name, _ in expected.items() ^ received.items())))
                raise ValueError(f"{what} of the state must fit the model's matrices, they differ in {names}")
        if odd := [name for name, mask in saved.masks.items() if mask.dtype != torch.bool]:
            raise ValueError(f"masks of the state must be bool, got {saved.masks[odd[0]].dtype}")
        for name, present in zip(self._names, self._mean, strict=False):
            mean = saved.mean[name]
            if mean.dtype != present.dtype or not bool(torch.isfinite(mean).all()):
                raise ValueError(f"mean of the state must hold finite numbers of {present.dtype} for {name}")


def _widened(weight: Tensor) -> Tensor:
    """Return `weight` itself in float32 or wider: a long mean in bfloat16 would stop moving."""
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


def _smallest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Choose exactly `count` >= 1 of `scores` [n], the smallest; ties go to the lowest index.

    Returns:
        The choice, bool [n], and the largest chosen score, [].
    """
    threshold = scores.kthvalue(count).values
    chosen = scores < threshold
    ties = (scores == threshold).nonzero().squeeze(1)
    chosen[ties[: count - int(chosen.sum())]] = True
    return chosen, threshold
