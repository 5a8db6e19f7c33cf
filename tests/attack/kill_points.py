"""Kill a command at one of its writes, go on with the same command, and compare with a run that nobody killed."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tests.attack import furniture, valid_runs
from tests.attack.attempts import Attempt, Failures, Outcome, Promise, one_line
from tests.attack.forked import in_fork, trainpilot
from tests.attack.furniture import REPLAY, arguments

TITLE = "kills and resumes"
PROMISES = {
    "same result": Promise(
        "Killed at any moment, the same command goes on, and ends with the same result to the last bit.",
        "`replay` under its base schedule and, for quality alone, under a policy, `train-agent` in the simulator, "
        "`compare` and `calibrate` die at one of the writes, renames and removals that they make, every other time in "
        "the middle of it, and some a second time on the way; weights, losses and decisions are compared with those of "
        "an undisturbed run, without measured seconds and joules",
    ),
    "no rests": Promise(
        "No temporary file stays behind once the command has ended.",
        "the folders of output and cache are searched after each of these runs",
    ),
}
KILLED = 9
RUN_LIMIT_S = 120.0
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree")
"""What Python tells its audit hooks before it changes a file; `os.replace` is told as a renaming."""


class Executioner:
    """Counts the changes that this process makes to the files below a folder, and ends it at one of them.

    TensorBoard's events are left out: a thread writes them, so that their place in the order is chance.

    Args:
        root: The folder.
        at: Number of the change at which the process dies, from 1; never for 0.
        torn: Whether half of it is done by then.
    """

    def __init__(self, root: Path, at: int = 0, *, torn: bool = False) -> None:
        self.root, self.at, self.torn, self.count = str(root), at, torn, 0
        sys.addaudithook(self.hear)

    def hear(self, event: str, given: tuple[Any, ...]) -> None:
        """Count a change, and die at the one that was chosen."""
        if event not in EVENTS or not given or not isinstance(given[0], str | os.PathLike):
            return
        path = os.path.abspath(os.fspath(given[0]))
        if not path.startswith(self.root) or "/tb/" in path or path.endswith((".stdout", ".stderr")):
            return
        if event == "open" and not (isinstance(given[2], int) and given[2] & WRITING):
            return
        self.count += 1
        if self.count == self.at:
            if self.torn:
                self._tear(event, path)
            os._exit(KILLED)

    def _tear(self, event: str, path: str) -> None:
        """Leave half a file under the temporary name, or half a line at the end of one that is added to."""
        self.at = 0  # what this writes is not counted
        if event == "os.rename" and os.path.isfile(path):
            os.truncate(path, os.path.getsize(path) // 2)
        elif event == "open" and path.endswith("telemetry.jsonl"):
            with open(path, "a", encoding="utf-8") as file:
                file.write('{"telemetry": {"decision"')


# The commands ---------------------------------------------------------------------------------------------------------


def _cost_table(config: Any, **options: Any) -> Any:
    """Return a table that needs no clock: every pass costs a millisecond."""
    from trainpilot.experiments.costs.table import CostRow, CostTable
    from trainpilot.llm_runtime.timing import Cost

    cost = Cost(time_s=1e-3, energy_j=0.1)
    rows = tuple(
        CostRow(kind=kind, precision="fp32", batch_size=batch, cost=cost)  # type: ignore[arg-type]
        for kind in ("step", "forward")
        for batch in (1, 16)
    )
    return CostTable(
        device="a device", model=config.model, sequence_length=config.sequence_length, energy_source="estimated",
        rows=rows, probe_overhead=cost, rounds=4, spread=1.0,
        extras={name: cost for name in ("schedule-free", "prodigy", "magnitude", "evolution")},
        switches={name: cost for name in ("batch", "precision", "magnitude", "evolution", "width")},
    )  # fmt: skip


class Here:
    """Workers that are this process."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self.run_one, self.waiting = run, []  # type: ignore[var-annotated]

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *_: Any) -> None:
        """Do nothing."""

    @property
    def free(self) -> bool:
        """Whether no run is waiting."""
        return not self.waiting

    @property
    def busy(self) -> bool:
        """Whether a run is waiting."""
        return bool(self.waiting)

    def start(self, *given: Any) -> None:
        """Take a run."""
        self.waiting.append(given)

    def finished(self) -> list[Any]:
        """Carry out the run that waits."""
        return [self.run_one(*self.waiting.pop())]


