"""What a malformed file may do: be refused in one line, or load as something that is sound; quickly, and no more."""

from __future__ import annotations

import json
import math
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.attack.attempts import Failures, changes, content_of, control_characters, last_frame, one_line
from tests.attack.command_lines import refused
from tests.attack.forked import Called, grown_bytes, trainpilot
from tests.attack.mutations import NONSENSE, Mutation, as_json

LOAD_S, MODEL_S = 1.0, 5.0
"""Processor seconds that a refusal may take, without and with the building of a model."""
MEMORY = 200 * 10**6


class Judge:
    """Calls what reads a file, and notes what it must not do."""

    def __init__(self, most_s: float = LOAD_S) -> None:
        self.failures: Failures = {}
        self.most_s = most_s

    def loaded(self, call: Callable[[], Any], promise: str = "refused") -> Any:
        """Return what a call loads; `None` where it refuses, in one line, quickly and in little memory."""
        start, memory = time.process_time(), grown_bytes()
        value = None
        try:
            value = call()
        except ValueError as error:
            self._check_message(str(error), promise)
        except BaseException as error:
            self.failures[promise] = last_frame(error)
        self.note_cost(time.process_time() - start, grown_bytes() - memory)
        return value

    def _check_message(self, message: str, promise: str) -> None:
        if not message.strip() or "\n" in message.strip():
            self.failures[promise] = f"a message of {len(message.splitlines())} lines: {one_line(message)}"
        elif len(message) > 2_000:
            self.failures[promise] = f"a message of {len(message)} characters: {one_line(message, 80)}"

    def note_cost(self, seconds: float, memory: int) -> None:
        """Note the limits that were passed."""
        if seconds > self.most_s:
            self.failures["limits"] = f"{seconds:.1f} s of processor time"
        elif memory > MEMORY:
            self.failures["limits"] = f"{memory / 1e6:.0f} MB"

    def sound(self, call: Callable[[], str | None], promise: str = "refused") -> Failures:
        """Use what was loaded, which returns what is wrong with it, and return all failures."""
        try:
            wrong = call()
        except BaseException as error:
            wrong = f"accepted, then {last_frame(error)}"
        if wrong is not None:
            self.failures.setdefault(promise, wrong)
        return self.failures


def _nonsense(mutation: Mutation | None) -> str | None:
    """Return what is wrong with a file that was accepted, if it holds a number that can mean nothing."""
    return f"accepted with {mutation}" if mutation is not None and mutation.change in NONSENSE else None


# Bundles ----------------------------------------------------------------------------------------------------------


