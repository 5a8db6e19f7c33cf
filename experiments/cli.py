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
import sys
from typing import Annotated, NoReturn

import tyro
from rich.console import Console
from tyro.conf import subcommand

from trainpilot.experiments.options import (
    CalibrateOptions,
    CompareOptions,
    DemoOptions,
    DoctorOptions,
    ExportOptions,
    FitSweepOptions,
    InspectOptions,
    ReplayOptions,
    ReportOptions,
    TrainAgentOptions,
)

Command = (
    Annotated[DemoOptions, subcommand("demo")]
    | Annotated[TrainAgentOptions, subcommand("train-agent")]
    | Annotated[ReplayOptions, subcommand("replay")]
    | Annotated[CompareOptions, subcommand("compare")]
    | Annotated[CalibrateOptions, subcommand("calibrate")]
    | Annotated[FitSweepOptions, subcommand("fit-sweep")]
    | Annotated[ExportOptions, subcommand("export")]
    | Annotated[DoctorOptions, subcommand("doctor")]
    | Annotated[InspectOptions, subcommand("inspect")]
    | Annotated[ReportOptions, subcommand("report")]
)

COMMANDS = (
    "demo", "train-agent", "replay", "compare", "calibrate", "fit-sweep", "export", "doctor", "inspect", "report",
)  # fmt: skip
DESCRIPTION = "An autopilot for language-model training. Start with `trainpilot demo`, then `trainpilot replay --help`."


def main() -> None:
    """Run the command line. Invalid input ends with a one-line message and exit code 2."""
    _quieten_libraries()
    options = _parse(sys.argv[1:])
    try:
        _run(options)
    except ValueError as error:
        _refuse(str(error))
    except OSError as error:
        full = error.errno == errno.ENOSPC
        way_out = "free space or choose another --out" if full else "choose another --out"
        _refuse(f"{error.strerror or error}: {error.filename or 'output'}; {way_out}", code=1 if full else 2)
    except KeyboardInterrupt:
        _refuse("interrupted; run the same command again to resume", code=130)


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
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            return tyro.cli(
                Command,
                prog="trainpilot",
                description=DESCRIPTION,
                args=arguments,
                config=(tyro.conf.OmitSubcommandPrefixes,),
            )
    except SystemExit as stop:
        if stop.code:
            command = f"{arguments[0]} " if arguments and arguments[0] in COMMANDS else ""
            _refuse(f"{_first_block(captured.getvalue()).rstrip('.')}; see trainpilot {command}--help")
        raise


def _first_block(box: str) -> str:
    """Return the first paragraph of a boxed message as one line."""
    lines = [line.strip("│╭╮╰╯─ \t") for line in box.splitlines()[1:]]
    block = []
    for line in lines:
        if not line:
            break
        block.append(line)
    return re.sub(r"\s+", " ", " ".join(block)) or "the arguments cannot be parsed"


def _refuse(message: str, code: int = 2) -> NoReturn:
    print(f"trainpilot: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)


def _quieten_libraries() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


if __name__ == "__main__":
    main()
