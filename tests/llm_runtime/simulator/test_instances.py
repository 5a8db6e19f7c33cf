"""Random numbers that belong to a run: the same alone and among thousands, and random enough."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import kstest

from trainpilot.llm_runtime.simulator.instances import Keys, mix, normals, run_keys, uniforms

GOLDEN = 0x9E3779B97F4A7C15


def keys(n_runs: int, seed: int = 0, episode: int = 1) -> Keys:
    return run_keys(seed, np.arange(n_runs), np.full(n_runs, episode))


def test_mixing_is_that_of_splitmix64() -> None:
    # Published outputs of SplitMix64 for the seed 1234567: its state grows by the golden ratio before each.
    states = np.array([(1_234_567 + i * GOLDEN) % 2**64 for i in range(3)], dtype=np.uint64)

    assert mix(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_a_run_alone_meets_the_numbers_that_it_meets_among_many() -> None:
    many = normals(keys(1_000), np.arange(1_000) % 7, 12)
    alone = normals(run_keys(0, np.array([612]), np.array([1])), 612 % 7, 12)

    assert (many[612] == alone[0]).all()


@pytest.mark.parametrize("other", [keys(50, seed=1), keys(50, episode=2), keys(100)[50:]])
def test_another_seed_episode_or_row_has_other_numbers(other: Keys) -> None:
    assert not set(uniforms(keys(50), 3, 4).ravel()) & set(uniforms(other, 3, 4).ravel())


def test_every_interval_and_channel_has_its_own_numbers() -> None:
    drawn = [uniforms(keys(20), counter, 5) for counter in range(40)]

    assert len(np.unique(drawn)) == 20 * 40 * 5


def test_a_channel_does_not_depend_on_how_many_there_are() -> None:
    assert (uniforms(keys(9), 2, 3) == uniforms(keys(9), 2, 8)[:, :3]).all()


def test_uniforms_are_uniform_and_never_0_or_1() -> None:
    drawn = uniforms(keys(5_000), 1, 10)

    assert drawn.shape == (5_000, 10)
    assert 0 < drawn.min() < 1e-3
    assert 0.999 < drawn.max() < 1
    assert kstest(drawn.ravel(), "uniform").pvalue > 0.01


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_normals_are_normal(channels: int) -> None:
    drawn = normals(keys(20_000), 4, channels)

    assert drawn.shape == (20_000, channels)
    assert kstest(drawn.ravel(), "norm").pvalue > 0.01


def test_rows_intervals_and_channels_are_not_correlated() -> None:
    n_runs = 10_000
    first, second = normals(keys(n_runs), 1, 4), normals(keys(n_runs), 2, 4)
    columns = np.concatenate([first, second, np.roll(first, 1, axis=0)], axis=1)
    correlation = np.corrcoef(columns, rowvar=False) - np.eye(12)

    assert np.abs(correlation).max() < 5 / np.sqrt(n_runs)
