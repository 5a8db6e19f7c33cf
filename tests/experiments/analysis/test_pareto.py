from __future__ import annotations

import numpy as np
import pytest

from trainpilot.experiments.analysis.pareto import (
    REFERENCE_POINT,
    Objectives,
    expected_utility,
    hypervolume,
    igd_plus,
    on_front,
    set_quality,
)

STAIRS: list[Objectives] = [(1, 3), (2, 2), (3, 1)]


def random_points(seed: int) -> list[Objectives]:
    """Return points on a coarse grid, so that equals and ties in one objective occur."""
    rng = np.random.default_rng(seed)
    found = rng.integers(1, 8, size=(rng.integers(1, 20), 2)) / 2
    return [(float(x), float(y)) for x, y in found]


def dominates(one: Objectives, other: Objectives) -> bool:
    return one[0] <= other[0] and one[1] <= other[1] and one != other


def test_three_stairs_dominate_six_squares() -> None:
    # 3 x 1 above (1, 3), then 2 x 1 and 1 x 1 to its right: 3 + 2 + 1.
    assert hypervolume(STAIRS, (4, 4)) == pytest.approx(6)


def test_the_tuned_static_alone_dominates_nine() -> None:
    assert REFERENCE_POINT == (4, 4)
    assert hypervolume([(1, 1)]) == pytest.approx(9)


def test_points_beyond_the_reference_point_add_nothing() -> None:
    assert hypervolume([(5, 0.5), (1, 4)]) == 0
    assert hypervolume([*STAIRS, (0.5, 4.5)]) == pytest.approx(6)


def test_the_distance_counts_only_what_is_worse() -> None:
    # (2, 3) is worse than (1, 3) by 1, than (2, 2) by 1, than (3, 1) by 2; the mean is 4/3.
    assert igd_plus([(2, 3)], STAIRS) == pytest.approx(4 / 3)
    assert igd_plus(STAIRS, STAIRS) == 0
    assert igd_plus([(0.5, 0.5)], STAIRS) == 0


def test_utility_is_what_the_best_point_saves_on_average() -> None:
    assert expected_utility([(1, 1)]) == pytest.approx(0)
    assert expected_utility([(0.9, 0.9)]) == pytest.approx(0.1)
    assert expected_utility([(0.9, 1.1)]) == pytest.approx(0)
    # The better of two opposite points saves 0.1 |2 w - 1|, which is 0.05 on average.
    assert expected_utility([(0.9, 1.1), (1.1, 0.9)]) == pytest.approx(0.05)


def test_a_set_without_points_counts_as_one_at_the_reference_point() -> None:
    found = set_quality([], [(1, 1)])

    assert found.hypervolume == 0
    assert found.igd_plus == pytest.approx(np.hypot(3, 3))
    assert found.expected_utility == pytest.approx(-3)


@pytest.mark.parametrize("seed", range(60))
def test_the_front_is_exactly_what_nothing_dominates(seed: int) -> None:
    points = random_points(seed)

    found = on_front(points)

    assert found == [not any(dominates(other, point) for other in points) for point in points]


def test_equal_points_all_stay_on_the_front() -> None:
    assert on_front([(1, 2), (1, 2), (2, 1), (2, 2)]) == [True, True, True, False]


def test_no_points_have_no_front() -> None:
    assert on_front([]) == []


@pytest.mark.parametrize("seed", range(30))
def test_dominated_points_change_neither_volume_nor_utility(seed: int) -> None:
    points = random_points(seed)
    front = [point for point, best in zip(points, on_front(points), strict=True) if best]

    assert hypervolume(points) == pytest.approx(hypervolume(front))
    assert expected_utility(points) == pytest.approx(expected_utility(front))
    assert igd_plus(points, front) == 0


@pytest.mark.parametrize("seed", range(30))
def test_a_better_set_is_better_by_every_measure(seed: int) -> None:
    points = random_points(seed)
    better = [(x * 0.9, y * 0.9) for x, y in points]
    best = [point for point, kept in zip(better, on_front(better), strict=True) if kept]
    worse_set, better_set = set_quality(points, best), set_quality(better, best)

    assert better_set.hypervolume >= worse_set.hypervolume
    assert better_set.igd_plus <= worse_set.igd_plus
    assert better_set.expected_utility > worse_set.expected_utility
