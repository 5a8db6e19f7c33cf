"""A run's name tells what was run and nothing else; what came out of it goes to JSON and back."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from typing import Any

import pytest
from comparison_runs import CASE, CONFIG, made_interval, made_result

from trainpilot.experiments.results import (
    FORMAT,
    Comparison,
    MethodNote,
    Row,
    RunResult,
    RunSpec,
    SteeringSpec,
    TunedBaseline,
    cost_key,
)
from trainpilot.llm_runtime.config import RunConfig

SPEC = RunSpec(config=CONFIG)
OTHER: dict[str, Any] = {
    "vocabulary": 2048,
    "tokens": 25_600,
    "batch_size": 4,
    "sequence_length": 8,
    "base_learning_rate": 2e-3,
    "schedule": "linear",
    "warmup_tokens": 128,
    "precision": "bf16",
    "pruning": "magnitude",
    "decisions": 5,
    "optimizer": "prodigy",
    "weight_decay": 0.0,
    "beta1": 0.8,
    "beta2": 0.99,
    "gradient_clip": 0.5,
    "seed": 1,
    "device": "auto",
}
"""Another value for every field of a run but its model and its text, which count by their content."""


# Keys


def test_equal_runs_have_one_key() -> None:
    settings = {"alpha": 2, "window": 5}
    one = RunSpec(config=CONFIG, steering=SteeringSpec(kind="seesaw", settings=settings))
    same = RunSpec(
        config=replace(CONFIG), steering=SteeringSpec(kind="seesaw", settings=dict(reversed(settings.items())))
    )

    assert one.key("content") == same.key("content")


def test_a_key_is_a_file_name_and_the_same_on_every_machine() -> None:
    # Another value here means that every run kept so far is run again.
    assert SPEC.key("content") == "39a0929f6a3c7518848b"


COMPANIONS: dict[str, tuple[dict[str, Any], Any]] = {
    "budget": ({"warmup_tokens": None}, "60s"),
    "warmup_share": ({"warmup_tokens": None}, 0.3),
    "pruning_importance": ({"pruning": "width"}, "activation"),
    "teacher": ({}, "teacher"),
    "distillation_weight": ({"teacher": "teacher"}, 0.3),
    "distillation_temperature": ({"teacher": "teacher"}, 2.0),
}
"""The same for fields that not every value of the others goes with: the others' values first."""


def test_the_key_tells_what_every_field_of_the_run_is() -> None:
    assert {field.name for field in fields(RunConfig)} == {*OTHER, *COMPANIONS, "model", "text"}

    keys = [RunSpec(config=replace(CONFIG, **{name: value})).key("content") for name, value in OTHER.items()]
    assert len({SPEC.key("content"), *keys}) == 1 + len(OTHER)
    for name, (others, value) in COMPANIONS.items():
        base = replace(CONFIG, **others)
        changed = replace(base, **{name: value})
        assert RunSpec(config=changed).key("content") != RunSpec(config=base).key("content"), name


def test_model_and_text_count_by_their_content_and_not_by_their_place() -> None:
    elsewhere = RunSpec(config=replace(CONFIG, model="/elsewhere/model.json", text=("/elsewhere/text.txt",)))

    assert elsewhere.key("content") == SPEC.key("content")
    assert SPEC.key("other content") != SPEC.key("content")


@pytest.mark.parametrize(
    "steering",
    [
        SteeringSpec(kind="plateau"),
        SteeringSpec(settings={"factor": 0.5}),
        SteeringSpec(probe=True),
        SteeringSpec(evaluate_every=2),
    ],
)
def test_the_key_tells_who_steers(steering: SteeringSpec) -> None:
    assert RunSpec(config=CONFIG, steering=steering).key("content") != SPEC.key("content")


def test_a_policy_counts_by_its_digest_and_not_by_its_path() -> None:
    def key(**settings: str) -> str:
        return RunSpec(config=CONFIG, steering=SteeringSpec(kind="policy", settings=settings)).key("content")

    here = key(path="here/policy.safetensors", digest="ab", preference="quality=1")
    assert here == key(path="there/policy.safetensors", digest="ab", preference="quality=1")
    assert here != key(path="here/policy.safetensors", digest="cd", preference="quality=1")
    assert here != key(path="here/policy.safetensors", digest="ab", preference="time=1")


