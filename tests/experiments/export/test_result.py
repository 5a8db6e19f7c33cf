"""The figures of an export follow from its measurements."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from trainpilot.experiments.export.result import ExportResult, ExportRow, cells, explanations, markdown, signed_percent
from trainpilot.llm_runtime.export.inference import RequestCost
from trainpilot.llm_runtime.timing import Cost


def cost(time_s: float, energy_j: float | None, spread: float = 1.0) -> RequestCost:
    return RequestCost(
        prompt_tokens=128,
        new_tokens=64,
        prefill=Cost(time_s=time_s / 5, energy_j=None if energy_j is None else energy_j / 5),
        request=Cost(time_s=time_s, energy_j=energy_j),
        energy_source=None if energy_j is None else "estimated",
        spread=spread,
    )


ROW = ExportRow(
    format="int4",
    about="4-bit integers",
    folder="int4",
    runtime="transformers on cpu, float32",
    weight_bytes=150_000,
    packed_bytes=None,
    bits_per_weight=4.5,
    test_loss=2.1,
    cost=cost(0.8, 4.0),
    unquantised_loss=2.0,
    unquantised_cost=cost(1.0, 10.0),
)
FP32 = replace(
    ROW, format="fp32", folder=None, weight_bytes=1_000_000, bits_per_weight=32, test_loss=2.0, cost=cost(1.0, 10.0)
)
RESULT = ExportResult(
    source="runs/base",
    architecture="llama",
    n_parameters=250_000,
    trained_tokens=1_000_000,
    text=("stdlib",),
    test_tokens=8192,
    sequence_length=64,
    run_test_loss=2.0,
    group_size=32,
    device="cpu",
    threads=1,
    energy_meter="a meter",
    rows=(FP32, ROW),
)


def test_the_score_by_hand() -> None:
    # P = exp(0.1), T = 0.8 and E = 0.4: exp(0.15) x 0.6.
    assert ROW.perplexity_ratio == pytest.approx(1.10517, rel=1e-5)
    assert ROW.time_ratio == pytest.approx(0.8)
    assert ROW.energy_ratio == pytest.approx(0.4)
    assert ROW.score == pytest.approx(math.exp(0.15) * 0.6)
    assert FP32.score == 1


def test_without_joules_the_time_counts_alone() -> None:
    row = replace(ROW, cost=cost(0.8, None))

    assert row.energy_ratio is None
    assert row.score == pytest.approx(math.exp(0.15) * 0.8)
    assert replace(ROW, cost=None).score is None


def test_cells_by_hand() -> None:
    found = cells(ROW, 1_000_000)

    assert found["MB"] == "0.15"
    assert found["of fp32"] == "0.150"
    assert found["ppl"] == "+10.52 %"
    assert found["prefill"] == "800"  # 128 tokens in 0.16 s
    assert found["decode"] == "100"  # 64 tokens in 0.64 s
    assert found["mJ/new"] == "50"  # 3.2 J for 64 tokens
    assert found["score"] == "0.697"
    assert cells(replace(ROW, packed_bytes=120_000, cost=None), 1_000_000)["MB"] == "~0.12"


def test_a_percentage_of_zero_has_no_sign() -> None:
    assert signed_percent(-0.00001) == "0.00 %"
    assert signed_percent(-0.001) == "-0.10 %"


def test_the_file_holds_fields_and_figures() -> None:
    content = RESULT.content()
    rows = content["rows"]

    assert isinstance(rows, list)
    assert rows[1]["score"] == ROW.score
    assert rows[1]["decode_j_per_token"] == pytest.approx(0.05)
    assert ExportResult.from_json(RESULT.to_json()).to_json() == RESULT.to_json()


def test_the_page_says_what_the_figures_are() -> None:
    page = markdown(RESULT)

    assert "trained on 4 tokens per parameter" in page
    assert "| int4 | 0.15 |" in page
    assert "a meter. Such joules are seconds times an assumed power" in page
    assert "Other programs" not in page


def test_a_busy_machine_and_what_was_left_out_are_told() -> None:
    busy = replace(ROW, cost=cost(0.8, 4.0, spread=3.0))
    told = " ".join(explanations(replace(RESULT, rows=(busy, busy), left_out={"gguf-q8": "needs the package gguf"})))

    assert "Other programs were busy (slowest request 3.0 times the fastest)" in told
    assert "gguf-q8: left out, as it needs the package gguf." in told
