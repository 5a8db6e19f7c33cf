"""Run the console command `trainpilot`: parse its arguments and call the chosen command.

The modules of a command are imported only when it runs, so that `trainpilot --help` is fast.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import signal
import sys
import threading
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from difflib import get_close_matches
from functools import reduce
from importlib.metadata import version
from itertools import dropwhile, takewhile
from operator import or_
from pathlib import Path
from typing import Annotated, Any, NoReturn

import tyro
from rich.console import Console
from tyro.conf import subcommand

from trainpilot.experiments import stopping
from trainpilot.experiments.one_writer import one_writer
from trainpilot.experiments.options import (
    CalibrateOptions,
    CompareOptions,
    CutOptions,
    DemoOptions,
    DoctorOptions,
    ExportOptions,
    FitSweepOptions,
    InspectOptions,
    ReplayOptions,
    ReportOptions,
    TrainAgentOptions,
)
from trainpilot.llm_runtime.busy import wait_briefly
from trainpilot.llm_runtime.files import check_writable
from trainpilot.llm_runtime.plain_values import one_line

COMMANDS = {
    "demo": DemoOptions,
    "train-agent": TrainAgentOptions,
    "replay": ReplayOptions,
    "compare": CompareOptions,
    "calibrate": CalibrateOptions,
    "fit-sweep": FitSweepOptions,
    "cut": CutOptions,
    "export": ExportOptions,
    "doctor": DoctorOptions,
    "inspect": InspectOptions,
    "report": ReportOptions,
}
DESCRIPTION = "An autopilot for language-model training. Start with `trainpilot demo`, then `trainpilot replay --help`."
EXTRAS = {
    "transformers": "train",
    "tokenizers": "train",
    "tensorboard": "train",
    "scipy": "train",
    "loky": "train",
    "matplotlib": "report",
    "jinja2": "report",
    "stable_baselines3": "agent",
    "sb3_contrib": "agent",
    "optuna": "compare",
    "pymoo": "compare",
    "ray": "ray",
    "submitit": "slurm",
}
"""Extras of the installation by the packages that they bring along. Without any, a command has its help only."""
Command: Any = reduce(or_, (Annotated[options, subcommand(name)] for name, options in COMMANDS.items()))
Overview: Any = reduce(
    or_,
    (
        Annotated[options, subcommand(name, description=(options.__doc__ or "").partition("\n\n")[0])]
        for name, options in COMMANDS.items()
    ),
)
"""The commands, each with the first sentence of its help only."""


def main() -> None:
    """Run the command line. Invalid input ends with a one-line message and exit code 2."""
    _prepare_process()
    options = _parse(sys.argv[1:])
    try:
        with stopping.answered():
            _check_out(options)
            with _one_writer(options):
                _run(options)
    except ValueError as error:
        _refuse(str(error))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        _refuse(f'this command needs {package}, which is not installed; pip install "trainpilot[{EXTRAS[package]}]"')
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        way_out = "free space or choose another --out" if full else "choose another --out"
        notes = getattr(error, "__notes__", None) or [way_out]
        _refuse("; ".join([f"{error.strerror or error}: {error.filename or 'output'}", *notes]))
    except stopping.Stopped as stop:
        said = "interrupted" if stop.number == signal.SIGINT else f"ended by {signal.Signals(stop.number).name}"
        _refuse(f"{said}; run the same command again to resume", code=128 + stop.number)
    except KeyboardInterrupt:
        _refuse("interrupted; run the same command again to resume", code=130)


def _check_out(options: object) -> None:
    """Raise `OSError` where a command could not write its results, which it would find out after measuring."""
    if isinstance(options, CalibrateOptions | FitSweepOptions | CutOptions | ExportOptions):
        check_writable(options.out)
    elif isinstance(options, CompareOptions):
        check_writable(options.folder)


def _one_writer(options: object) -> AbstractContextManager[None]:
    """Return the lock of the folder that a command writes into."""
    if isinstance(options, CompareOptions):  # a report may be written while others still run
        return nullcontext() if options.report_only else one_writer(options.folder)
    out = getattr(options, "out", None)
    if isinstance(options, ReportOptions) or not isinstance(out, Path):  # a page is one file, written whole
        return nullcontext()
    return one_writer(out)


def _run(options: object) -> None:
    console = Console()
    if isinstance(options, DemoOptions):
        from trainpilot.experiments.demo import demo

        demo(options, console)
    elif isinstance(options, TrainAgentOptions):
        from trainpilot.experiments.train_agent import train_agent

        train_agent(options, console)
    elif isinstance(options, ReplayOptions):
        from trainpilot.experiments.replay import replay

        replay(options, console)
    elif isinstance(options, CompareOptions):
        from trainpilot.experiments.compare.command import compare

        compare(options, console)
    elif isinstance(options, CalibrateOptions):
        from trainpilot.experiments.calibrate.command import calibrate

        calibrate(options, console)
    elif isinstance(options, FitSweepOptions):
        from trainpilot.experiments.fit_sweep import fit_sweep

        fit_sweep(options, console)
    elif isinstance(options, CutOptions):
        from trainpilot.experiments.cut import cut

        cut(options, console)
    elif isinstance(options, ExportOptions):
        from trainpilot.experiments.export.command import export

        export(options, console)
    elif isinstance(options, DoctorOptions):
        _doctor(options, console)
    else:
        _show(options, console)


def _show(options: object, console: Console) -> None:
    """Run the commands that show what is there and train nothing."""
    if isinstance(options, InspectOptions):
        from trainpilot.experiments.inspect_run import inspect_paths

        inspect_paths(options.path, console, everything=options.all)
    elif isinstance(options, ReportOptions):
        from trainpilot.experiments.report.run_page import report

        report(options, console)


def _doctor(options: DoctorOptions, console: Console) -> None:
    from trainpilot.experiments.doctor import diagnose, print_report

    report = diagnose()
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        print_report(report, console)


def _parse(arguments: list[str]) -> object:
    """Return the chosen command's options; invalid arguments end with a one-line message and exit code 2."""
    if arguments == ["--version"]:
        print(f"trainpilot {version('trainpilot')}")
        raise SystemExit
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            return tyro.cli(
                Command if arguments[:1] and arguments[0] in COMMANDS else Overview,
                prog="trainpilot",
                description=DESCRIPTION,
                args=arguments,
                config=(tyro.conf.OmitSubcommandPrefixes,),
            )
    except SystemExit as stop:
        if stop.code:
            command = f"{arguments[0]} " if arguments and arguments[0] in COMMANDS else ""
            said = re.sub(r"^Error parsing \w+Options: | \(applied to [^)]*\)", "", _first_block(captured.getvalue()))
            _refuse(f"{said.rstrip('.')}{_meant(arguments)}; see trainpilot {command}--help")
        raise