def _one_process() -> None:
    """Have `compare` and `calibrate` run in this process, and take no time to measure what only a clock can know."""
    from trainpilot.experiments.calibrate import command as calibrate
    from trainpilot.experiments.calibrate.calibration import SHIPPED, load_calibrations
    from trainpilot.experiments.calibrate.runs import carry_out
    from trainpilot.experiments.compare import command as compare
    from trainpilot.experiments.compare.execute import execute
    from trainpilot.experiments.costs import measure

    def run_all(work: Sequence[tuple[Any, str]], jobs: int, engine: None) -> Iterator[tuple[Any, Any]]:
        for setting, key in work:
            yield setting, carry_out(setting, key)

    patches: Mapping[Any, Mapping[str, Any]] = {
        measure: {"measure_cost_table": _cost_table},
        compare: {"precisions_that_pay": lambda case: ("fp32",), "run_workers": lambda *_: Here(execute)},
        calibrate: {
            "measure_cost_table": _cost_table, "run_all": run_all, "_precisions": lambda base, run: ["fp32"],
            "fit": lambda runs: load_calibrations(SHIPPED)[0].physics,
        },
    }  # fmt: skip
    for module, changes in patches.items():
        for name, new in changes.items():
            setattr(module, name, new)


PLAIN = arguments("replay", {**REPLAY, "out": "out"})
COMPARE = ["compare", "--cases", "cases.yaml", "--methods", "constant,cosine", "--seeds", "1", "--jobs", "1",
           "--no-tensorboard", "--out", "out"]  # fmt: skip
CALIBRATE = arguments(
    "calibrate",
    {"model": "model.json", "text": "text.txt", "tokens": "256", "batch-size": "4", "sequence-length": "16",
     "decisions": "2", "effort": "quick", "jobs": "1", "device": "cpu", "out": "out"},
)  # fmt: skip


def compare_ending(folder: Path) -> Any:
    """Return losses and settings of a comparison's runs, and its rows."""
    runs = {}
    for path in sorted((folder / "runs").glob("*.json")):
        told = json.loads(path.read_text(encoding="utf-8"))
        runs[path.name] = [told["final_validation_loss"], told["final_test_loss"], told["intervals"]["train_loss"]]
    rows = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))["rows"]
    return {"runs": runs, "rows": rows, "report": (folder / "report.html").is_file()}


def calibrate_ending(folder: Path) -> Any:
    """Return the losses of a calibration's runs, and its errors."""
    runs = {}
    for path in sorted((folder / "runs").glob("*.json")):
        told = json.loads(path.read_text(encoding="utf-8"))["run"]
        runs[path.name] = [told["validation"], [each["train_loss"] for each in told["telemetry"]]]
    told = json.loads((folder / "calibration.json").read_text(encoding="utf-8"))
    return {"runs": runs, **{name: told[name] for name in ("held_out", "fitted", "best_rates")}}


class Command(NamedTuple):
    """A command that is killed."""

    line: list[str]
    ending: Callable[[Path], Any]
    """Returns what its results are, from the folder that it has written."""
    kills: int
    """How many kills it suffers."""


COMMANDS: Mapping[str, Command] = {
    "replay": Command(PLAIN, valid_runs.replay_ending, 25),
    "replay --policy": Command(valid_runs.replay_line("out"), valid_runs.replay_ending, 30),
    "train-agent": Command(valid_runs.agent_line("out"), valid_runs.agent_ending, 25),
    "compare": Command(COMPARE, compare_ending, 15),
    "calibrate": Command(CALIBRATE, calibrate_ending, 13),
}


