"""A replay writes what it promises, goes on after kill -9 with the same result, and leaves a plain model."""

import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from decision_records import decision_records
from policies import zigzag_bundle
from rich.console import Console
from safetensors import SafetensorError
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, PreTrainedModel

from trainpilot.agents.bundle import BaseSchedule, policy_digest
from trainpilot.agents.controller import DecisionRecord
from trainpilot.envs.observation import OBSERVATION_FIELDS
from trainpilot.experiments import run_store
from trainpilot.experiments.cli import main
from trainpilot.experiments.inspect_run import inspect_path
from trainpilot.experiments.options import ReplayOptions
from trainpilot.llm_runtime.energy.meter import NoMeter
from trainpilot.llm_runtime.files import load_checkpoint, save_checkpoint
from trainpilot.llm_runtime.live_run import LiveRun
from trainpilot.llm_runtime.models import body_parameters_of
from trainpilot.llm_runtime.scaling_laws import step_law
from trainpilot.llm_runtime.telemetry import Telemetry

COMMAND = [sys.executable, "-m", "trainpilot.experiments.cli", "replay"]
CONFIG = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
SUMMARY_KEYS = {
    "policy", "model", "n_parameters", "tokens", "initial_validation_loss", "final_validation_loss", "final_test_loss",
    "time_s", "energy_j", "energy_source", "n_decisions", "diverged", "final_controls", "versions", "co2e_g",
    "grid_intensity_g_per_kwh", "device_hours", "final_test_bits_per_byte", "bytes_per_token", "vocabulary",
}  # fmt: skip


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("".join(f"line {i} says {i * i % 97}\n" for i in range(8000)))
    (tmp_path / "model.json").write_text(json.dumps(CONFIG))
    return tmp_path


def command(place: Path, out: str, *more: str, decisions: int = 20, tokens: int = 20_480) -> list[str]:
    return [
        *COMMAND, "--model", str(place / "model.json"), "--text", str(place / "text.txt"), "--tokens", str(tokens),
        "--batch-size", "4", "--sequence-length", "32", "--decisions", str(decisions), "--threads", "1",
        "--out", str(place / out), *more,
    ]  # fmt: skip


def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(*arguments, capture_output=True, text=True, check=False)