def split_safetensors(path: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return the JSON text in a bundle's header, parsed, and its tensors."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
        return json.loads(file.metadata()["trainpilot"]), tensors


def safetensors(content: Any, tensors: Any) -> bytes:
    """Return a safetensors file with a JSON text in its header; what is no tensor is left out."""
    from safetensors.torch import save

    kept = {name: value.contiguous() for name, value in tensors.items() if isinstance(value, torch.Tensor)}
    return save(kept, metadata={"trainpilot": as_json(content)})


def bundle_file(make: Callable[[], bytes], place: Path) -> Failures:
    """Load a bundle, decide and steer with it, and have it shown."""
    from trainpilot.agents.bundle import PolicyBundle

    path = place / "mutated.safetensors"
    path.write_bytes(make())
    judge = Judge()
    bundle = judge.loaded(lambda: PolicyBundle.load(path))
    if bundle is not None:
        judge.sound(lambda: _decides(bundle))
    said = trainpilot(["inspect", str(path)], place.parent)
    if reason := shown_or_refused(said, refuses=bundle is None):
        judge.failures.setdefault("refused", f"inspect: {reason}")
    if printed := control_characters(said.out + said.err):
        judge.failures["terminal"] = printed
    return judge.failures


def _decides(bundle: Any) -> str | None:
    """Return what is wrong with a bundle's decisions."""
    from trainpilot import Steering, SteeringSettings
    from trainpilot.envs.action import N_CHOICES, check_action
    from trainpilot.envs.decision import N_STACK

    random = np.random.default_rng(0)
    masks = np.ones(sum(N_CHOICES), bool)
    for _ in range(3):
        observation = random.uniform(-1, 1, N_STACK * len(bundle.fields)).astype(np.float32)
        if not np.isfinite(bundle.logits(observation)).all():
            return "accepted, then logits that are not finite"
        check_action(bundle.act(observation, masks))
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        settings = SteeringSettings(sequences=400, batch_size=2, policy=bundle, probe=False)
        steering = Steering(model, optimizer, settings)
        for _ in range(12):
            with steering.step() as step:
                step.backward(lambda batch: model(batch).square().mean(), batch=torch.ones(step.batch_size, 3))
    failed = [str(warning.message) for warning in caught if "policy failed" in str(warning.message)]
    rate = steering.learning_rate
    if failed:
        return f"accepted, then {one_line(failed[0], 120)}"
    return None if math.isfinite(rate) and rate > 0 else f"accepted, then a learning rate of {rate}"


def shown_or_refused(said: Called, *, refuses: bool) -> str | None:
    """Return what is wrong with what a command said that may show a file, or refuse it."""
    if said.code == 0 and not refuses:
        return "a traceback" if "Traceback" in said.err else None
    return refused(said)


# Files that a function reads ------------------------------------------------------------------------------------------


def recipe_file(path: Path, mutation: Mutation | None) -> Failures:
    """Load a recipe."""
    from trainpilot.experiments.recipe import load_recipe

    judge = Judge()
    loaded = judge.loaded(lambda: load_recipe(str(path)))
    return judge.sound(lambda: None if loaded is None else _nonsense(mutation))


def case_file(path: Path, mutation: Mutation | None) -> Failures:
    """Load cases of a comparison."""
    from trainpilot.experiments.compare.cases import load_cases

    judge = Judge()
    loaded = judge.loaded(lambda: load_cases(str(path)))
    return judge.sound(lambda: None if loaded is None else _nonsense(mutation))


def calibration_file(path: Path, mutation: Mutation | None) -> Failures:
    """Load a calibration, and simulate with its physics."""
    from trainpilot.experiments.calibrate.calibration import load_calibrations

    judge = Judge()
    loaded = judge.loaded(lambda: load_calibrations(path))
    if not loaded:
        return judge.failures
    return judge.sound(lambda: _simulates(loaded[0].physics))


def _simulates(physics: Any) -> str | None:
    from trainpilot.llm_runtime.simulator.runs import Pool, SimulatedRuns

    runs = SimulatedRuns(n_runs=2, seed=0, pool=Pool.draw(4, 0, [physics]))
    losses = np.concatenate([runs.reference_losses.ravel(), runs.best_learning_rate.ravel()])
    return None if np.isfinite(losses).all() and (losses > 0).all() else "accepted, then simulated runs without sense"


def model_file(path: Path, mutation: Mutation | None) -> Failures:
    """Build a model from its config, and look whether it is causal."""
    from trainpilot.llm_runtime.models import load_model

    judge = Judge(MODEL_S)
    loaded = judge.loaded(lambda: load_model(str(path), 0))
    return judge.failures if loaded is None else judge.sound(lambda: _is_causal(loaded.model))


def _is_causal(model: Any) -> str | None:
    tokens = torch.arange(32).view(2, 16)
    other = tokens.clone()
    other[:, -1] = 77
    with torch.no_grad():
        one, two = (model.eval()(input_ids=each).logits for each in (tokens, other))
    if not torch.isfinite(one).all():
        return "accepted, then logits that are not finite"
    return None if torch.allclose(one[:, :-1], two[:, :-1], atol=1e-5) else "accepted, a model that sees the future"


def loaded_run_file(command: str, path: Path, mutation: Mutation | None) -> Failures:
    """Read the file of a finished run, which counts as missing where it is damaged."""
    from trainpilot.experiments.calibrate.runs import RunFile
    from trainpilot.experiments.results import RunResult

    kind: Any = RunFile if command == "calibrate" else RunResult
    judge = Judge()
    record = judge.loaded(lambda: kind.read(path))
    return judge.failures if record is None else judge.sound(lambda: _is_record(record))


def _is_record(record: Any) -> str | None:
    return None if type(record).from_json(record.to_json()) is not None else "accepted, then lost"


def cost_file(path: Path, mutation: Mutation | None) -> Failures:
    """Read a cost table, and price a step and an evaluation by it."""
    from trainpilot.experiments.costs.table import CostTable

    judge = Judge()
    table = judge.loaded(lambda: CostTable.read(path))
    if table is None:
        return judge.failures
    return judge.sound(lambda: _prices(table))


def _prices(table: Any) -> str | None:
    costs = [table.step(4, table.rows[0].precision), table.evaluation(8, 4), table.probe(2, 4)]
    seconds = [cost.time_s for cost in costs]
    sound = all(math.isfinite(each) and each >= 0 for each in seconds)
    return None if sound else f"accepted, then costs of {seconds} s"


def sweep_file(path: Path, mutation: Mutation | None) -> Failures:
    """Read a past sweep."""
    from trainpilot.experiments.fit_sweep import Defaults, read_sweep

    judge = Judge()
    defaults = Defaults(schedule="cosine", warmup_steps=100, end_learning_rate=0.0)
    sweep = judge.loaded(lambda: read_sweep(path, defaults))
    if sweep is None:
        return judge.failures

    def sound() -> str | None:
        for run in sweep.runs:
            values = [run.n_parameters, run.steps, run.learning_rate, run.batch]
            if not all(math.isfinite(value) and value > 0 for value in values) or run.warmup_steps < 0:
                return f"accepted {run}"
        return None

    return judge.sound(sound)


def recording_file(path: Path, mutation: Mutation | None) -> Failures:
    """Read a recording of an energy meter."""
    from trainpilot.llm_runtime.energy.meter import RecordedMeter

    judge = Judge()
    judge.loaded(lambda: RecordedMeter(path))
    return judge.failures


# Folders that a command reads -----------------------------------------------------------------------------------------


def commanded(shared: Path, line: list[str], spoil: Callable[[Path], None], place: Path) -> Failures:
    """Carry a command out on a copy of the finished run in which a file was spoilt."""
    _copy(shared, ("run", "text.txt", "model.json", "policy.safetensors"), place)
    spoil(place)
    before, judge = content_of(place), Judge(MODEL_S)
    start, memory = time.process_time(), grown_bytes()
    said = trainpilot(line, place.parent)
    if reason := shown_or_refused(said, refuses=False):
        judge.failures["refused"] = reason
    if said.code:
        judge.note_cost(time.process_time() - start, grown_bytes() - memory)
    return _unchanged(judge, before, place, said)


def resumed(
    spoil: Callable[[Path], None],
    place: Path,
    *,
    shared: Path,
    out: str,
    line: Callable[[str], list[str]],
    what: str,
    ending: Callable[[Path], Any],
    plausible: bool = False,
) -> Failures:
    """Go on from a spoilt checkpoint: it must be refused, or the run must end as from the unspoilt one.

    Where the checkpoint is `plausible`, that of another run perhaps, it is enough that the run ends.
    """
    _copy(shared, (out, "text.txt", "model.json", "policy.safetensors", "recipe.yaml"), place)
    spoil(place)
    before, judge = content_of(place), Judge(MODEL_S)
    start, memory = time.process_time(), grown_bytes()
    said = trainpilot(line(out), place.parent)
    if said.code == 0 and plausible:
        return judge.failures
    if said.code == 0:
        expected = json.loads((shared / "ends.json").read_text(encoding="utf-8"))[what]
        return judge.sound(lambda: _ends_as(expected, json.loads(json.dumps(ending(place / out)))))
    judge.note_cost(time.process_time() - start, grown_bytes() - memory)
    if reason := refused(said):
        judge.failures["refused"] = reason
    return _unchanged(judge, before, place, said)


def _ends_as(expected: Any, found: Any) -> str | None:
    if expected == found:
        return None
    parts = [name for name in expected if expected[name] != found.get(name)]
    return f"accepted, and another result: {', '.join(parts)}"


def _copy(shared: Path, names: tuple[str, ...], place: Path) -> None:
    for name in names:
        if (shared / name).is_dir():
            shutil.copytree(shared / name, place / name)
        else:
            shutil.copy(shared / name, place / name)


def _unchanged(judge: Judge, before: dict[str, str], place: Path, said: Called) -> Failures:
    if said.code and (left := changes(before, content_of(place))):
        judge.failures["unchanged"] = left
    if printed := control_characters(said.out + said.err):
        judge.failures["terminal"] = printed
    return judge.failures
