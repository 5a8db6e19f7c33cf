"""Round weight matrices to few bits: to integers in groups, to powers of two, or to binary codes.

All functions take matrices whose rows are outputs and return matrices in float32 whose values lie on the grid of the
format; `bits_per_weight` of each says what a packed file needs. Nothing here is packed or faster: that is up to
a format with a kernel. Export uses these formulas, and training that anticipates it must use the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

GROUP_SIZES = (128, 64, 32)
"""Weights that share a scale; the sizes that kernels for packed integers support."""
EXPONENT_BITS = 8
"""Bits of the exponent that a row of powers of two, or of binary codes, has."""


@dataclass(frozen=True, kw_only=True)
class IntegerCodes:
    """A matrix as small integers with a scale per group: weight = code * scale."""

    codes: Tensor
    """Whole numbers in [-2^(bits - 1), 2^(bits - 1) - 1], float32 of shape (rows, columns)."""
    scales: Tensor
    """Float32 of shape (rows, groups)."""

    def weights(self) -> Tensor:
        """Return the rounded matrix, float32 of shape (rows, columns)."""
        return (_grouped(self.codes, self.scales.shape[1]) * self.scales[:, :, None]).reshape(self.codes.shape)


def group_size_for(columns: Iterable[int], wanted: int) -> int | None:
    """Return the largest of `GROUP_SIZES` up to `wanted` that divides all numbers of columns; `None` for whole rows."""
    widths = set(columns)
    fitting = [size for size in GROUP_SIZES if size <= wanted and all(width % size == 0 for width in widths)]
    return max(fitting, default=None)


def integer_codes(weight: Tensor, bits: int, group_size: int | None, scale_type: torch.dtype) -> IntegerCodes:
    """Round a matrix to integers of `bits` bits, symmetrically, with one scale per group of a row.

        scale = max |w| / (2^(bits - 1) - 1/2),   code = round(w / scale)

    The largest weight of a group so lies half a step outside of the integers: all of them are used, and no error is
    above half a step, as in compressed-tensors and torchao.

    Args:
        weight: Shape (rows, columns).
        bits: From 2 to 8.
        group_size: Neighbouring weights of a row that share a scale; `None` for a whole row.
        scale_type: The scales are rounded to this type before they are used.

    Raises:
        ValueError: `bits` or `group_size` cannot be used.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be in [2, 8], got {bits}")
    grouped = _grouped(weight.detach().float(), _n_groups(weight, group_size))
    half = 2 ** (bits - 1)
    scales = (grouped.abs().amax(dim=2) / (half - 0.5)).to(scale_type).float()
    steps = grouped / scales.where(scales > 0, torch.ones_like(scales))[:, :, None]
    return IntegerCodes(codes=steps.round().clamp(-half, half - 1).reshape(weight.shape), scales=scales)


def integer_bits_per_weight(bits: int, group_size: int | None, columns: int, scale_bits: int = 16) -> float:
    """Return the bits of a weight in `integer_codes`, with its share of the scale."""
    return bits + scale_bits / (group_size or columns)


def powers_of_two(weight: Tensor, terms: int = 1, levels: int = 7) -> Tensor:
    """Round every weight to 0 or to a signed power of two, or to a sum of `terms` of them, so that products are shifts.

    The exponents of a row span `levels` powers, down from the one nearest to its largest weight. Each further term is
    the rounded rest of those before it, within the same exponents. Midpoints between two powers go up.

    Args:
        weight: Shape (rows, columns).
        terms: Powers that are added up, at least 1.
        levels: Powers per term, at least 1.
    """
    exact = weight.detach().float()
    top = _nearest_exponent(exact.abs().amax(dim=1, keepdim=True))
    rounded = torch.zeros_like(exact)
    for _ in range(terms):
        rest = exact - rounded
        exponent = _nearest_exponent(rest).minimum(top)
        smallest = torch.exp2(top - levels + 1)
        power = torch.exp2(exponent.maximum(top - levels + 1)) * rest.sign()
        rounded += power.where(rest.abs() >= smallest / 2, torch.zeros_like(power))
    return rounded


def power_bits_per_weight(columns: int, terms: int = 1, levels: int = 7) -> float:
    """Return the bits of a weight in `powers_of_two`: per term a sign and a level or zero, and the row's exponent."""
    return terms * (1 + levels.bit_length()) + EXPONENT_BITS / columns


