"""The command line teaches, starts fast, and turns every fault into one line."""

import io
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from trainpilot.experiments import cli


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["trainpilot", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


@pytest.mark.parametrize("command", ["", *cli.COMMANDS])
def test_help_teaches(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert call(monkeypatch, *command.split(), "--help") == 0
    said = capsys.readouterr().out
    assert "usage: trainpilot" in said
    if command in ("replay", "train-agent"):
        assert f"trainpilot {command} --" in said  # an example to copy
    plain = " ".join(said.replace("│", " ").split())
    assert not re.search(r"\b(INT|FLOAT|TOKENS)\b(?! [\[(>])", plain), "a number without its range"
    assert "None" not in plain.replace("{None,", ""), "a default that says nothing"


def test_the_overview_has_a_sentence_for_each_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "--help") == 0
    said = capsys.readouterr().out
    assert len(said.splitlines()) < 40
    assert re.findall(r"• ([a-z-]+) ", said) == list(cli.COMMANDS)
    assert "Try for instance" not in said


def test_a_help_text_of_two_lines_is_one_paragraph(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    assert call(monkeypatch, "replay", "--help") == 0
    assert "to the last bit the run of the base schedule. The first step" in capsys.readouterr().out


@pytest.mark.parametrize("argument", ["--help", "--polcy"])
def test_help_and_typing_errors_load_nothing_heavy(argument: str) -> None:
    code = (
        f"import sys\nsys.argv = ['trainpilot', 'replay', {argument!r}]\n"
        "from trainpilot.experiments.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'stable_baselines3', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "trainpilot"),
        (("fly",), "Unrecognized options: fly; see trainpilot --help"),
        (("replya", "--out", "x"), "options: replya --out x; did you mean replay?; see trainpilot --help"),
        (("replay", "--polcy", "none", "--out", "x"), "--polcy, none; did you mean --policy?; see trainpilot replay"),
        (("replay", "--batch_sise=8", "--out", "x"), "did you mean --batch-size?"),
        (("replay",), "--out"),
        (("replay", "--throughput-floor", "1.5", "--out", "x"), "throughput_floor must be in [0, 1], got 1.5"),
        (("train-agent", "--out", "x"), "--recipe"),
        (("train-agent", "--recipe", "nope", "--out", "x"), "recipe must be one of default, demo, tiny or a YAML file"),
        (("inspect", "nowhere"), "path must be a bundle, a run's folder or an agent's folder, got nowhere"),
        (("replay", "--model", "nobody/nothing", "--out", "x"), "neither a preset"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, *arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("trainpilot: ")
    assert message in said
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OSError(28, "No space left on device", "out/summary.json"), 2, "No space left on device: out/summary.json"),
        (NotADirectoryError(20, "Not a directory", "file/out"), 2, "Not a directory: file/out; choose another --out"),
        (KeyboardInterrupt(), 130, "run the same command again to resume"),
    ],
)
def test_faults_on_the_way_are_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    message: str,
) -> None:
    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr(cli, "_run", fail)
    assert call(monkeypatch, "doctor") == code
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ("replay", "--polcy", "none", "--out", "x"),
            "trainpilot: Unrecognized options: --polcy, none; did you mean --policy?; see trainpilot replay --help\n",
        ),
        (("fly",), "trainpilot: Unrecognized options: fly; see trainpilot --help\n"),
    ],
)
def test_a_locale_without_utf8_gives_the_same_line(arguments: tuple[str, ...], expected: str) -> None:
    command = [sys.executable, "-m", "trainpilot.experiments.cli", *arguments]
    plain = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    result = subprocess.run(command, env=plain, capture_output=True, check=False)
    said = result.stderr.decode("ascii")
    assert result.returncode == 2
    assert said == expected


def test_signs_that_the_locale_lacks_are_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr(sys, "argv", ["trainpilot", "doctor"])
    monkeypatch.setattr(cli, "_run", lambda _: print("x/÷ 1.50", flush=True))
    cli.main()
    assert written.getvalue() == b"x/? 1.50\n"


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"trainpilot {version('trainpilot')}\n"


def test_doctor_prints_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from trainpilot.experiments import doctor

    monkeypatch.setattr(doctor, "diagnose", lambda: {"controls": {}})
    monkeypatch.setattr(sys, "argv", ["trainpilot", "doctor", "--json"])
    cli.main()
    assert json.loads(capsys.readouterr().out) == {"controls": {}}
