"""`trainpilot calibrate` from its options to its file, with live runs of a few thousand weights and a made fit."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import pytest
from fake_physics import FakeFitting, FittedPhysics
from fakes import make_telemetry
from live_runs import LLAMA, case
from rich.console import Console

from trainpilot.experiments import cli
from trainpilot.experiments.calibrate import command
from trainpilot.experiments.calibrate.calibration import Calibration, load_calibrations
from trainpilot.experiments.calibrate.design import CalibrationSetting, design
from trainpilot.experiments.calibrate.runs import RunFile, carry_out
from trainpilot.experiments.costs.table import CostRow, CostTable
from trainpilot.experiments.options import CalibrateOptions
from trainpilot.llm_runtime.config import RunConfig
from trainpilot.llm_runtime.energy.meter import EnergyReading, EnergySource, NoMeter, RecordedMeter
from trainpilot.llm_runtime.process import use_threads
from trainpilot.llm_runtime.simulator.evidence import CalibrationRun
from trainpilot.llm_runtime.simulator.shipped import shipped_physics
from trainpilot.llm_runtime.timing import Cost

FITTING = "trainpilot.llm_runtime.simulator.fitting"
N_RUNS = 14
SHIPPED_TEXTS = (("stdlib:*.py",), ("stdlib:ctypes,re,collections,zoneinfo,tomllib,sqlite3",))
KINDS: tuple[Literal["step", "forward"], ...] = ("step", "forward")
SOURCES: tuple[EnergySource, ...] = ("measured_counter", "estimated")


def cost_table(config: RunConfig, **_: Any) -> CostTable:
    """Every pass costs a millisecond and a tenth of a joule."""
    cost = Cost(time_s=1e-3, energy_j=0.1)
    rows = tuple(
        CostRow(kind=kind, precision="fp32", batch_size=batch, cost=cost) for kind in KINDS for batch in (1, 16)
    )
    return CostTable(
        device="a device",
        model=config.model,
        sequence_length=config.sequence_length,
        energy_source="estimated",
        rows=rows,
        probe_overhead=cost,
        rounds=4,
        spread=1.0,
    )


def made_run(setting: CalibrationSetting, key: str) -> RunFile:
    """Return a run that the stand-in's bowl predicts 0.25 nats too low."""
    physics = FittedPhysics()
    run = CalibrationRun(
        config=setting.config,
        telemetry=(make_telemetry(train_loss=3.0, finished=True),),
        validation=((0, 5.5), (1, 0.0)),
        wide_probe=(None,),
        n_parameters=1_000,
        role=setting.role,
    )
    run = replace(run, validation=((0, 5.5), (1, physics.predict_final(run) + 0.25)))
    return RunFile(key=key, time_s=2.0, energy_j=10.0, energy_source="estimated", run=run)


@dataclass
class Tool:
    """The command in a folder; its runs are made, not carried out."""

    folder: Path
    fitting: FakeFitting
    ran: list[str]
    measured: list[RunConfig]

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def options(self, **changes: Any) -> CalibrateOptions:
        config = case(self.folder, LLAMA)
        usual: dict[str, Any] = {
            "out": self.out,
            "model": config.model,
            "text": config.text,
            "tokens": 1_280,
            "batch_size": 2,
            "sequence_length": 16,
            "decisions": 10,
            "effort": "quick",
            "jobs": 1,
            "device": "cpu",
        }
        return CalibrateOptions(**usual | changes)

    def calibrate(self, **changes: Any) -> str:
        self.ran.clear()
        said = StringIO()
        command.calibrate(self.options(**changes), Console(file=said, width=120))
        return said.getvalue()


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tool:
    tool = Tool(tmp_path, FakeFitting(), [], [])

    def run_all(
        work: Sequence[tuple[CalibrationSetting, str]], jobs: int, engine: None = None
    ) -> Iterator[tuple[CalibrationSetting, RunFile | str]]:
        for setting, key in work:
            tool.ran.append(setting.name)
            yield setting, made_run(setting, key)

    def measure(config: RunConfig, **options: Any) -> CostTable:
        tool.measured.append(config)
        return cost_table(config, **options)

    monkeypatch.setitem(sys.modules, FITTING, tool.fitting)
    monkeypatch.setattr(command, "run_all", run_all)
    monkeypatch.setattr(command, "measure_cost_table", measure)
    monkeypatch.setattr(command, "_precisions", lambda base, run: ["fp32"])
    return tool