def binary_codes(weight: Tensor, bits: int, group_size: int | None, rounds: int = 8) -> Tensor:
    """Approximate each group by a sum of `bits` sign vectors, each with a scale: w = sum_k a_k b_k, b_k in {-1, +1}.

    Codes and scales are fitted in turn, from a greedy start (Xu et al. 2018, "Alternating Multi-bit Quantization"). As
    in ShiftAddLLM (You et al. 2024), scales are sums of two powers of two (`_two_powers`), so that a product
    is two shifts and the rest of the work additions. Unlike there, inputs play no part in the fit.

    Args:
        weight: Shape (rows, columns).
        bits: Sign vectors, from 1 to 4.
        group_size: Neighbouring weights of a row that share the scales; `None` for a whole row.
        rounds: Fits of the scales.

    Raises:
        ValueError: `bits` or `group_size` cannot be used.
    """
    if not 1 <= bits <= 4:
        raise ValueError(f"bits must be in [1, 4], got {bits}")
    exact = weight.detach().float()
    groups = _grouped(exact, _n_groups(exact, group_size))
    top = _nearest_exponent(exact.abs().amax(dim=1))[:, None, None]  # (rows, 1, 1)
    choices = torch.arange(bits, device=exact.device)
    codes = torch.arange(2**bits, device=exact.device)[:, None] >> choices & 1
    signs = 2.0 * codes - 1  # (2^bits, bits), every combination
    chosen, rest = [], groups
    for _ in range(bits):
        chosen.append(torch.where(rest >= 0, 1.0, -1.0))
        rest = rest - rest.abs().mean(dim=2, keepdim=True) * chosen[-1]
    vectors = torch.stack(chosen, dim=3)  # (rows, groups, group size, bits)
    ridge = 1e-4 * torch.eye(bits, device=exact.device)
    for _ in range(rounds):
        transposed = vectors.transpose(2, 3)
        fitted = torch.linalg.solve(transposed @ vectors + ridge, transposed @ groups[..., None])[..., 0]
        scales = _two_powers(fitted, top)  # (rows, groups, bits)
        values, order = (scales @ signs.T).sort(dim=2)  # (rows, groups, 2^bits)
        middles = (values[..., 1:] + values[..., :-1]) / 2
        place = torch.searchsorted(middles.contiguous(), groups.contiguous())  # of the nearest value
        vectors = signs[order.gather(2, place)]
    return values.gather(2, place).reshape(weight.shape)


def binary_bits_per_weight(bits: int, group_size: int | None, columns: int) -> float:
    """Return the bits of a weight in `binary_codes`, with its share of the scales of 8 bits and the row's exponent."""
    return bits * (1 + 8 / (group_size or columns)) + EXPONENT_BITS / columns


def _two_powers(scales: Tensor, top: Tensor) -> Tensor:
    """Round each scale to 2^a, or to 2^a +- 2^(a - d) with d from 1 to 7; a is at most 15 below `top`.

    That makes 8 bits: 4 for a below the row's exponent, 3 for d or none, and the sign of the second power. A negative
    scale is a positive one with its sign vector turned round.
    """
    size = scales.abs()
    first = _nearest_exponent(size).minimum(top).maximum(top - 15)
    rest = size - torch.exp2(first)
    second = _nearest_exponent(rest).minimum(first - 1)
    addend = torch.exp2(second) * rest.sign()
    return torch.exp2(first) + addend.where(second >= first - 7, torch.zeros_like(addend))


def _nearest_exponent(values: Tensor) -> Tensor:
    """Return the exponent of the power of two that is nearest to |value|; a very low one for 0."""
    return torch.floor(torch.log2(values.abs().clamp_min(2.0**-100) * (4 / 3)))


def _n_groups(weight: Tensor, group_size: int | None) -> int:
    columns = weight.shape[1]
    if group_size is not None and (group_size < 1 or columns % group_size):
        raise ValueError(f"group_size must divide the {columns} columns of the matrix, got {group_size}")
    return 1 if group_size is None else columns // group_size


def _grouped(weight: Tensor, n_groups: int) -> Tensor:
    return weight.reshape(weight.shape[0], n_groups, -1)
