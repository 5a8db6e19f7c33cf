"""The whole command on tiny cases: runs once, goes on where it was, reports what went wrong, refuses in one line."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comparison_runs import Bowl, Run, made_table
from fake_workers import FakeWorkers
from live_runs import GPT2, LLAMA, text_by_rule
from rich.console import Console

from trainpilot.agents import bundle as bundles
from trainpilot.agents.bundle import PolicyBundle
from trainpilot.envs.action import ACTION_FIELDS
from trainpilot.envs.decision import N_STACK
from trainpilot.envs.observation import OBSERVATION_FIELDS
from trainpilot.experiments import cli
from trainpilot.experiments.compare import command
from trainpilot.experiments.compare.command import runs_on_a_case
from trainpilot.experiments.compare.execute import execute, failed
from trainpilot.experiments.compare.methods import DEFAULT_METHODS
from trainpilot.experiments.costs import measure as costs
from trainpilot.experiments.costs import measure_use
from trainpilot.experiments.costs.table import CostTable
from trainpilot.experiments.options import CompareOptions
from trainpilot.experiments.results import Comparison, RunResult, RunSpec
from trainpilot.experiments.run_store import run_key
from trainpilot.llm_runtime.config import RunConfig
from trainpilot.llm_runtime.energy.meter import NoMeter
from trainpilot.llm_runtime.export import inference

COMMON: dict[str, Any] = {
    "tokens": 12_800,
    "batch_size": 8,
    "sequence_length": 16,
    "decisions": 10,
    "base_learning_rate": 1e-3,
    "device": "cpu",
}
SHORT: dict[str, Any] = {"tokens": 640, "batch_size": 2, "decisions": 5, "base_learning_rate": 1e-2}
"""Twenty steps, for runs that are really trained."""


def train(spec: RunSpec) -> RunResult:
    """Carry a run out here."""
    return execute(spec, run_key(spec), meter=NoMeter("a test"))


@dataclass
class Tool:
    """The command, with workers that run in this process and cost tables that nobody measures."""

    folder: Path
    patch: pytest.MonkeyPatch
    run: Run = field(default_factory=Bowl)
    workers: list[FakeWorkers] = field(default_factory=list)
    measured: list[RunConfig] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.patch.setattr(command, "run_workers", self._workers)
        self.patch.setattr(costs, "measure_cost_table", self._table)
        self.patch.setattr(sys, "argv", ["trainpilot", "compare"])
        self.cases()

    def _workers(self, jobs: int, threads: int, engine: None) -> FakeWorkers:
        self.workers.append(FakeWorkers(self.run, jobs))
        return self.workers[-1]

    def _table(self, config: RunConfig, **asked: Any) -> CostTable:
        self.measured.append(config)
        extras = (*asked["optimizers"], *asked["prunings"])
        return made_table(config=config, per_row=0.5, precisions=asked["precisions"], extras=extras)

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def files(self) -> dict[str, int]:
        """Every kept run, and when it was written."""
        return {path.stem: path.stat().st_mtime_ns for path in (self.out / "runs").glob("*.json")}

    @property
    def started(self) -> list[RunSpec]:
        """The runs that the last call started."""
        return self.workers[-1].started

    def cases(self, **changes: Any) -> None:
        """Write the file of cases: one tiny model, unless `cases` lists others."""
        text = self.folder / "text.txt"
        text.write_text(text_by_rule(8_192), encoding="utf-8")
        usual = {"cases": [{"name": "tiny", "model": LLAMA}]}
        content = usual | {"cases": changes.pop("cases")} if "cases" in changes else usual
        common = COMMON | {"text": str(text)} | changes
        self.file.write_text(json.dumps({"common": common, **content}), encoding="utf-8")

    @property
    def file(self) -> Path:
        return self.folder / "cases.json"

    def compare(self, methods: str = "cosine,linear", *, seeds: int = 1, jobs: int = 1, **options: Any) -> str:
        """Call the command and return what it said."""
        said = io.StringIO()
        chosen = CompareOptions(
            out=self.out,
            cases=str(self.file),
            methods=methods,
            seeds=seeds,
            jobs=jobs,
            **{"tensorboard": False} | options,
        )
        command.compare(chosen, Console(file=said, width=200))
        return said.getvalue()

    def comparison(self) -> Comparison:
        return Comparison.from_json(json.loads((self.out / "comparison.json").read_text()))

    def figures(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.out / "figures.json").read_text())
        return found

    def on_case(self, method: str) -> dict[str, Any]:
        """Return the figures of a method on the only case."""
        [found] = [one for one in self.figures()["cases"] if one["method"] == method]
        return dict(found)


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tool:
    """Return the command on made-up losses."""
    return Tool(tmp_path, monkeypatch)


@pytest.fixture
def real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tool:
    """Return the command on runs that are trained."""
    real = Tool(tmp_path, monkeypatch, run=train)
    real.cases(**SHORT)
    return real


# From beginning to end


def test_a_comparison_runs_and_reports(tool: Tool) -> None:
    said = tool.compare()

    assert "1 cases x 2 methods x 1 seeds: about 9 runs, about" in said
    assert f"report: {tool.out / 'report.html'}" in said
    for name in ("report.html", "comparison.json", "figures.json", "per_case.csv", "methods.csv", "runs.csv"):
        assert (tool.out / name).stat().st_size > 0
    comparison = tool.comparison()
    assert [(row.method, row.role, row.budget) for row in comparison.rows] == [
        *(("cosine", "curve", budget) for budget in (0.25, 0.5, 2.0, 4.0)),
        ("cosine", "method", 1.0),
        ("linear", "method", 1.0),
    ]
    assert {row.key for row in comparison.rows} == set(tool.files)
    assert [note.name for note in comparison.methods] == ["cosine", "linear"]
    assert comparison.provenance["command"] == "trainpilot compare"
    assert comparison.provenance["jobs"] == 1


def test_the_same_command_again_runs_nothing_and_measures_nothing(tool: Tool) -> None:
    tool.compare()
    before, rows = tool.files, tool.comparison().rows
    tool.measured.clear()
    tool.compare()

    assert tool.started == []
    assert tool.measured == []
    assert tool.files == before
    assert tool.comparison().rows == rows


def test_with_another_method_and_another_seed_only_what_is_missing_is_run(tool: Tool) -> None:
    tool.compare("cosine,linear")
    before = tool.files
    tool.compare("linear,cosine,wsd")

    assert [(spec.config.schedule, spec.config.seed) for spec in tool.started] == [("wsd", 0)]
    assert {key: tool.files[key] for key in before} == before

    before = tool.files
    tool.compare("linear,wsd", seeds=2)
    assert [(spec.config.schedule, spec.config.seed) for spec in tool.started] == [("linear", 1), ("wsd", 1)]
    assert {key: tool.files[key] for key in before} == before
    assert {row.method for row in tool.comparison().rows} == {"linear", "wsd"}  # of what was asked for


def test_killed_half_way_it_goes_on_with_the_same_losses(real: Tool) -> None:
    real.compare("linear,wsd")
    assert all(real.on_case(name)["validation_loss"]["value"] < 5.6 for name in ("linear", "wsd"))
    lost, kept = sorted(real.files)
    path, before = real.out / "runs" / f"{lost}.json", real.files
    whole = json.loads(path.read_text())
    path.unlink()
    real.compare("linear,wsd")

    assert [run_key(spec) for spec in real.started] == [lost]
    assert real.files[kept] == before[kept]
    again = json.loads(path.read_text())
    for name in ("final_validation_loss", "final_test_loss", "spec"):
        assert again[name] == whole[name]
    assert again["intervals"]["train_loss"] == whole["intervals"]["train_loss"]


def test_it_may_be_interrupted(tool: Tool) -> None:
    class Interrupted(FakeWorkers):
        def finished(self) -> list[RunResult]:
            if len(self.started) == 3:
                raise KeyboardInterrupt
            return super().finished()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "run_workers", lambda jobs, *_: Interrupted(Bowl(), jobs))
        with pytest.raises(KeyboardInterrupt):
            tool.compare()
    before = tool.files
    assert len(before) == 2

    tool.compare()
    assert len(tool.started) == 4
    assert {key: tool.files[key] for key in before} == before


def test_runs_are_found_again_when_the_cache_of_models_has_moved(tool: Tool, tmp_path: Path) -> None:
    tool.compare()
    tool.patch.setenv("TRAINPILOT_CACHE", str(tmp_path / "elsewhere"))
    tool.compare()

    assert tool.started == []
    assert tool.on_case("linear")["time_s"]["value"] is not None  # its cost table is found, too


def test_two_cases_come_one_after_the_other(tool: Tool) -> None:
    tool.cases(cases=[{"name": "a", "model": LLAMA}, {"name": "b", "model": GPT2, "tokens": 9_600}])
    tool.compare("linear,wsd", jobs=2)

    assert [spec.config.tokens for spec in tool.started] == [12_800, 12_800, 9_600, 9_600]
    assert {(row.case, row.method) for row in tool.comparison().rows} == {
        (case, method) for case in "ab" for method in ("linear", "wsd")
    }


def test_a_policy_and_its_open_loop(real: Tool) -> None:
    n_choices = sum(len(field.choices) for field in ACTION_FIELDS)
    weights = {
        "action.weight": np.zeros((n_choices, N_STACK * len(OBSERVATION_FIELDS)), np.float32),
        "action.bias": np.zeros(n_choices, np.float32),
    }
    path = real.folder / "agent" / "policy.safetensors"
    path.parent.mkdir()
    PolicyBundle(weights, {"decisions": 5, "training_cost": {"energy_j": 100.0}}).save(path)
    names = [f"policy:{path}@quality=0.5,time=0.5", f"open-loop:{path}@quality=0.5,time=0.5"]
    real.compare(",".join(names))
    before = real.files

    judged = [row.method for row in real.comparison().rows if row.role == "method"]
    assert sorted(judged) == sorted(names)
    assert all(real.on_case(name)["validation_loss"]["value"] is not None for name in names)
    policy = next(spec for spec in real.started if spec.steering.kind == "policy")
    assert (
        json.loads((real.out / "runs" / f"{run_key(policy)}.json").read_text())["intervals"]["probe_sequences"][0] > 0
    )

    path.rename(path.parent / "moved.safetensors")
    real.compare(",".join(name.replace("policy.safetensors", "moved.safetensors") for name in names))
    assert real.started == []
    assert real.files == before


def test_a_policy_starts_at_factors_of_the_tuned_rate(tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundles, "POLICIES", tool.folder)
    choices = sum(len(field.choices) for field in ACTION_FIELDS)
    weights = np.zeros((choices, N_STACK * len(OBSERVATION_FIELDS)), np.float32)
    bundle = PolicyBundle({"action.weight": weights, "action.bias": weights[:, 0]}, {"decisions": 5})
    bundle.save(tool.folder / "mine.safetensors")
    starts = [f"policy:mine@quality=1@start={factor}" for factor in ("0.1", "10")]
    said = tool.compare(",".join(["cosine", *starts]))

    rows = {row.method: row.key for row in tool.comparison().rows if row.role == "method"}
    specs = {run_key(spec): spec for spec in tool.started}
    [tuned] = [one.config for one in tool.comparison().baselines["tiny"] if one.axis == "tokens"]
    carried = tuned.base_learning_rate * (8 / tuned.batch_size) ** 0.5  # to the case's batch of 8
    rates = [specs[rows[name]].config.base_learning_rate for name in starts]
    assert rates == pytest.approx([0.1 * carried, 10 * carried], rel=0.01)
    assert {"tuned", "cosine", *starts} <= set(rows)  # what they rest on is shown too
    assert f"about {round(runs_on_a_case(tool.comparison().cases[0], ['cosine', *starts], 1)):,} runs" in said

    tool.compare(",".join(["cosine", "tuned", *starts, "policy:mine@time=1"]))
    assert [spec.config.base_learning_rate for spec in tool.started] == [1e-3]  # the case's own, the only new one

    (tool.out / "runs" / f"{rows[starts[0]]}.json").unlink()
    tool.compare(",".join(["cosine", *starts]), report_only=True)
    assert tool.comparison().baselines["tiny"]  # the tuned static does not wait for what starts at its rate


# Methods that make a model cheaper


def test_cheaper_models_are_trained_and_their_use_is_measured(real: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_use, "LIMIT_S", 1e-6)
    monkeypatch.setattr(inference, "VISIT_S", 1e-6)
    monkeypatch.setattr(measure_use, "select_meter", lambda _device: NoMeter("a test"))
    real.compare("linear,small,minitron+shift-add")
    points = {one["method"]: one for one in real.figures()["uses"]}
    page = (real.out / "report.html").read_text()

    assert set(points) == {"linear", "small", "minitron+shift-add"}
    assert points["small"]["n_parameters"] == points["minitron+shift-add"]["n_parameters"]
    assert points["small"]["weight_bytes"] == 4 * points["small"]["n_parameters"]
    assert points["minitron+shift-add"]["weight_bytes"] < points["small"]["weight_bytes"]
    assert points["linear"]["latency_s"] > 0
    assert points["minitron+shift-add"]["latency_s"] is None
    assert points["linear"]["use_j"] is None
    assert points["minitron+shift-add"]["training_time_s"] == real.on_case("minitron+shift-add")["time_s"]["value"]
    assert "Smaller models" in page
    assert page.count("final loss against") >= 3
    assert len(real.measured) == 2  # the case's model, and the shape that both methods end with

    monkeypatch.setattr(measure_use, "measure_turn_about", None)  # nothing is measured again
    real.compare("linear,small,minitron+shift-add")
    assert real.started == []
    assert {one["method"]: one for one in real.figures()["uses"]} == points


def test_cheaper_models_take_the_tuned_setting_and_pay_for_it(tool: Tool) -> None:
    tool.patch.setattr(command, "use_costs", lambda *_, **__: {})
    tool.compare("tuned,early-stop,quantise-int8,prune-ffn")
    [tuned] = [one.config for one in tool.comparison().baselines["tiny"] if one.axis == "tokens"]
    rows = {row.method: row.key for row in tool.comparison().rows if row.role == "method"}
    specs = {run_key(spec): spec for spec in tool.started}

    for name in ("early-stop", "quantise-int8", "prune-ffn"):
        assert specs[rows[name]].config == replace(tuned, seed=0)
        worth = tool.on_case(name)["multipliers"]
        assert worth["tuned_with_sweep"]["tokens"]["value"] == pytest.approx(worth["tuned"]["tokens"]["value"], rel=0.2)
    assert "uses" not in tool.figures()
    assert "Loss against what a model costs" not in (tool.out / "report.html").read_text()


def test_a_method_that_a_case_does_not_allow_ends_it_before_any_run(tool: Tool) -> None:
    with pytest.raises(ValueError, match="case tiny: method prune-heads: heads must keep at least one"):
        tool.compare("linear,prune-heads")
    assert not tool.workers
    assert not tool.measured


# All methods


def test_every_method_that_needs_no_file_gets_into_the_report(tool: Tool) -> None:
    said = tool.compare("default,nsga2,tuned-tpe,tuned-halving", seeds=2, tensorboard=True)
    comparison = tool.comparison()
    judged = {row.method for row in comparison.rows if row.role == "method"}

    assert {*DEFAULT_METHODS, "tuned-tpe", "tuned-halving", "nsga2-1"} <= judged
    assert judged <= {note.name for note in comparison.methods}
    assert {baseline.axis for baseline in comparison.baselines["tiny"]} == {"tokens", "time_s", "energy_j"}
    assert {one["method"] for one in tool.figures()["cases"]} == judged
    assert "tuned static" in (tool.out / "report.html").read_text()
    assert any((tool.out / "tensorboard").iterdir())
    assert len(tool.measured) == 9  # every size of the model
    assert "report:" in said

    multipliers = tool.on_case("check-budget")["multipliers"]["tuned"]["tokens"]
    assert multipliers["value"] == pytest.approx(1.25, rel=0.01)
    assert tool.on_case("check-self")["multipliers"]["tuned"]["tokens"]["value"] == pytest.approx(1.0, rel=0.01)

    tool.compare("default,nsga2,tuned-tpe,tuned-halving", seeds=2)
    assert tool.started == []
    assert tool.comparison().rows == comparison.rows


def test_the_number_of_runs_side_by_side_changes_nothing(tool: Tool) -> None:
    tool.compare("cosine,tuned,check-rate")
    alone = tool.comparison()
    (tool.out / "runs").rename(tool.folder / "before")
    tool.compare("cosine,tuned,check-rate", jobs=7)

    assert replace(tool.comparison(), provenance={}) == replace(alone, provenance={})


def test_a_report_is_written_from_the_runs_that_are_there(tool: Tool) -> None:
    tool.compare("cosine,tuned")
    rows = tool.comparison().rows
    calls = len(tool.workers)
    key = next(row.key for row in rows if row.method == "tuned" and row.role == "curve" and row.budget == 2.0)
    (tool.out / "runs" / f"{key}.json").unlink()
    tool.compare("cosine,tuned,linear", report_only=True)

    assert len(tool.workers) == calls  # nobody to run anything
    there = tool.comparison().rows
    assert set(there) < set(rows)
    assert {"cosine", "tuned"} == {row.method for row in there if row.role == "method"}
    assert (tool.out / "report.html").is_file()


# What goes wrong on the way


def test_a_default_that_diverges_still_gives_a_report(real: Tool) -> None:
    real.cases(**SHORT | {"base_learning_rate": 1e30})
    real.compare("cosine,linear")

    figures = real.on_case("cosine")
    assert (figures["n_runs"], figures["n_diverged"], figures["n_failed"]) == (1, 1, 0)
    assert figures["validation_loss"]["value"] > 5  # as before its training
    assert (real.out / "report.html").is_file()
    real.compare("cosine,linear")
    assert real.started == []


def test_a_search_in_which_everything_diverges_warns_and_reports(tool: Tool) -> None:
    tool.run = Bowl(diverges_from=0.0)
    said = tool.compare("cosine,tuned,tuned-linear,check-self")

    assert "tiny: every setting of the sweep diverged or failed; there is no baseline" in said
    assert tool.comparison().baselines == {}
    assert (tool.out / "report.html").is_file()


def test_a_target_that_is_never_reached(tool: Tool) -> None:
    tool.cases(cases=[{"name": "tiny", "model": LLAMA, "target_loss": 1e-3}])
    tool.compare()

    figures = tool.on_case("linear")
    assert (figures["to_target"]["n_reached"], figures["to_target"]["n_runs"]) == (0, 1)
    assert tool.figures()["targets"] == {"tiny": 1e-3}
    assert (tool.out / "report.html").is_file()


def test_a_failed_run_is_reported_and_tried_again(tool: Tool) -> None:
    def run(spec: RunSpec) -> RunResult:
        if spec.config.schedule == "wsd":
            return failed(spec, run_key(spec), "RuntimeError: no memory [/here] [enforce]")
        return Bowl()(spec)

    tool.run = run
    said = tool.compare("cosine,wsd", seeds=2)
    assert (tool.on_case("wsd")["n_runs"], tool.on_case("wsd")["n_failed"]) == (2, 2)
    assert "no memory [/here] [enforce]" in (tool.out / "report.html").read_text()
    assert "report:" in said

    tool.run = Bowl()
    tool.compare("cosine,wsd", seeds=2)
    assert [(spec.config.schedule, spec.config.seed) for spec in tool.started] == [("wsd", 0), ("wsd", 1)]
    assert tool.on_case("wsd")["n_failed"] == 0


# Beforehand


def test_a_plan_runs_nothing_and_its_cost_tables_are_kept(tool: Tool) -> None:
    said = tool.compare(plan=True)

    assert "about 9 runs" in said
    assert tool.workers == []
    assert {path.name for path in tool.out.iterdir()} == {"costs"}
    assert len(tool.measured) == 1
    tool.compare(plan=True)
    assert len(tool.measured) == 1


def test_a_damaged_cost_table_is_measured_again(tool: Tool) -> None:
    tool.compare(plan=True)
    [path] = (tool.out / "costs").iterdir()
    whole = path.read_text()
    for content in ("", "[]", '{"rows": 1}', whole[:99]):
        path.write_text(content)
        tool.measured.clear()
        tool.compare(plan=True)
        assert len(tool.measured) == 1
        assert path.read_text() == whole


def test_a_cost_table_holds_all_that_its_cases_may_use(tool: Tool) -> None:
    tool.compare(plan=True)
    tool.patch.setattr(command, "precisions_that_pay", lambda case: (case.config.precision,))
    plain = {"name": "a", "model": LLAMA}
    other = {"name": "b", "model": LLAMA, "precision": "bf16"}
    for cases in (
        [plain],
        [plain, other],
        [plain | {"pruning": "evolution"}],
        [plain | {"pruning": "evolution"}, other],
    ):
        tool.cases(cases=cases)
        tool.compare(plan=True)
        measured = len(tool.measured)
        tool.compare(plan=True)
        assert len(tool.measured) == measured  # once is enough
    assert measured == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": "cosine,flying"}, "methods must be among constant"),
        ({"methods": "policy:nowhere"}, "policy: no policy named 'nowhere'"),
        ({"cases": "nowhere"}, "cases must be one of large, quick, test, train or a YAML file, got 'nowhere'"),
        ({"cases": "broken.json"}, "cases: broken.json is not readable JSON"),
        ({"cases": "unknown.json"}, "'colour' is unknown"),
        ({"cases": "no-text.json"}, "nowhere.txt"),
        ({"cases": "no-model.json"}, "model"),
        (
            {"cases": "short.json", "methods": "cosine,tuned-wsd,nsga2"},
            "case a: tokens must give a search sixteen steps",
        ),
        ({"seeds": "0"}, "seeds must be a whole number of at least 1, got 0"),
        ({"seeds": "many"}, "seeds"),
        ({"jobs": "-1"}, "jobs must be a whole number of at least 0, got -1"),
        ({"threads": "0"}, "threads must be a whole number of at least 1, got 0"),
        ({"out": "a-file"}, "out must be a folder, got the file a-file"),
        ({"out": "a-file/out"}, "Not a directory"),
    ],
)
def test_bad_input_is_one_line(
    tool: Tool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, str],
    message: str,
) -> None:
    tool.cases(text="text.txt")
    folder = tool.folder
    files = {
        "a-file": "in the way",
        "broken.json": "{",
        "unknown.json": '{"cases": [{"name": "a", "colour": "red"}]}',
        "no-text.json": '{"cases": [{"name": "a", "text": "nowhere.txt"}]}',
        "no-model.json": '{"cases": [{"name": "a", "text": "text.txt", "model": "nobody/nothing"}]}',
        "short.json": json.dumps(
            {"cases": [{**COMMON, "name": "a", "text": "text.txt", "batch_size": 3, "tokens": 480, "decisions": 5}]}
        ),
    }
    for name, content in files.items():
        (folder / name).write_text(content)
    before = sorted(folder.iterdir())
    options = {"cases": "cases.json", "methods": "linear", "out": "out"} | changes
    monkeypatch.chdir(folder)
    monkeypatch.setattr(
        sys,
        "argv",
        ["trainpilot", "compare", *(part for name, value in options.items() for part in (f"--{name}", value))],
    )
    with pytest.raises(SystemExit) as stop:
        cli.main()

    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("trainpilot: ")
    assert message in said
    assert said.count("\n") == 1
    assert sorted(folder.iterdir()) == before
    assert tool.workers == []


def test_it_runs_through_the_command_line(
    tool: Tool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--cases",
        str(tool.file),
        "--methods",
        "linear",
        "--seeds",
        "1",
        "--jobs",
        "1",
        "--out",
        str(tool.out),
    ]
    monkeypatch.setattr(sys, "argv", ["trainpilot", "compare", *arguments, "--no-tensorboard"])
    cli.main()

    assert "report:" in capsys.readouterr().out
    assert tool.comparison().provenance["command"] == " ".join(
        ["trainpilot", "compare", *arguments, "--no-tensorboard"]
    )
