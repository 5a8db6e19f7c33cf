"""Methods that make a model cheaper: their names, shapes, refusals and phases, and tiny runs that are trained."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from live_runs import GPT2, LLAMA, case

from trainpilot.agents.heuristics import EarlyStop
from trainpilot.experiments.compare.command import runs_on_a_case
from trainpilot.experiments.compare.compression import CompressedMethod, check_compressed
from trainpilot.experiments.compare.execute import execute
from trainpilot.experiments.compare.methods import DEFAULT_METHODS, choose_methods
from trainpilot.experiments.results import Case, Compression, RunResult, RunSpec
from trainpilot.experiments.run_store import run_key
from trainpilot.llm_runtime.config import ControlLimits, Controls, RunConfig
from trainpilot.llm_runtime.energy.meter import NoMeter
from trainpilot.llm_runtime.export.formats import FORMATS
from trainpilot.llm_runtime.models import load_model

TINY: dict[str, Any] = {"tokens": 640, "decisions": 5}
"""Twenty steps."""


def case_of(folder: Path, model: dict[str, Any] | str = LLAMA, **options: Any) -> Case:
    return Case(name="tiny", config=case(folder, model, **TINY | options), architecture="llama")


def spec_of(name: str, on: Case) -> RunSpec:
    return CompressedMethod.parse(name).spec(on, None, 0)


def trained(spec: RunSpec) -> RunResult:
    found = execute(spec, run_key(spec), meter=NoMeter("a test"))
    assert found.failure is None
    assert RunResult.from_json(json.loads(json.dumps(found.to_json()))) == found
    return found


# Names


def test_names_are_joined_and_none_is_a_default() -> None:
    chosen = choose_methods("cosine,minitron+quantise-int4,prune-ffn@keep=0.25")
    both, share = chosen.compressed

    assert (both.way, both.parts, both.taught, both.format) == ("cut", {"ffn": 0.5, "depth": 0.67}, True, "int4")
    assert both.note.title == "Minitron + int4"
    assert (share.parts, share.note.title, share.note.family) == ({"ffn": 0.25}, "prune ffn 0.25", "prune-ffn")
    assert [method.note.name for method in chosen.direct] == ["cosine"]
    assert not choose_methods("default").compressed
    assert "small" not in DEFAULT_METHODS


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("minitron+distil", "+ may join one way to a small model"),
        ("small+prune-ffn", "+ may join one way to a small model"),
        ("minitron+prune-heads", "+ may join one way to a small model"),
        ("quantise-int8+shift-add", "one rounding"),
        ("minitron+early-stop", "early-stop cannot be joined with a cut"),
        ("minitron+int4", "must be among .*; got 'int4'"),
        ("quantise-int8@keep=0.5", "only one @keep=SHARE may follow what has a small model"),
        ("prune-ffn@keep=1", r"keep must be a share in \(0, 1\), .*got 'prune-ffn@keep=1'"),
        ("prune-ffn@keep=half", "keep must be a share"),
    ],
)
def test_what_cannot_be_joined_is_refused(name: str, says: str) -> None:
    with pytest.raises(ValueError, match=says.replace("+", r"\+")):
        choose_methods(name)


# Refusals on a case


@pytest.mark.parametrize(
    ("name", "model", "options", "says"),
    [
        ("prune-heads", LLAMA, {}, "heads must keep at least one and cut at least one of 1 groups of heads"),
        (
            "prune-heads@keep=0.1",
            LLAMA | {"num_key_value_heads": 2},
            {},
            "heads must keep .* of 2 groups of heads, got 0.1",
        ),
        ("prune-depth@keep=0.2", LLAMA, {}, "depth must keep at least one .* of 2 blocks"),
        ("prune-heads", GPT2, {}, "heads can only be cut in llama, .*got 'gpt2'"),
        ("minitron", LLAMA, {"decisions": 1}, "decisions must be at least 2"),
        ("minitron", LLAMA, {"pruning": "width"}, "pruning must be 'none'"),
        ("quantise-int8", GPT2, {}, "format 'int8' needs layers of nn.Linear"),
    ],
)
def test_a_case_that_a_method_does_not_fit_is_refused(
    name: str, model: dict[str, Any], options: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"case tiny: method {name}: {says}"):
        check_compressed([case_of(tmp_path, model, **options)], [CompressedMethod.parse(name)])


def test_a_missing_package_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "int4", replace(FORMATS["int4"], package="no_such_package"))
    with pytest.raises(ValueError, match=r'needs the package no-such-package, .*pip install "trainpilot\[export\]"'):
        check_compressed([case_of(tmp_path)], [CompressedMethod.parse("minitron+quantise-int4")])


# Shapes, keys and phases


def test_the_small_shape_is_a_plain_run_on_another_config(tmp_path: Path) -> None:
    on = case_of(tmp_path)
    spec = spec_of("small", on)

    assert spec.compression is None
    shape = load_model(spec.config.model, 0).model.config
    assert (shape.intermediate_size, shape.num_hidden_layers, shape.hidden_size) == (16, 1, 16)
    assert spec_of("minitron", on).phases()[-1].config.model == spec.config.model
    assert spec_of("small-ffn+small-depth", on).config == spec.config


def test_keys_change_with_what_is_done_and_not_with_places(tmp_path: Path) -> None:
    on = case_of(tmp_path)
    names = ("minitron", "prune-ffn", "distil", "distil-2x", "quantise-int8", "shift-add", "early-stop")
    keys = {run_key(spec_of(name, on)) for name in names}
    minitron = spec_of("minitron", on)
    assert minitron.compression is not None
    moved = replace(minitron, compression=replace(minitron.compression, small="elsewhere.json"))

    assert len(keys | {run_key(RunSpec(config=on.config))}) == len(names) + 1
    assert run_key(moved) == run_key(minitron)
    assert "compression" not in RunSpec(config=on.config).to_json()


def test_the_budget_is_shared_between_the_models(tmp_path: Path) -> None:
    on = case_of(tmp_path, tokens=3_200, decisions=10)
    whole, small = spec_of("minitron", on).phases()
    assert (whole.decisions, small.decisions) == (6, 4)
    assert (whole.config, small.teacher) == (on.config, on.config)
    assert small.ranked_sequences == 2 * 8_192 // 16  # two parts, each measured on 8,192 tokens

    teacher, student = spec_of("distil", on).phases()
    assert [(each.config.tokens, each.decisions) for each in (teacher, student)] == [(1_920, 6), (1_280, 4)]
    assert [each.config.tokens for each in spec_of("distil-2x", on).phases()] == [3_200, 3_200]
    assert len(spec_of("quantise-int8", on).phases()) == 1
    assert [runs_on_a_case(on, [name], 3) for name in ("distil", "distil-2x", "minitron")] == [3, 6, 3]


# Runs


def test_a_cut_goes_on_from_the_same_weights_and_is_paid_for(tmp_path: Path) -> None:
    on = case_of(tmp_path)
    specs = (RunSpec(config=on.config), spec_of("prune-ffn+prune-depth", on), spec_of("minitron", on))
    plain, cut, taught = map(trained, specs)
    small = spec_of("small", on).config.model

    assert cut.n_parameters == taught.n_parameters == load_model(small, 0).n_parameters < plain.n_parameters
    assert cut.tokens == taught.tokens == plain.tokens == 640
    losses = [[interval.train_loss for interval in run.intervals] for run in (plain, cut, taught)]
    assert losses[0][:3] == losses[1][:3] == losses[2][:3]
    assert losses[0][3] != losses[1][3]
    assert losses[1][4] != losses[2][4]  # the teacher changes the gradient, and so the next losses
    assert cut.intervals[3].switch_time_s > cut.intervals[2].switch_time_s
    assert cut.usable


def test_fewer_heads_keep_their_size_where_the_config_leaves_it_out(tmp_path: Path) -> None:
    # Llama derives the size from the number of heads, so that half of the heads would be twice as large.
    plain = {name: value for name, value in LLAMA.items() if name != "head_dim"}
    plain |= {"num_attention_heads": 4, "num_key_value_heads": 4}
    on = case_of(tmp_path, plain)
    control = load_model(spec_of("small-heads", on).config.model, 0)

    assert (
        trained(spec_of("prune-heads", on)).n_parameters
        == control.n_parameters
        < load_model(on.config.model, 0).n_parameters
    )


def test_a_student_learns_after_its_teacher_in_one_budget(tmp_path: Path) -> None:
    found = trained(spec_of("distil", case_of(tmp_path)))

    assert [interval.tokens for interval in found.intervals] == [128, 256, 384, 512, 640]
    assert found.intervals[2].learning_rate < found.intervals[3].learning_rate  # a schedule of its own
    assert found.final_validation_loss is not None
    assert found.initial_validation_loss is not None


@pytest.mark.parametrize("name", ["quantise-int4", "shift-add-pot"])
def test_a_rounded_model_is_judged_as_it_is_used(name: str, tmp_path: Path) -> None:
    on = case_of(tmp_path)
    plain, found = trained(RunSpec(config=on.config)), trained(spec_of(name, on))

    assert found.unquantised_validation_loss == plain.final_validation_loss
    assert found.final_validation_loss != plain.final_validation_loss
    assert found.final_validation_loss == pytest.approx(plain.final_validation_loss, abs=0.1)
    assert found.final_test_loss == pytest.approx(plain.final_test_loss, abs=0.1)


class LossesInTurn:
    """A run whose state is the number of its interval."""

    def __init__(self) -> None:
        self.config = RunConfig(device="cpu")
        self.state, self.validation_loss = 0, math.inf

    def base_limits(self) -> ControlLimits:
        start = Controls(batch_size=1)
        return ControlLimits(
            start=start, min_batch_size=1, max_batch_size=1, masked_precisions={}, pruning="none", decisions=9
        )

    def snapshot(self) -> dict[str, Any]:
        return {"state": self.state}

    def restore(self, snapshot: dict[str, Any]) -> None:
        self.state = snapshot["state"]


def test_early_stopping_waits_three_readings_and_goes_back() -> None:
    run: Any = LossesInTurn()
    controller = EarlyStop.of_run(run, patience=3)
    stopped = []
    for run.state, loss in enumerate([5.0, 4.0, None, 4.2, 3.9, 4.1, 4.0, 3.95, 3.0], start=1):
        run.validation_loss = loss if loss is not None else run.validation_loss
        telemetry: Any = SimpleNamespace(validation_loss=run.validation_loss)
        if controller.decide(telemetry) is None:
            stopped.append(run.state)
            break
    controller.restore_best()

    assert stopped == [8]
    assert run.state == 5

    with pytest.raises(ValueError, match="patience must be at least 1 reading, got 0"):
        EarlyStop.of_run(run, patience=0)


def test_a_compression_that_does_nothing_is_no_compression() -> None:
    spec = RunSpec(config=RunConfig(device="cpu"), compression=Compression())
    assert len(spec.phases()) == 1
    assert spec.decisions_before_cut == spec.config.decisions