@contextmanager
def _quiet(place: Path) -> Iterator[None]:
    """Furnish the folder, and give it a cache of its own."""
    os.environ["TRAINPILOT_CACHE"] = str(place / "cache")
    if not (place / "text.txt").exists():
        furniture.valid_files(place)
    yield


def _run(line: Sequence[str], place: Path, at: int = 0, *, torn: bool = False) -> int:
    """Carry out a command, and return how many changes it made; the process may die on the way."""
    valid_runs.often()
    _one_process()
    executioner = Executioner(place, at, torn=torn)
    said = trainpilot(line, place.parent)
    if said.code:
        raise RuntimeError(f"exit status {said.code}: {one_line(' / '.join(said.lines[-2:]))}")
    return executioner.count


def prepare(shared: Path) -> None:
    """Carry out every command undisturbed, note how it ends, and count the changes that it makes."""
    known = {}
    for number, (name, (line, ending, _)) in enumerate(COMMANDS.items()):
        place = shared / str(number)
        place.mkdir()
        os.chdir(place)
        with _quiet(place):
            ended = in_fork(partial(_run, line, place), limit_s=RUN_LIMIT_S)
        if ended.death is not None:
            raise RuntimeError(f"{name}: {ended.death}")
        known[name] = {"changes": ended.value, "ending": ending(place / "out")}
    (shared / "known.json").write_text(json.dumps(known), encoding="utf-8")


def attempts(seed: int, shared: Path) -> list[Attempt]:
    """Return kills at points that lie evenly over the changes that a command makes."""
    known = json.loads((shared / "known.json").read_text(encoding="utf-8"))
    found = []
    for name, command in COMMANDS.items():
        most = known[name]["changes"]
        points = sorted({1 + (index * (most - 1)) // (command.kills - 1) for index in range(command.kills)})
        for index, at in enumerate(points):
            torn, again = index % 2 == 1, at // 2 + 1 if index % 5 == 4 else 0
            told = f"{name}, killed at change {at} of {most}" + (", half done" if torn else "")
            run = partial(_attack, command, known[name]["ending"], (at, again) if again else (at,), torn)
            found.append(
                Attempt(
                    name=told + (f", and once more at change {again}" if again else ""),
                    promises=tuple(PROMISES),
                    run=run,
                    limit_s=3 * RUN_LIMIT_S,
                )
            )
    return found


def example(place: Path) -> Outcome:
    """Kill a replay of one file, and compare with one that nobody killed."""
    whole = place / "whole"
    whole.mkdir()
    os.chdir(whole)
    with _quiet(whole):
        ended = in_fork(lambda: _run(PLAIN, whole), limit_s=RUN_LIMIT_S)
    if ended.death is not None:
        return {"same result": ended.death}
    os.chdir(place)
    command = Command(PLAIN, valid_runs.replay_ending, 0)
    return _attack(command, valid_runs.replay_ending(whole / "out"), (40,), True, place)


def _attack(command: Command, expected: Any, points: Sequence[int], torn: bool, place: Path) -> Failures:
    with _quiet(place):
        for point in points:
            killed = in_fork(partial(_run, command.line, place, point, torn=torn), limit_s=RUN_LIMIT_S)
            if killed.death is not None and killed.code != KILLED:
                return {"same result": f"it cannot go on: {killed.death}"}
        ended = in_fork(lambda: _run(command.line, place), limit_s=RUN_LIMIT_S)
    failures: Failures = {}
    if ended.death is not None:
        failures["same result"] = f"it cannot go on: {ended.death}"
    elif (found := json.loads(json.dumps(command.ending(place / "out")))) != expected:
        other = [name for name in expected if found.get(name) != expected[name]]
        failures["same result"] = f"another result: {', '.join(other)}"
    rests = [path.name for path in place.rglob(".*") if path.name not in (".stdout", ".stderr")]
    if rests:
        failures["no rests"] = one_line(f"left behind: {', '.join(sorted(rests))}", 120)
    return failures