def test_a_cost_table_belongs_to_a_model_and_a_sequence_length() -> None:
    assert cost_key(CONFIG) == "llama-nano, 16 tokens"
    assert cost_key(replace(CONFIG, batch_size=4, seed=3, precision="bf16")) == cost_key(CONFIG)
    assert cost_key(replace(CONFIG, sequence_length=8)) != cost_key(CONFIG)
    assert cost_key(replace(CONFIG, vocabulary=2048)) == "llama-nano, 16 tokens, vocabulary 2048"


def test_a_vocabulary_is_another_run() -> None:
    assert RunSpec(config=replace(CONFIG, vocabulary=2048)).key("content") != RunSpec(config=CONFIG).key("content")


# JSON


def through_json(record: Any) -> Any:
    return json.loads(json.dumps(record, allow_nan=False))


def test_a_result_goes_to_json_and_back() -> None:
    settings = {"schedule": [{"share": 0.0, "precision": None}, {"share": 0.5, "precision": "bf16"}]}
    spec = RunSpec(config=CONFIG, steering=SteeringSpec(kind="open-loop", settings=settings))
    intervals = (
        made_interval(CONFIG, tokens=6_400, validation_loss=None, energy_j=None, evaluation_energy_j=None),
        made_interval(CONFIG, tokens=12_800, finishing=True),
    )
    result = made_result(spec, intervals=intervals, energy_source=None)

    again = RunResult.from_json(through_json(result.to_json()))

    assert again == result
    assert again.tokens == 12_800
    assert again.usable


def test_a_result_from_before_there_were_guardrails_is_read() -> None:
    settings = {"path": "policy.safetensors", "digest": "ab", "preference": "quality=1"}
    result = made_result(RunSpec(config=CONFIG, steering=SteeringSpec(kind="policy", settings=settings, probe=True)))
    record = through_json(result.to_json())
    del record["guardrails"], record["intervals"]["rolled_back"]

    assert RunResult.from_json(record) == result


def test_what_is_not_finite_becomes_unknown() -> None:
    broken = made_interval(CONFIG, train_loss=math.nan, validation_loss=math.inf, learning_rate=1e-3)
    again = RunResult.from_json(through_json(made_result(SPEC, None, intervals=(broken,)).to_json()))

    assert again.intervals[0].train_loss is None
    assert again.intervals[0].validation_loss is None
    assert again.intervals[0].learning_rate == pytest.approx(1e-3)
    assert again.diverged
    assert not again.usable


def test_a_run_that_failed_has_no_intervals_and_no_tokens() -> None:
    result = made_result(SPEC, None, diverged=False, failure="RuntimeError: no memory", intervals=())
    again = RunResult.from_json(through_json(result.to_json()))

    assert again == result
    assert again.tokens == 0
    assert not again.usable


@pytest.mark.parametrize(
    "changes",
    [
        {"format": FORMAT + 1},
        {"format": None},
        {"intervals": {"tokens": [1, 2], "steps": [1]}},
        {"intervals": {"tokens": [1]}},
        {"intervals": None},
        {"colour": "red"},
        {"spec": {"config": {"text": ["stdlib"], "tokens": -5}, "steering": {}}},
        {"spec": {"config": {"text": ["stdlib"], "colour": "red"}, "steering": {}}},
        {"spec": {"config": {}, "steering": {}}},
    ],
)
def test_what_is_no_result_is_refused(changes: dict[str, Any]) -> None:
    record = made_result(SPEC).to_json() | changes
    with pytest.raises((ValueError, KeyError, TypeError, AttributeError)):
        RunResult.from_json(record)


def test_a_record_without_its_format_is_refused() -> None:
    record = made_result(SPEC).to_json()
    del record["format"]
    with pytest.raises(KeyError):
        RunResult.from_json(record)


def test_a_comparison_goes_to_json_and_back() -> None:
    note = MethodNote(
        name="cosine",
        title="cosine",
        description="The default.",
        family="cosine",
        kind="untuned",
        training_energy_j=5.0,
    )
    baseline = TunedBaseline(
        method="tuned", axis="tokens", config=CONFIG, search="grid", n_trials=3, on_edge=("learning_rate",)
    )
    comparison = Comparison(
        cases=(CASE, replace(CASE, name="other", target_loss=2.5)),
        methods=(note,),
        seeds=(0, 1),
        rows=(Row(case="made", method="check-budget", role="method", seed=0, budget=1.25, key="ab"),),
        baselines={"made": (baseline,)},
        provenance={"jobs": 2},
    )

    assert Comparison.from_json(through_json(comparison.to_json())) == comparison