def run_here(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Run a command in this process, which saves the seconds that a new one takes to start; return its exit code."""
    monkeypatch.setattr(sys, "argv", ["trainpilot", *arguments[3:]])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def summary(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return content


def test_a_replay_writes_what_it_promises(workplace: Path) -> None:
    result = run(command(workplace, "run", "--policy", "none", "--reference"))
    assert result.returncode == 0, result.stderr
    found = summary(workplace / "run")
    assert found.keys() >= SUMMARY_KEYS
    assert found["tokens"] == 20_480
    assert found["n_decisions"] == 20
    assert found["final_validation_loss"] < found["initial_validation_loss"]
    assert found["final_validation_loss"] == found["reference"]["final_validation_loss"]
    assert found["co2e_g"] == pytest.approx(found["energy_j"] / 3.6e6 * found["grid_intensity_g_per_kwh"])
    lines = (workplace / "run" / "telemetry.jsonl").read_text().splitlines()
    assert len(lines) == 20
    assert sum(json.loads(line)["reward"]["quality"] for line in lines) == pytest.approx(1.0, abs=1e-6)
    assert "base schedule" in result.stdout
    assert oct((workplace / "run" / "summary.json").stat().st_mode & 0o777) == oct(0o666 & ~os.umask(os.umask(0o22)))


def test_advice_changes_nothing_and_is_written_beside_the_run(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    zigzag_bundle(workplace / "policy.safetensors")
    policy = ("--policy", str(workplace / "policy.safetensors"))
    same = ("--pruning", "magnitude", "--preference", "quality=1")
    assert run_here(command(workplace, "base", "--policy", "none", *same), monkeypatch) == 0
    assert run_here(command(workplace, "advised", *policy, "--mode", "advise", *same), monkeypatch) == 0
    said = " ".join(capsys.readouterr().out.split())
    base, advised = summary(workplace / "base"), summary(workplace / "advised")
    for name in ("final_validation_loss", "final_test_loss", "tokens", "final_controls", "final_effective"):
        assert advised[name] == base[name], name
    weights = [(workplace / each / "model" / "model.safetensors").read_bytes() for each in ("base", "advised")]
    assert weights[0] == weights[1]
    assert (base["mode"], advised["mode"], advised["n_changes"], advised["rollbacks"]) == ("steer", "advise", 0, [])
    assert "only advised" in said
    assert f"learning_rate x2 {advised['advice']['learning_rate x2']}x" in said

    lines = [json.loads(line) for line in (workplace / "advised" / "telemetry.jsonl").read_text().splitlines()]
    asked = [line["advice"]["controls"]["learning_rate_scale"] for line in lines]
    assert set(asked) != {1.0}
    assert {line["telemetry"]["requested"]["learning_rate_scale"] for line in lines} == {1.0}
    events = EventAccumulator(str(workplace / "advised" / "tb" / "run"), size_guidance={"scalars": 0})
    events.Reload()
    assert [event.value for event in events.Scalars("advice/learning_rate_scale")] == pytest.approx(asked)
    assert {event.value for event in events.Scalars("decision/learning_rate_allowed")} == {0.0}

    screen = io.StringIO()
    inspect_path(workplace / "advised", Console(file=screen, width=200))
    assert "choices that were advised" in screen.getvalue()
    assert "only advised" in screen.getvalue()
    assert run_here(command(workplace, "advised", *policy, *same), monkeypatch) == 2, "another mode is another run"


def test_a_tokenizer_is_trained_for_a_vocabulary(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_here(command(workplace, "run", "--vocabulary", "280", decisions=2), monkeypatch) == 0
    found = summary(workplace / "run")
    assert found["vocabulary"] == 280
    assert found["bytes_per_token"] > 1.5
    bits_per_token = found["final_test_loss"] / math.log(2)
    assert found["final_test_bits_per_byte"] == pytest.approx(bits_per_token / found["bytes_per_token"], rel=0.05)
    assert "test loss, bits/byte" in capsys.readouterr().out
    assert (workplace / "run" / "model" / "tokenizer.json").is_file()
    assert run_here(command(workplace, "bytes", "--vocabulary", "1", decisions=2), monkeypatch) == 2
    assert "vocabulary must be a whole number of at least 256, got 1" in capsys.readouterr().err
    assert not (workplace / "bytes").exists()


def test_the_pruned_model_loads_with_plain_transformers(workplace: Path) -> None:
    zigzag_bundle(workplace / "policy.safetensors")
    policy = ("--policy", str(workplace / "policy.safetensors"), "--pruning", "width")
    result = run(command(workplace, "run", *policy))
    assert result.returncode == 0, result.stderr
    found = summary(workplace / "run")
    assert found["n_changes"] > 5
    model = AutoModelForCausalLM.from_pretrained(workplace / "run" / "model")
    width = round(32 * (1 - found["final_effective"]["sparsity"]))
    assert model.config.intermediate_size == width
    assert torch.isfinite(model(torch.arange(16)[None]).logits).all()


def test_the_policy_brings_its_base_schedule_and_options_win() -> None:
    wsd = BaseSchedule(schedule="wsd", warmup_share=0.1)

    def chosen(base: BaseSchedule | None, **options: Any) -> tuple[str, int]:
        config = ReplayOptions(out=Path("x"), tokens=1_000_000, **options).run_config(40, base)
        return config.schedule, config.warmup()

    assert chosen(None) == ("linear", 20_000)
    assert chosen(wsd) == ("wsd", 100_000)
    assert chosen(wsd, schedule="cosine") == ("cosine", 100_000)
    assert chosen(wsd, warmup_tokens=0) == ("wsd", 0)
    assert ReplayOptions(out=Path("x")).run_config(40, wsd).decisions == 40
    assert ReplayOptions(out=Path("x"), decisions=30).run_config(40, wsd).decisions == 30


def test_auto_starts_at_what_the_law_advises(workplace: Path) -> None:
    def chosen(**options: Any) -> tuple[int, float]:
        model = str(workplace / "model.json")
        config = ReplayOptions(out=Path("x"), model=model, tokens=204_800, sequence_length=32, **options).run_config(50)
        return config.batch_size, config.base_learning_rate

    n_parameters = body_parameters_of(str(workplace / "model.json"))
    assert n_parameters is not None
    advice = step_law(n_parameters, 204_800)  # 625 tokens, 19.5 sequences
    assert chosen(batch_size="auto", base_learning_rate="auto") == (16, advice.learning_rate_at(512.0))
    assert chosen(batch_size=32, base_learning_rate="auto") == (32, advice.learning_rate)
    assert chosen(batch_size="auto") == (16, 1e-3)
    with pytest.raises(ValueError, match="must be numbers for a pretrained model, got 'auto'"):
        ReplayOptions(out=Path("x"), model="some/model", batch_size="auto").run_config(50)


def test_a_steered_run_says_which_policy_under_which_schedule(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = workplace / "policy.safetensors"
    zigzag_bundle(path, base_schedule={"schedule": "wsd", "warmup_share": 0.25})
    arguments = command(workplace, "run", "--policy", str(path))
    assert run(arguments).returncode == 0
    config = json.loads((workplace / "run" / "config.json").read_text())
    assert (config["schedule"], config["warmup_tokens"]) == ("wsd", 5_120)
    assert config["policy_digest"] == summary(workplace / "run")["policy_digest"] == policy_digest(path)
    console = Console(file=io.StringIO(), width=100)
    inspect_path(workplace / "run", console)
    assert isinstance(console.file, io.StringIO)
    assert "Why: fields with the largest effect" in console.file.getvalue()
    assert "would repeat only" not in console.file.getvalue()
    zigzag_bundle(path, base_schedule={"schedule": "wsd", "warmup_share": 0.25}, note="another file")
    assert run_here(arguments, monkeypatch) == 2
    assert "policy_digest was" in capsys.readouterr().err


BLIND = ("--policy", "default", "--preference", "quality=1")


def test_the_shipped_policy_repeats_a_run_to_the_last_bit_whatever_ends_it(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRAINPILOT_CACHE", str(workplace / "cache"))
    for name in ("one", "other", "cut"):
        shutil.rmtree(workplace / "cache", ignore_errors=True)  # what was timed in one run does not help the other
        if name == "cut":
            stop_after(7, command(workplace, name, *BLIND, tokens=10_240), monkeypatch)
            said = capsys.readouterr().err.splitlines()
            assert said[-1] == "trainpilot: ended by SIGTERM; run the same command again to resume"
            assert len(lines_of(workplace / "cut")) == 7
            assert {path.name for path in (workplace / "cut").iterdir()} == {
                "checkpoint.pt", "config.json", "tb", "telemetry.jsonl"
            }  # fmt: skip
        assert run_here(command(workplace, name, *BLIND, tokens=10_240), monkeypatch) == 0
    one = summary(workplace / "one")
    assert one["n_changes"] > 5
    assert one["time_s"] != summary(workplace / "other")["time_s"]
    for name in ("other", "cut"):
        assert lines_of(workplace / "one") == lines_of(workplace / name)
        assert weights_of(workplace / "one") == weights_of(workplace / name)
        for figure in ("final_validation_loss", "final_test_loss", "final_controls", "n_decisions"):
            assert one[figure] == summary(workplace / name)[figure], figure


def stop_after(n_decisions: int, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a replay that gets SIGTERM in a decision, long before a checkpoint is due, and check that it keeps it."""
    append, advance = run_store.RunFolder.append, LiveRun.advance

    def last(folder: run_store.RunFolder, record: DecisionRecord) -> None:
        append(folder, record)
        if record.telemetry.decision == n_decisions - 1:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(run_store, "CHECKPOINT_EVERY_S", 3600.0)
        patch.setattr(run_store.RunFolder, "append", last)
        assert run_here(arguments, monkeypatch) == 128 + signal.SIGTERM

    def next_one(*given: Any) -> Telemetry:
        telemetry = advance(*given)
        assert telemetry.decision >= n_decisions
        return telemetry

    monkeypatch.setattr(LiveRun, "advance", next_one)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["none", "bundle", "default"])
