"""The random numbers of a run are its own, on every kind of device."""

from __future__ import annotations

import pytest
import torch

from trainpilot.llm_runtime.process import RandomState, random_apart

CPU, MPS = torch.device("cpu"), torch.device("mps")


@pytest.fixture
def generator(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Stand in for the generator of Apple's GPU; its state is one number."""
    state = [7]
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: torch.tensor(state))
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda new: state.__setitem__(0, int(new)))
    return state


def test_random_numbers_are_put_back_also_after_an_error() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)

    def draw_and_fail() -> None:
        with random_apart(CPU):
            torch.rand(5)
            raise RuntimeError("in between")

    with pytest.raises(RuntimeError, match="in between"):
        draw_and_fail()
    assert torch.equal(torch.rand(3), expected)


def test_those_of_apple_s_gpu_are_put_back_too(generator: list[int]) -> None:
    with random_apart(MPS):
        generator[0] = 8

    assert generator == [7]


def test_a_run_goes_on_with_its_own_on_apple_s_gpu(generator: list[int]) -> None:
    run = RandomState(MPS, seed=0)
    with run.in_force():
        generator[0] = 9
    assert generator == [7]
    again = RandomState(MPS, seed=1)
    again.load_state_dict(run.state_dict())
    with again.in_force():
        assert generator == [9]