def _first_block(box: str) -> str:
    """Return the first paragraph of a boxed message as one line. Without UTF-8 the box consists of dashes and bars."""
    lines = box.splitlines()[1:]
    block = takewhile(_has_words, dropwhile(lambda line: not _has_words(line), lines))
    return " ".join(" ".join(line.strip("│| \t") for line in block).split()) or "the arguments cannot be parsed"


def _has_words(line: str) -> bool:
    return any(map(str.isalnum, line))


def _meant(arguments: list[str]) -> str:
    """Return a question whether another command or option was meant than the first one that does not exist."""
    command, *rest = arguments or [""]
    if command not in COMMANDS:
        known, given = list(COMMANDS), [command]
    else:
        options = ["--" + each.name.replace("_", "-") for each in fields(COMMANDS[command])]
        known, given = [*options, "--help"], [word.partition("=")[0] for word in rest if word.startswith("--")]
    for word in given:
        if word.replace("_", "-") not in known and (close := get_close_matches(word, known, 1)):
            return f"; did you mean {close[0]}?"
    return ""


def _refuse(message: str, code: int = 2) -> NoReturn:
    print(f"trainpilot: {one_line(message)}", file=sys.stderr)
    raise SystemExit(code)


def _prepare_process() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and not stream.encoding.lower().startswith("utf"):
            stream.reconfigure(errors="replace")  # what the locale lacks becomes a question mark, not an error
    threading.excepthook = _say_nothing_of_logs
    wait_briefly()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _say_nothing_of_logs(failure: threading.ExceptHookArgs) -> None:
    """Pass over the write errors of TensorBoard's threads: the next event raises them again, and becomes a warning."""
    if not (isinstance(failure.exc_value, OSError) and type(failure.thread).__name__ == "_AsyncWriterThread"):
        threading.__excepthook__(failure)


if __name__ == "__main__":
    main()