def test_a_calibration_from_its_options_to_its_file(tool: Tool) -> None:
    said = tool.calibrate()
    [calibration] = load_calibrations([tool.out])

    assert len(tool.ran) == N_RUNS
    assert {run.role for run in tool.fitting.given} == {"fit"}
    assert len(tool.fitting.given) == N_RUNS - 4
    assert (calibration.held_out.n_runs, calibration.fitted.n_runs) == (4, N_RUNS - 4)
    assert calibration.held_out.final_loss == pytest.approx(0.25)
    assert calibration.grid_rank_correlation == pytest.approx(1.0)
    assert calibration.config == tool.options().run_config()
    assert calibration.command.startswith(f"trainpilot calibrate --out {tool.out} --model ")
    assert " --tokens 1280 --batch-size 2 --sequence-length 16 --effort quick --decisions 10" in calibration.command
    assert calibration.physics == FittedPhysics()
    assert [best.batch_size for best in calibration.best_rates] == [1, 4]
    assert calibration.cost.n_runs == N_RUNS
    assert (calibration.cost.energy_j, calibration.cost.energy_source) == (10.0 * N_RUNS, "estimated")
    assert calibration.cost.run_time_s == 2.0 * N_RUNS
    assert calibration.cost_table.device == calibration.device == "a device"
    assert "torch" in calibration.versions
    for words in (
        "held out",
        "floor: loss after endless training",
        "x/÷ 1.50",
        "open",
        "best learning rate",
        "rank correlation",
        "calibration.json",
    ):
        assert words in said
    assert said.endswith(f"calibration: {tool.out / 'calibration.json'}\n")


@pytest.mark.parametrize("kind", ["wsd", "walk1", "prune"])
def test_a_run_holds_its_whole_telemetry_and_a_wider_probe(tool: Tool, kind: str) -> None:
    chosen = design(tool.options(tokens=2_560).run_config(), "quick")
    setting = next(each for each in reversed(chosen) if each.name.startswith(kind))
    path = tool.folder / "run.json"
    carry_out(setting, "key", meter=NoMeter("a test")).write(path)
    file = RunFile.read(path)

    assert file is not None
    assert (file.key, file.energy_j, file.energy_source) == ("key", None, None)
    assert file.time_s > 0
    run = file.run
    assert (run.config, run.role) == (setting.config, setting.role)
    assert len(run.telemetry) == len(run.wide_probe) == 10
    assert [decision for decision, _ in run.validation] == [0, 5, 10]
    assert run.telemetry[-1].finished
    assert None not in run.wide_probe
    assert run.n_parameters > 0
    assert (run.telemetry[-1].sparsity > 0) == (kind == "prune")
    assert (len({each.requested.learning_rate_scale for each in run.telemetry}) > 1) == (kind == "walk1")


def test_a_meter_of_the_whole_device_is_shared_by_the_runs_beside_it(tmp_path: Path) -> None:
    setting = CalibrationSetting(name="a", config=case(tmp_path, tokens=64, decisions=2), role="fit")
    readings = {
        source: [EnergyReading(time_s=float(i), energy_j=6.0 * i, source=source) for i in range(200)]
        for source in SOURCES
    }
    parts = {
        source: [carry_out(setting, "", jobs=jobs, meter=RecordedMeter(readings[source])).energy_j for jobs in (1, 3)]
        for source in SOURCES
    }

    for source, (alone, together) in parts.items():
        assert alone is not None
        assert together == pytest.approx(alone if source == "estimated" else alone / 3)


def test_killed_it_goes_on_with_what_is_missing_and_ends_alike(tool: Tool) -> None:
    tool.calibrate()
    before = load_calibrations([tool.out])[0]
    paths = sorted((tool.out / "runs").iterdir())
    paths[0].unlink()
    paths[1].write_text(paths[1].read_text()[:500])
    paths[2].write_text("[]")
    said = tool.calibrate()

    assert set(tool.ran) == {path.stem for path in paths[:3]}
    assert f"{N_RUNS} runs, {N_RUNS - 3} of them kept" in said
    assert len(tool.measured) == 1  # the cost table was kept, too
    after = load_calibrations([tool.out])[0]
    assert (after.held_out, after.fitted) == (before.held_out, before.fitted)
    tool.calibrate()
    assert tool.ran == []


def test_other_settings_are_not_mistaken_for_kept_runs(tool: Tool) -> None:
    tool.calibrate()
    tool.calibrate(seed=1)
    assert len(tool.ran) == N_RUNS

    options = tool.options(seed=1)
    text = Path(options.text[0])
    text.write_text(text.read_text() + " more")
    tool.ran.clear()
    command.calibrate(options, Console(file=StringIO()))
    assert len(tool.ran) == N_RUNS
    assert len(tool.measured) == 2


