"""A run unlike those that a policy was trained on is told so, fact by fact."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from trainpilot.agents.bundle import BaseSchedule, PolicyBundle, policy_path
from trainpilot.agents.steering.domain import RunFacts, check_domain, domain_of

STATED = PolicyBundle({}, {"domain": {
    "n_parameters": [1_000_000, 50_000_000], "batch_size": [4, 32], "optimizer": ["AdamW"], "device_type": ["cpu"],
    "fine_tuning": False, "base_schedule": {"schedule": "wsd", "warmup_share": 0.1}, "decisions": [40, 60],
}})  # fmt: skip

INSIDE: dict[str, Any] = {
    "n_parameters": 1_000_000,
    "batch_size": 32,
    "optimizer": "AdamW",
    "device_type": "cpu",
    "fine_tuning": False,
    "base_schedule": BaseSchedule(schedule="wsd", warmup_share=0.1),
    "decisions": 50,
}


def test_a_run_inside_is_not_warned_of() -> None:
    assert check_domain(STATED, RunFacts(**INSIDE)) == []


def test_what_is_unknown_is_not_looked_at() -> None:
    assert check_domain(STATED, RunFacts()) == []
    assert check_domain(PolicyBundle({}, {}), RunFacts(**INSIDE)) == []


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("n_parameters", 135_000_000, "n_parameters 135,000,000 is outside of [1,000,000, 50,000,000]: "),
        ("batch_size", 64, "batch_size 64 is outside of [4, 32]: "),
        ("optimizer", "SGD", "optimizer SGD is outside of AdamW: "),
        ("device_type", "cuda", "device_type cuda is outside of cpu: "),
        ("fine_tuning", True, "fine_tuning True is outside of False: "),
        ("decisions", 20, "decisions 20 is outside of [40, 60]: "),
        (
            "base_schedule",
            BaseSchedule(schedule="linear", warmup_share=0.02),
            "base_schedule linear with 2% warm-up is outside of wsd with 10% warm-up: ",
        ),
    ],
)
def test_each_fact_outside_is_named_with_value_range_and_what_to_expect(name: str, value: Any, said: str) -> None:
    (warning,) = check_domain(STATED, RunFacts(**INSIDE | {name: value}))
    assert warning.startswith(said)
    assert len(warning) > len(said) + 10


def test_strictly_all_of_them_are_raised_in_one_line() -> None:
    facts = RunFacts(**INSIDE | {"batch_size": 64, "optimizer": "SGD"})
    with pytest.raises(ValueError, match=r"batch_size 64.*optimizer SGD") as caught:
        check_domain(STATED, facts, require=True)
    assert "\n" not in str(caught.value)
    assert check_domain(STATED, RunFacts(**INSIDE), require=True) == []


def test_bundle_without_a_domain_has_it_derived_from_its_simulator() -> None:
    provenance = {
        "decisions": 50,
        "base_schedule": {"schedule": "wsd", "warmup_share": 0.1},
        "simulator": {"calibrations": "shipped", "widening": {"spread": 1.0, "budget": [800.0, 12000.0]}},
    }
    domain = domain_of(provenance)
    assert domain["sequences"] == [800.0, 12000.0]
    assert domain["batch_size"] == [4, 32]
    (warning,) = check_domain(PolicyBundle({}, provenance), RunFacts(sequences=100_000, decisions=50))
    assert warning.startswith("sequences 100,000 is outside of [800, 12,000]: ")
    assert domain_of(provenance | {"domain": {"sequences": [1, 2]}})["sequences"] == [1, 2]


def test_larger_instances_widen_the_derived_domain() -> None:
    widening = {"spread": 1.0, "budget": [800.0, 12000.0], "scratch": 0.5, "fine_tuning": 0.0}
    domain = domain_of({"simulator": {"calibrations": "shipped", "widening": widening}})

    assert domain["n_parameters"] == [130_000, 1e10]
    assert domain["batch_size"] == [1, 16_384]
    assert domain["sequences"][0] == 800.0
    assert domain["fine_tuning"] is False
    tuned = domain_of({"simulator": {"calibrations": "shipped", "widening": widening | {"fine_tuning": 0.2}}})
    assert "fine_tuning" not in tuned


def test_the_policy_that_comes_with_trainpilot_has_a_domain() -> None:
    bundle = PolicyBundle.load(policy_path("default"))
    assert bundle.base_schedule is not None
    inside = RunFacts(
        n_parameters=200_000, sequences=4_000, batch_size=16, optimizer="AdamW", decisions=bundle.decisions,
        base_schedule=bundle.base_schedule,
    )  # fmt: skip
    assert check_domain(bundle, inside) == []
    assert check_domain(bundle, replace(inside, n_parameters=10**9, sequences=10**7, batch_size=512)) == []
    assert len(check_domain(bundle, RunFacts(n_parameters=10**11, optimizer="SGD"))) == 2