def test_kill_and_resume_gives_the_same_result(workplace: Path, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    zigzag_bundle(workplace / "policy.safetensors")
    chosen = policy if policy != "bundle" else str(workplace / "policy.safetensors")
    more = BLIND if policy == "default" else ("--policy", chosen, "--pruning", "magnitude", "--throughput-floor", "0")
    size = {"tokens": 102_400, "decisions": 40}
    assert run_here(command(workplace, "whole", *more, **size), monkeypatch) == 0
    process = subprocess.Popen([sys.executable, "-c", EAGER, *command(workplace, "cut", *more, **size)[3:]])
    checkpoint, lines = workplace / "cut" / "checkpoint.pt", workplace / "cut" / "telemetry.jsonl"
    end = time.monotonic() + 120
    while not (checkpoint.exists() and lines.read_text().count("\n") > 12):
        assert time.monotonic() < end
        assert process.poll() is None, "finished before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (workplace / "cut" / "summary.json").exists()
    assert run_here(command(workplace, "cut", *more, **size), monkeypatch) == 0
    expected, found = summary(workplace / "whole"), summary(workplace / "cut")
    for name in ("final_validation_loss", "final_test_loss", "initial_validation_loss", "n_decisions", "n_changes"):
        assert found[name] == expected[name], name
    assert lines_of(workplace / "whole") == lines_of(workplace / "cut")
    assert weights_of(workplace / "whole") == weights_of(workplace / "cut")
    assert found["n_changes"] > 5 or policy == "none"
    assert not checkpoint.exists()


MEASURED = {"time_s", "probe_time_s", "switch_time_s", "evaluation_time_s", "energy_j", "power_w", "memory_share"}
"""Fields of an interval that never repeat exactly."""
METERED = {field.name for field in OBSERVATION_FIELDS if field.metered}
"""What a policy sees of them, unless it is blind to them."""


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """Return telemetry.jsonl without what a clock, a meter or the memory says."""
    lines: list[dict[str, Any]] = [json.loads(line) for line in (folder / "telemetry.jsonl").open()]
    for line in lines:
        for name in MEASURED:
            del line["telemetry"][name]
        line["observation"] = {name: value for name, value in line["observation"].items() if name not in METERED}
    return lines


def weights_of(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


def full_disk(*_: object, **__: object) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_a_full_disk_at_the_end_keeps_the_run(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = workplace / "run"
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", full_disk)
        assert run_here(command(workplace, "run", decisions=2), monkeypatch) == 2
    said = capsys.readouterr().err
    assert said == (
        f"trainpilot: No space left on device: {out / 'model'}; the run is kept in {out / 'checkpoint.pt'}; the same "
        "command goes on from there once it can write\n"
    )
    assert not {path.name for path in out.iterdir()} & {"model", "summary.json"}

    with monkeypatch.context() as patch:
        patch.setattr(LiveRun, "advance", None)  # nothing is trained again
        assert run_here(command(workplace, "run", decisions=2), monkeypatch) == 0
    assert summary(out)["n_decisions"] == 2
    assert not (out / "checkpoint.pt").exists()


EAGER = """
import sys
from trainpilot.experiments import run_store
from trainpilot.experiments.cli import main
run_store.CHECKPOINT_EVERY_S, run_store.CHECKPOINT_COST = 0.0, 1e9
from trainpilot.experiments.cli import main
sys.argv = ["trainpilot", *sys.argv[1:]]
main()
"""


def test_a_finished_run_is_not_run_again_and_no_other_runs_in_its_folder(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run(command(workplace, "run"))
    assert first.returncode == 0, first.stderr
    before = (workplace / "run" / "summary.json").read_bytes()
    assert run_here(command(workplace, "run"), monkeypatch) == 0
    assert "already finished" in capsys.readouterr().out
    assert run_here(command(workplace, "run", "--seed", "1"), monkeypatch) == 2
    assert "seed was 0, now 1" in capsys.readouterr().err
    assert (workplace / "run" / "summary.json").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--policy", "nowhere.safetensors"), "policy: no file nowhere.safetensors"),
        (("--policy", "nowhere"), "no policy named 'nowhere' comes with trainpilot"),
        (("--tokens", "many"), "--tokens"),
        (("--tokens", "100"), "tokens must give every decision at least one step"),
        (("--tokens", "600s"), "--tokens"),
        (("--budget", "600s"), "tokens cannot be combined with budget, got 20480 and 600s; give one"),
        (("--text", "nowhere.txt"), "nowhere.txt"),
        (("--model", "nowhere.json"), "no file nowhere.json"),
        (("--preference", "speed=1"), "preference must look like"),
        (("--grid-intensity", "-1"), "grid_intensity must be a number >= 0"),
        (("--precision", "fp16"), "precision fp16 cannot be used"),
        (("--schedule", "wave"), "--schedule"),
        (("--device", "cuda"), "needs an NVIDIA GPU"),
        (("--colour", "red"), "--colour"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    workplace: Path,
    change: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if change[0] == "--device" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert run_here(command(workplace, "run", *change), monkeypatch) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("trainpilot: ")
    assert said.count("\n") == 1
    assert not (workplace / "run").exists()


def under(budget: str, place: Path, *more: str) -> list[str]:
    """Return a replay under a budget in place of tokens."""
    arguments = command(place, "run", *more)
    at = arguments.index("--tokens")
    return [*arguments[:at], "--budget", budget, *arguments[at + 2 :]]


def test_a_replay_ends_with_its_seconds(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_here(under("5s", workplace, "--policy", "default", "--decisions", "50"), monkeypatch) == 0
    found = summary(workplace / "run")
    assert found["budget"] == "5s"
    assert found["budget_spent"] == pytest.approx(5.0, rel=0.1)
    assert 40 <= found["n_decisions"] <= 50  # an interval has at least one step
    assert "used of the budget of 5s" in " ".join(capsys.readouterr().out.split())
    lines = [json.loads(line)["telemetry"] for line in (workplace / "run" / "telemetry.jsonl").open()]
    assert lines[-1]["budget_used"] == pytest.approx(1.0, abs=0.02)
    assert lines[-1]["finished"]


def test_a_budget_in_tokens_is_tokens(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_here(under("20.48k", workplace), monkeypatch) == 0
    found = summary(workplace / "run")
    assert (found["tokens"], found["budget"], found["budget_spent"]) == (20_480, None, None)
    assert run_here(command(workplace, "run"), monkeypatch) == 0, "the same settings: it is finished already"


SHARE = "give warmup_share"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("0s",), "budget must be above 0, got 0s"),
        (("-5s",), "or joules such as 50kJ, got '-5s'"),
        (("ten minutes",), "budget must be tokens such as 1M, seconds such as 600s"),
        (("9s", "--warmup-tokens", "100"), f"warmup_tokens must be left out under budget 9s, got 100; {SHARE}"),
        (("9s", "--warmup-share", "1"), "warmup_share must be in [0, 1), got 1.0"),
    ],
)
def test_a_bad_budget_is_one_line_and_exit_code_2(
    workplace: Path,
    arguments: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_here(under(arguments[0], workplace, *arguments[1:]), monkeypatch) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (workplace / "run").exists()


def test_joules_without_a_meter_are_one_line(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("trainpilot.llm_runtime.live_run.select_meter", lambda device: NoMeter("none here"))
    assert run_here(under("5kJ", workplace), monkeypatch) == 2
    said = capsys.readouterr().err
    assert "budget in joules needs a meter that counts them, got none (energy unknown: none here)" in said
    assert said.count("\n") == 1
    assert not (workplace / "run").exists()


def test_a_full_disk_costs_the_checkpoint_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_store.RunFolder(tmp_path / "run", {"seed": 0})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_store, "save_checkpoint", full)
    with pytest.warns(UserWarning, match="checkpoint could not be written: No space left"):
        folder.write_checkpoint({"snapshot": {}}, [])
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["config.json"]


@pytest.mark.parametrize("earlier", [True, False])
def test_a_last_checkpoint_finds_a_place(tmp_path: Path, earlier: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_store.RunFolder(tmp_path / "run", {"seed": 0})
    here, save = tmp_path / "run" / "checkpoint.pt", save_checkpoint
    if earlier:
        folder.write_checkpoint({"at": 1}, [])

    def full(path: Path, content: dict[str, Any]) -> None:
        if path == here:
            raise OSError(28, "No space left on device")
        save(path, content)

    monkeypatch.setattr(run_store, "save_checkpoint", full)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "elsewhere"))
    said = folder.keep({"at": 2}, [])
    if earlier:
        assert said.startswith(f"an earlier state of the run is kept in {here}; the same command goes on")
        assert load_checkpoint(here) == {"at": 1, "records": []}
        return
    [there] = (tmp_path / "elsewhere").glob("trainpilot-*/checkpoint.pt")
    assert said.startswith(f"the run is kept in {there}; move that file to {here}, and the same command goes on")
    assert load_checkpoint(there) == {"at": 2, "records": []}

    monkeypatch.setattr(run_store, "save_checkpoint", lambda *_: full(here, {}))
    assert "the run is lost" in folder.keep({"at": 2}, [])


def test_a_line_that_found_no_space_follows_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, records = run_store.RunFolder(tmp_path, {}), decision_records(4)
    plain = Path.open

    class Full(io.StringIO):
        def __exit__(self, *_: object) -> None:
            with plain(tmp_path / "telemetry.jsonl", "a") as file:
                file.write(self.getvalue()[:20])
            raise OSError(28, "No space left on device")

    folder.append(records[0])
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda *_, **__: Full())
        with pytest.warns(UserWarning, match="telemetry.jsonl could not be written: No space left on device"):
            folder.append(records[1])
        with warnings.catch_warnings(action="error"):  # it is said once
            folder.append(records[2])
    assert run_store.read_records(tmp_path) == records[:1]
    assert (tmp_path / "telemetry.jsonl").read_text().count("\n") == 1, "no half line"
    folder.write_summary({})
    assert run_store.read_records(tmp_path) == records[:3]
    folder.append(records[3])
    assert run_store.read_records(tmp_path) == records


def test_a_damaged_checkpoint_is_one_clear_line(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (workplace / "run").mkdir()
    (workplace / "run" / "checkpoint.pt").write_bytes(b"nonsense")
    assert run_here(command(workplace, "run"), monkeypatch) == 2
    said = capsys.readouterr().err
    assert "cannot be resumed" in said
    assert said.count("\n") == 1