def test_a_failed_run_is_named_and_tried_again(tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_all(
        work: Sequence[tuple[CalibrationSetting, str]], jobs: int, engine: None = None
    ) -> Iterator[tuple[CalibrationSetting, RunFile | str]]:
        for setting, key in work:
            yield setting, "RuntimeError: no memory" if setting.walk == 0 else made_run(setting, key)

    with monkeypatch.context() as patch:
        patch.setattr(command, "run_all", run_all)
        with pytest.raises(ValueError, match=r"1 of 14 runs failed, the first one walk0-.*: RuntimeError: no memory"):
            tool.calibrate()
    assert not (tool.out / "calibration.json").exists()
    tool.calibrate()
    assert [name.partition("-")[0] for name in tool.ran] == ["walk0"]


def test_a_run_that_diverges_is_kept_as_it_is(tmp_path: Path) -> None:
    config = case(tmp_path, base_learning_rate=1e30)
    file = carry_out(CalibrationSetting(name="a", config=config, role="fit"), "key", meter=NoMeter("a test"))
    path = tmp_path / "a.json"
    file.write(path)
    again = RunFile.read(path)

    assert again is not None
    assert again.run.diverged
    assert len(again.run.telemetry) == len(again.run.wide_probe) < 10
    assert again.key == "key"


def test_a_model_that_cannot_lose_channels_goes_without_that_run(tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: object) -> int:
        raise ValueError("model_type must be one of llama")

    monkeypatch.setattr("trainpilot.llm_runtime.width.ffn_width", refuse)
    said = tool.calibrate()

    assert "no pruning run: model_type must be one of llama" in said
    assert len(tool.ran) == N_RUNS - 1


def test_calibrations_are_loaded_from_files_folders_and_the_package(tool: Tool) -> None:
    tool.calibrate()
    file = tool.out / "calibration.json"
    by_file, by_folder = load_calibrations([file, str(tool.out)])

    assert by_file == by_folder
    assert Calibration.from_json(json.loads(json.dumps(by_file.to_json(), allow_nan=False))) == by_file
    assert load_calibrations(file) == (by_file,)


def test_shipped_calibrations_are_whole_and_name_no_folder_of_a_machine() -> None:
    shipped = load_calibrations()

    assert {(each.config.model, each.config.text) for each in shipped} == {
        (model, text) for model in ("llama-nano", "gpt2-nano", "phi-nano") for text in SHIPPED_TEXTS
    }
    assert [each.physics for each in shipped] == list(shipped_physics())
    for each in shipped:
        assert (each.effort, each.held_out.n_runs) == ("standard", 9)
        assert "/" not in each.command.replace("runs/calibrations/", "")


def test_calibrations_with_longer_runs_come_with_trainpilot_too() -> None:
    longer = load_calibrations("shipped-longer")

    assert {each.config.model for each in longer} == {"llama-nano", "gpt2-nano", "phi-nano"}
    for each in longer:
        assert (each.effort, each.held_out.n_runs) == ("long", 11)
        assert "/" not in each.command.replace("runs/calibrations/", "")
        assert each.physics.values["late"] > 0.1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "not there"),
        ("{}", "fields missing or unknown: best_rates, command, config"),
        ("[1]", r"Input should be a dictionary .*, got \[1\]"),
        ("{", "JSON"),
    ],
)
def test_what_is_no_calibration_is_refused_in_one_line(tmp_path: Path, content: str | None, reason: str) -> None:
    path = tmp_path / "some.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(
        ValueError, match=f"calibrations must be 'shipped', 'shipped-longer', or files .*some.json.*{reason}"
    ) as error:
        load_calibrations([path])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": "600"}, "tokens must give every decision a step of the largest batch tried"),
        ({"jobs": "-1"}, "jobs must be a whole number of at least 0, got -1"),
        ({"effort": "huge"}, "effort"),
        ({"base-learning-rate": "0"}, "base_learning_rate must be a positive number"),
        ({"text": "nowhere.txt"}, "nowhere.txt"),
        ({"model": "nobody/nothing"}, "model"),
        ({"out": "a-file"}, "out must be a folder, got the file a-file"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_run(
    tool: Tool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, str],
    message: str,
) -> None:
    usual = tool.options()
    monkeypatch.chdir(tool.folder)
    Path("a-file").write_text("in the way")
    before = sorted(tool.folder.iterdir())
    options = {"out": "out", "model": usual.model, "text": usual.text[0], "tokens": "1280", "batch-size": "2"}
    options |= {"sequence-length": "16", "decisions": "10", **changes}
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["trainpilot", "calibrate", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()

    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("trainpilot: ")
    assert message in said
    assert said.count("\n") == 1
    assert sorted(tool.folder.iterdir()) == before
    assert tool.ran == []


@pytest.mark.slow
def test_runs_in_processes_measure_the_same_and_a_fault_is_one_line(tmp_path: Path) -> None:
    good = CalibrationSetting(name="good", config=case(tmp_path), role="fit")
    bad = CalibrationSetting(name="bad", config=case(tmp_path, sequence_length=128, tokens=25_600), role="fit")
    use_threads(1)  # as in the processes
    here = carry_out(good, "key", meter=NoMeter("a test"))
    found = {setting.name: result for setting, result in command.run_all([(good, "key"), (bad, "other")], 1)}

    there = found["good"]
    assert isinstance(there, RunFile)
    assert there.run.validation == here.run.validation
    assert [each.train_loss for each in there.run.telemetry] == [each.train_loss for each in here.run.telemetry]
    assert str(found["bad"]).startswith("ValueError: sequence_length must not exceed")
