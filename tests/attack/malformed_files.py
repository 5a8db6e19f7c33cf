"""Malformed files: each must be refused in one line, quickly and without a trace, or do no harm."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from tests.attack import furniture, malformed_settings, valid_runs
from tests.attack.attempts import Attempt, Failures, Outcome, Promise
from tests.attack.file_checks import (
    bundle_file,
    calibration_file,
    case_file,
    commanded,
    cost_file,
    loaded_run_file,
    model_file,
    recipe_file,
    recording_file,
    resumed,
    safetensors,
    split_safetensors,
    sweep_file,
)
from tests.attack.mutations import PLAUSIBLE, Mutation, as_json, as_yaml, mutations, spoilt_bytes
from tests.attack.steering_states import saved_state, state_attempt
from trainpilot.llm_runtime.energy.meter import EnergyReading, write_recording

TITLE = "malformed files, states and settings"
PROMISES = {
    "refused": Promise(
        "A file that is damaged or made by a stranger is refused in one line, or does no harm.",
        "bundles, checkpoints, telemetry, summaries, recipes, cases, calibrations, model configs, sweeps, cost tables "
        "and meter recordings in which one value is deleted, null, of another type, NaN, infinite, negative, huge, "
        "nested or of another shape, or bytes are cut off or flipped",
    ),
    "state": Promise(
        "`Steering.load_state_dict` refuses a wrong state, and has then changed nothing.",
        "one value of a saved state is spoilt; controller, optimizer and weights are compared before and after",
    ),
    "settings": Promise(
        "A setting that makes no sense is refused by its name when the settings are made.",
        "wrong types, ranges and contradictions in `SteeringSettings`, `QualityContract`, `GuardrailSettings` and "
        "`Steering`",
    ),
    "limits": Promise(
        "A malformed file costs at most a second (five where a model is built first) and 200 MB.",
        "processor time and memory of each of these loads are measured",
    ),
    "unchanged": Promise("A refused file or folder stays as it was.", "the folder is compared before and after"),
    "terminal": Promise(
        "Nothing that a file says drives the terminal.",
        "control characters, escape sequences and marks of direction in names and texts of files that are shown",
    ),
}
GOLDEN = Path(__file__).parents[1] / "golden" / "version_0_1"


def prepare(shared: Path) -> None:
    """Write valid files, and runs that are finished or interrupted."""
    furniture.valid_files(shared)
    valid_runs.make_runs(shared)
    for name in ("calibration", "comparison"):
        shutil.copytree(GOLDEN / name, shared / name)
    write_recording(
        shared / "meter.csv",
        [EnergyReading(time_s=float(i), energy_j=5.0 * i, source="measured_counter") for i in range(6)],
    )
    torch.save(saved_state(), shared / "state.pt")
    ends = {}
    for name, out, end in (("replay", "half", valid_runs.replay_ends), ("agent", "agent", valid_runs.agent_ends)):
        shutil.copytree(shared / out, shared / f"{out}-ended")
        ends[name] = end(shared, out=f"{out}-ended")
    (shared / "ends.json").write_text(json.dumps(ends), encoding="utf-8")


def attempts(seed: int, shared: Path) -> list[Attempt]:
    """Return one attempt for each mutation."""
    lists = (_bundles, _trees, _checkpoints, _run_folders, _byte_damage)
    found = list(itertools.chain.from_iterable(make(seed, shared) for make in lists))
    found += [
        state_attempt(shared, mutation)
        for mutation in mutations(_load(shared / "state.pt")["steering"], 60, seed, written=False)
    ]
    return found + malformed_settings.attempts()


def example(place: Path) -> Outcome:
    """Load a file that is called a bundle and holds nothing."""
    return bundle_file(bytes, place)


def _load(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _attempt(name: str, run: Callable[[Path], Failures], *extra: str) -> Attempt:
    return Attempt(name=name, promises=("refused", "limits", *extra), run=run, memory_bytes=2 * 2**30)


# What is spoilt -------------------------------------------------------------------------------------------------------


def _bundles(seed: int, shared: Path) -> Iterator[Attempt]:
    """Bundles: what the header says, the tensors, and the bytes."""
    file = shared / "policy.safetensors"
    content, tensors = split_safetensors(file)
    rich = {**content, "provenance": {**content["provenance"], **RICH_PROVENANCE}}
    for mutation in mutations(rich, 45, seed):
        yield _bundle(f"bundle, {mutation}", partial(_mutated_header, rich, tensors, mutation))
    for mutation in mutations(tensors, 20, seed, written=False):
        if not mutation.path:
            continue  # there is no such file: one holds tensors by name
        yield _bundle(f"bundle, tensor {mutation}", partial(_mutated_tensors, rich, tensors, mutation))
    for name, made in odd_bundles(rich, tensors).items():
        yield _bundle(f"bundle, {name}", partial(bytes, made))
    for name, made in spoilt_bytes(safetensors(rich, tensors), 8, seed):
        yield _bundle(f"bundle, {name}", partial(bytes, made))


def _bundle(name: str, make: Callable[[], bytes]) -> Attempt:
    return _attempt(name, partial(bundle_file, make), "terminal")


def _mutated_header(content: Any, tensors: Any, mutation: Mutation) -> bytes:
    return safetensors(mutation.of(content), tensors)


def _mutated_tensors(content: Any, tensors: Any, mutation: Mutation) -> bytes:
    return safetensors(content, mutation.of(tensors) or {})


RICH_PROVENANCE: dict[str, Any] = {
    "recipe": "mine", "created": "2026-01-01T00:00:00+00:00", "start_scale": 0.5, "utility": "linear",
    "base_schedule": {"schedule": "wsd", "warmup_share": 0.1}, "preference_range": {"quality": [0.5, 1.0]},
    "training_cost": {"decisions": 100.0, "episodes": 10.0, "energy_j": 5.0, "time_s": 2.0},
    "scores": {"simulator": {"multiplier": 1.2, "n_runs": 8}}, "versions": {"trainpilot": "0.2.0"},
    "domain": {"sequences": [100, 10_000], "batch_size": [4, 32], "n_parameters": [1e5, 1e8], "fine_tuning": False},
}  # fmt: skip


def odd_bundles(content: Any, tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    """Return bundles that no mutation of a value reaches."""
    whole = safetensors(content, tensors)
    huge = {name: value * 3e38 / value.abs().max() for name, value in tensors.items()}
    metadata = {"__metadata__": {"trainpilot": json.dumps(content)}}
    header = json.dumps(metadata).encode()
    entry = {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}
    f8 = json.dumps({**metadata, "action.bias": entry}).encode()
    entry = {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}
    beyond = json.dumps({**metadata, "action.bias": entry}).encode()
    return {
        "a header of 2^63 bytes": (2**63).to_bytes(8, "little") + b"{}",
        "a header that says it is longer": (len(header) + 99).to_bytes(8, "little") + header,
        "no tensor": len(header).to_bytes(8, "little") + header,
        "a tensor of FP8": len(f8).to_bytes(8, "little") + f8 + bytes(4),
        "a tensor beyond the file": len(beyond).to_bytes(8, "little") + beyond,
        "weights of 3e38": safetensors(content, huge),
        "17 MiB": whole + bytes(17 * 2**20),
        "a header of nulls": safetensors(None, tensors),
        "a header of 3,000 lists": safetensors("@deep@", tensors),
    }


Check = Callable[[Path, Mutation | None], Failures]


def _trees(seed: int, shared: Path) -> Iterator[Attempt]:
    """Files of JSON, YAML and CSV that a function reads whole."""
    recipe = yaml.safe_load((shared / "live.yaml").read_text(encoding="utf-8"))
    runs = sorted((shared / "calibration" / "runs").iterdir())
    compared = sorted((shared / "comparison" / "runs").iterdir())
    costs = next((shared / "comparison" / "costs").iterdir())
    trees: Sequence[tuple[str, str, Any, Callable[[Any], str], Check, int]] = (
        ("recipe", "mutated.yaml", recipe, as_yaml, recipe_file, 30),
        ("cases", "mutated.yaml", furniture.CASES, as_yaml, case_file, 25),
        ("calibration", "calibration.json", _json(shared / "calibration" / "calibration.json"), as_json,
         calibration_file, 30),
        ("model config", "mutated.json", _json(shared / "model.json"), as_json, model_file, 30),
        ("calibration run", "run.json", _json(runs[0]), as_json, partial(loaded_run_file, "calibrate"), 15),
        ("comparison run", "run.json", _json(compared[0]), as_json, partial(loaded_run_file, "compare"), 15),
        ("cost table", "costs.json", _json(costs), as_json, cost_file, 15),
    )  # fmt: skip
    spoilt = partial(partial, _mutated_file)
    for what, name, tree, write, check, count in trees:
        for mutation in mutations(tree, count, seed):
            yield _attempt(
                f"{what}, {mutation}", spoilt(name=name, tree=tree, write=write, check=check, mutation=mutation)
            )
    for what, name, check in (("sweep", "sweep.csv", sweep_file), ("meter recording", "meter.csv", recording_file)):
        lines = [line.split(",") for line in (shared / name).read_text(encoding="utf-8").splitlines()]
        for mutation in mutations(lines, 12, seed):
            yield _attempt(
                f"{what}, {mutation}", spoilt(name=name, tree=lines, write=_as_csv, check=check, mutation=mutation)
            )


def _as_csv(lines: Any) -> str:
    if not isinstance(lines, list):
        return str(lines)
    return "\n".join(",".join(map(str, line)) if isinstance(line, list) else str(line) for line in lines) + "\n"


def _mutated_file(
    place: Path, *, name: str, tree: Any, write: Callable[[Any], str], check: Check, mutation: Mutation
) -> Failures:
    furniture.valid_files(place)
    (place / name).write_text(write(mutation.of(tree)), encoding="utf-8", errors="surrogatepass")
    return check(place / name, mutation)


def _checkpoints(seed: int, shared: Path) -> Iterator[Attempt]:
    """Checkpoints of a replay and of a training, from which the command goes on."""
    for what, out, line, count in (
        ("replay", "half", valid_runs.replay_line, 35), ("agent", "agent/simulator/0", valid_runs.agent_line, 20),
    ):  # fmt: skip
        tree = _load(shared / out / "checkpoint.pt")
        ending = valid_runs.replay_ending if what == "replay" else valid_runs.agent_ending
        folder = out.partition("/")[0]
        check = partial(resumed, shared=shared, out=folder, line=line, what=what, ending=ending)
        for mutation in mutations(tree, count, seed, written=False):
            write = partial(_mutated_checkpoint, f"{out}/checkpoint.pt", mutation)
            use = partial(check, write, plausible=mutation.change in PLAUSIBLE)
            yield _attempt(f"checkpoint of {what}, {mutation}", use, "unchanged", "terminal")
        for name, made in spoilt_bytes((shared / out / "checkpoint.pt").read_bytes(), 3, seed):
            write = partial(_written, f"{out}/checkpoint.pt", made)
            yield _attempt(f"checkpoint of {what}, {name}", partial(check, write), "unchanged", "terminal")


def _mutated_checkpoint(name: str, mutation: Mutation, place: Path) -> None:
    torch.save(mutation.of(_load(place / name)), place / name)


def _written(name: str, content: bytes, place: Path) -> None:
    (place / name).write_bytes(content)


def _run_folders(seed: int, shared: Path) -> Iterator[Attempt]:
    """Files of a finished run, which is inspected, and asked for again."""
    run = shared / "run"
    lines = [json.loads(line) for line in (run / "telemetry.jsonl").read_text(encoding="utf-8").splitlines()]
    inspect, replay = ["inspect", "run"], valid_runs.replay_line("run")
    again = partial(commanded, shared, replay)
    trees: Sequence[tuple[str, str, Any, Callable[[Any], str], Callable[..., Failures], int]] = (
        ("telemetry", "telemetry.jsonl", lines[:4], _as_lines, partial(commanded, shared, inspect), 30),
        ("summary", "summary.json", _json(run / "summary.json"), as_json, partial(commanded, shared, inspect), 15),
        ("summary of a finished run", "summary.json", _json(run / "summary.json"), as_json, again, 15),
        ("settings of a finished run", "config.json", _json(run / "config.json"), as_json, again, 10),
    )  # fmt: skip
    for what, name, tree, write, check, count in trees:
        for mutation in mutations(tree, count, seed):
            change = partial(_mutated_in, f"run/{name}", tree, write, mutation)
            yield _attempt(f"{what}, {mutation}", partial(check, change), "unchanged", "terminal")


def _as_lines(records: Any) -> str:
    return "".join(as_json(each) + "\n" for each in records) if isinstance(records, list) else as_json(records)


def _mutated_in(name: str, tree: Any, write: Callable[[Any], str], mutation: Mutation, place: Path) -> None:
    (place / name).write_text(write(mutation.of(tree)), encoding="utf-8", errors="surrogatepass")


def _byte_damage(seed: int, shared: Path) -> Iterator[Attempt]:
    """Files of text whose bytes are damaged."""
    files: Sequence[tuple[str, Check]] = (
        ("recipe.yaml", recipe_file), ("cases.yaml", case_file), ("model.json", model_file), ("sweep.csv", sweep_file),
        ("calibration/calibration.json", calibration_file), ("meter.csv", recording_file),
    )  # fmt: skip
    for file, check in files:
        for name, made in spoilt_bytes((shared / file).read_bytes(), 2, seed):
            target = "mutated" + Path(file).suffix
            yield _attempt(f"{file}, {name}", partial(_damaged, target, made, check))


def _damaged(name: str, content: bytes, check: Check, place: Path) -> Failures:
    furniture.valid_files(place)
    (place / name).write_bytes(content)
    return check(place / name, None)
