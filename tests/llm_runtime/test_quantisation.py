"""Matrices are rounded to the grids that the formulas promise."""

from __future__ import annotations

import pytest
import torch

from trainpilot.llm_runtime.quantisation import (
    binary_bits_per_weight,
    binary_codes,
    group_size_for,
    integer_bits_per_weight,
    integer_codes,
    power_bits_per_weight,
    powers_of_two,
)


def random_matrix(rows: int = 8, columns: int = 64) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def error(rounded: torch.Tensor, exact: torch.Tensor) -> float:
    return float((rounded - exact).norm() / exact.norm())


def test_integers_by_hand() -> None:
    # The scales are 7.5 / 7.5 = 1 and 1.875 / 7.5 = 1/4, so that the largest weights lie half a step beyond an integer.
    found = integer_codes(torch.tensor([[7.5, -3.0, 1.2, 0.0, -1.875, 0.7, 0.3, 0.05]]), 4, 4, torch.float32)

    assert found.scales.tolist() == [[1.0, 0.25]]
    assert found.codes.tolist() == [[7, -3, 1, 0, -8, 3, 1, 0]]
    assert found.weights().tolist() == [[7.0, -3.0, 1.0, 0.0, -2.0, 0.75, 0.25, 0.0]]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group_size", [None, 16])
def test_no_integer_is_more_than_half_a_step_away(bits: int, group_size: int | None) -> None:
    exact = random_matrix()
    found = integer_codes(exact, bits, group_size, torch.float32)
    steps = found.scales.repeat_interleave(group_size or 64, dim=1)

    assert found.codes.min() >= -(2 ** (bits - 1))
    assert found.codes.max() <= 2 ** (bits - 1) - 1
    assert ((found.weights() - exact).abs() <= steps * 0.5001).all()


def test_scales_are_rounded_before_they_are_used() -> None:
    found = integer_codes(random_matrix(), 4, 32, torch.bfloat16)

    assert torch.equal(found.scales, found.scales.bfloat16().float())
    assert torch.equal(found.weights()[:, :32], found.codes[:, :32] * found.scales[:, :1])


def test_a_group_of_zeros_stays_zero() -> None:
    assert integer_codes(torch.zeros(2, 4), 8, 2, torch.bfloat16).weights().tolist() == [[0.0] * 4] * 2
    assert powers_of_two(torch.zeros(2, 4)).tolist() == [[0.0] * 4] * 2


def test_powers_of_two_by_hand() -> None:
    # The largest weight is 1, so the powers are 1, 1/2, ... 1/64, and the midpoints 0.75, 0.375, ..., 1/128.
    exact = torch.tensor([[1.0, 0.8, 0.7, -0.3, 0.1, 0.008, 0.0077, 0.0]])

    assert powers_of_two(exact).tolist() == [[1.0, 1.0, 0.5, -0.25, 0.125, 1 / 64, 0.0, 0.0]]
    # The rests are 0, -0.2, 0.2, -0.05, -0.025, -0.0076, 0.0077 and 0.
    two = [1.0, 1 - 0.25, 0.5 + 0.25, -0.25 - 0.0625, 0.125 - 1 / 32, 1 / 64, 0.0, 0.0]
    assert powers_of_two(exact, terms=2).tolist() == [two]


def test_every_power_of_two_is_one() -> None:
    rounded = powers_of_two(random_matrix())
    exponents = rounded[rounded != 0].abs().log2()

    assert torch.equal(exponents, exponents.round())
    assert exponents.max() - exponents.min() <= 6 + 2  # seven powers, from rows whose largest weights differ


def test_binary_codes_by_hand() -> None:
    # One sign vector: its scale is the mean of |w|, 2.5 = 2 + 1/2.
    assert binary_codes(torch.tensor([[1.0, -2.0, 3.0, -4.0]]), 1, None).tolist() == [[2.5, -2.5, 2.5, -2.5]]
    # Two: 1.5 = 1 + 1/2, 0.5 = 1 - 1/2, which is exact.
    exact = torch.tensor([[1.5, 0.5, -0.5, -1.5]])
    assert torch.equal(binary_codes(exact, 2, None), exact)


def test_binary_codes_have_few_values_and_come_closer_with_more() -> None:
    exact = random_matrix()
    found = [binary_codes(exact, bits, 32) for bits in (1, 2, 3, 4)]
    errors = [error(each, exact) for each in found]

    assert errors == sorted(errors, reverse=True)
    for bits, each in enumerate(found, start=1):
        assert all(len(group.unique()) <= 2**bits for group in each.reshape(-1, 32))


def test_four_bits_of_integers_beat_powers_of_two_and_lose_to_two_terms() -> None:
    exact = random_matrix(64, 128)
    integers = error(integer_codes(exact, 4, 32, torch.bfloat16).weights(), exact)

    assert error(powers_of_two(exact, terms=2), exact) < integers < error(powers_of_two(exact), exact)


def test_bits_per_weight_by_hand() -> None:
    assert integer_bits_per_weight(4, 32, 64) == 4.5
    assert integer_bits_per_weight(8, None, 64) == 8.25
    assert power_bits_per_weight(64) == 4.125  # sign, seven powers or zero, and 8 bits for the row
    assert power_bits_per_weight(64, terms=2) == 8.125
    assert binary_bits_per_weight(3, 32, 64) == 3.875  # 3 signs, 3 scales of 8 bits for 32 weights, 8 bits for the row


@pytest.mark.parametrize(
    ("columns", "wanted", "size"),
    [([64, 192], 128, 64), ([96, 256], 128, 32), ([256], 128, 128), ([64], 32, 32), ([16, 32], 128, None)],
)
def test_the_group_size_divides_all_rows(columns: list[int], wanted: int, size: int | None) -> None:
    assert group_size_for(columns, wanted) == size


def test_what_cannot_be_rounded_is_refused() -> None:
    with pytest.raises(ValueError, match=r"bits must be in \[2, 8\], got 1"):
        integer_codes(torch.ones(1, 4), 1, None, torch.float32)
    with pytest.raises(ValueError, match="group_size must divide the 4 columns of the matrix, got 3"):
        integer_codes(torch.ones(1, 4), 4, 3, torch.float32)
    with pytest.raises(ValueError, match=r"bits must be in \[1, 4\], got 5"):
        binary_codes(torch.ones(1, 4), 5, None)
