"""A bundle from a stranger is refused in one line, at once, whatever is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from policies import N_INPUTS, random_weights
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_tensors

from trainpilot.agents.bundle import BaseSchedule, PolicyBundle, field_tables

TABLES = field_tables()


def refusal(path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        PolicyBundle.load(path)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 1_500
    return message


def refused(tmp_path: Path, header: str, weights: dict[str, np.ndarray] | None = None) -> str:
    save_file(random_weights() if weights is None else weights, tmp_path / "p.safetensors", {"trainpilot": header})
    return refusal(tmp_path / "p.safetensors")


def header(provenance: str = "{}", **changes: Any) -> str:
    plain = json.dumps({"format": 1, "fields": TABLES, **changes})
    return f'{plain[:-1]}, "provenance": {provenance}}}'


@pytest.mark.parametrize(
    "fields",
    [None, "x", [], 5, {**TABLES, "actions": 5}, {**TABLES, "actions": None}, {**TABLES, "n_stack": "six"},
     {**TABLES, "actions": ["learning_rate"]}, {**TABLES, "actions": TABLES["actions"] * 2},
     {**TABLES, "observations": [{"name": ["budget_used"]}]}, {**TABLES, "observations": [5]}],
)  # fmt: skip
def test_tables_of_another_form(tmp_path: Path, fields: object) -> None:
    assert refused(tmp_path, header(fields=fields)).startswith("policy: ")


@pytest.mark.parametrize(
    ("provenance", "message"),
    [
        ('"x"', "provenance must hold names and values"),
        ("null", "provenance must hold names and values"),
        ("[1]", "provenance must hold names and values"),
        ("5", "provenance must hold names and values"),
        ('{"decisions": "x"}', "decisions must be a whole number"),
        ('{"decisions": [1]}', "decisions must be a whole number"),
        ('{"decisions": null}', "decisions must be a whole number"),
        ('{"decisions": 0}', "decisions must be a whole number"),
        ('{"decisions": -5}', "decisions must be a whole number"),
        ('{"decisions": NaN}', "decisions must be a whole number"),
        ('{"decisions": Infinity}', "decisions must be a whole number"),
        ('{"start_scale": NaN}', "start_scale must be a number"),
        ('{"base_schedule": {"schedule": ["wsd"], "warmup_share": 0}}', "schedule must be one of"),
        ('{"base_schedule": {"schedule": "wsd"}}', "base_schedule: "),
        ('{"training_cost": {"x": 1' + 400 * "0" + "}}", "whole numbers must be at most"),
        ('{"training_cost": {"x": 1' + 10_000 * "0" + "}}", "is not a trainpilot bundle"),
        ('{"training_cost": {"energy_j": "much"}}', "energy_j must be a number >= 0"),
        ('{"domain": {"batch_size": [1]}}', "batch_size must be names or two rising numbers"),
        ('{"domain": {"base_schedule": {}}}', "domain: base_schedule"),
        ('{"simulator": {"widening": {"budget": [2, "x"]}}}', "budget must be two rising numbers"),
        ('{"simulator": {"widening": 5}}', "widening must hold names and values"),
        ('{"a": ' + 3_000 * "[" + 3_000 * "]" + "}", "nested more than"),
        ('{"a": "\\ud800"}', "lone surrogate"),
        ("{" + ",".join(f'"k{i}": {i}' for i in range(200_000)) + "}", "more than 100,000 values"),
    ],
)
def test_provenance_that_cannot_be(tmp_path: Path, provenance: str, message: str) -> None:
    assert message in refused(tmp_path, header(provenance))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"action.bias": np.zeros((19, 1), "f4")}, "action must map"),
        ({"action.bias": np.zeros((19, 7), "f4")}, "action must map"),
        ({"action.bias": np.zeros((), "f4")}, "action must map"),
        ({"action.weight": np.zeros((19, 3, 2), "f4")}, "action must map"),
        ({"action.bias": np.full(19, 3e38, "f4")}, "weights of at most 10000, got 3e+38"),
        ({"hidden.0.weight": np.zeros((0, N_INPUTS), "f4"), "hidden.0.bias": np.zeros(0, "f4")}, "hidden.0 must map"),
        ({"action.bias": np.zeros(19, "f8")}, "weights must be F32, got F64"),
        ({"extra": np.zeros(19, "f4")}, "must be those of hidden layers and of action"),
    ],
)
def test_weights_that_cannot_be(tmp_path: Path, changed: dict[str, np.ndarray], message: str) -> None:
    assert message in refused(tmp_path, header(), random_weights() | changed)


def test_weights_in_eight_bits(tmp_path: Path) -> None:
    weights = {name: torch.from_numpy(value) for name, value in random_weights().items()}
    weights["action.bias"] = weights["action.bias"].to(torch.float8_e4m3fn)
    save_tensors(weights, tmp_path / "p.safetensors", {"trainpilot": header()})
    assert "weights must be F32, got F8_E4M3" in refusal(tmp_path / "p.safetensors")


def test_the_largest_weights_give_finite_logits(tmp_path: Path) -> None:
    weights = {name: np.full_like(value, 1e4) for name, value in random_weights().items()}
    PolicyBundle(weights).save(tmp_path / "p.safetensors")
    loaded = PolicyBundle.load(tmp_path / "p.safetensors")
    assert np.isfinite(loaded.logits(np.ones(N_INPUTS, np.float32))).all()


@pytest.mark.parametrize("share", [None, "0.1", True, float("nan")])
def test_a_warm_up_that_is_no_number_is_refused(share: Any) -> None:
    with pytest.raises(ValueError, match=r"^warmup_share must be in \[0, 1\), got "):
        BaseSchedule(schedule="wsd", warmup_share=share)
