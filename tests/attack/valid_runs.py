"""Runs that attempts go on from or compare with: finished and interrupted ones of the commands, tiny and exact."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.attack.forked import Called, in_fork, trainpilot
from tests.attack.furniture import REPLAY, arguments
from trainpilot.agents.bundle import PolicyBundle
from trainpilot.agents.ppo import _CheckpointAndCost
from trainpilot.experiments import run_store
from trainpilot.experiments.run_store import RunFolder

STEERED = {**REPLAY, "policy": "./policy.safetensors", "pruning": "magnitude", "preference": "quality=1"}
"""A replay under a policy that moves every control which no clock has to judge; for quality alone it repeats."""
AGENT = {"recipe": "recipe.yaml", "out": "agent"}
MEASURED = ("time_s", "energy_j", "probe_time_s", "switch_time_s", "evaluation_time_s", "power_w", "memory_share")
"""Fields of telemetry that no two runs have alike."""


def replay_line(out: str) -> list[str]:
    """Return the command line of the steered replay."""
    return arguments("replay", {**STEERED, "out": out})


def agent_line(out: str) -> list[str]:
    """Return the command line of the training of a policy."""
    return arguments("train-agent", {**AGENT, "out": out})


def often() -> None:
    """Have a replay write its checkpoint after every interval."""
    run_store.CHECKPOINT_EVERY_S, run_store.CHECKPOINT_COST = 0.0, 1e9


def must(line: Sequence[str], said: Path) -> Called:
    """Carry out a command line that cannot fail."""
    done = trainpilot(line, said)
    if done.code:
        raise RuntimeError(f"{line[0]} failed: {done.lines[-1] if done.lines else done.code}")
    return done


def interrupted(line: Sequence[str], owner: Any, method: str, after: int, said: Path) -> None:
    """Carry out a command line in a process that dies once a method was called `after` times."""
    whole: Callable[..., Any] = getattr(owner, method)
    calls = 0

    def counted(*args: Any, **more: Any) -> Any:
        nonlocal calls
        result = whole(*args, **more)
        calls += 1
        if calls == after:
            os._exit(9)
        return result

    def run() -> None:
        often()
        setattr(owner, method, counted)
        trainpilot(line, said)

    ended = in_fork(run, limit_s=120)
    if ended.code != 9:
        raise RuntimeError(f"{line[0]} was not interrupted: {ended}")


def make_runs(shared: Path) -> None:
    """Write a finished and an interrupted replay, and an interrupted training of a policy, into a folder."""
    said = shared.parent
    must(replay_line("run"), said)
    interrupted(replay_line("half"), RunFolder, "write_checkpoint", 6, said)
    interrupted(agent_line("agent"), _CheckpointAndCost, "save", 2, said)


def endings(place: Path, line: Callable[[str], list[str]], ending: Callable[[Path], Any], out: str) -> Any:
    """Return how the interrupted run in `place / out` ends, in a process of its own."""

    def run() -> Any:
        must(line(out), place.parent)
        return ending(place / out)

    ended = in_fork(run, limit_s=120)
    if ended.death:
        raise RuntimeError(ended.death)
    return ended.value


def replay_ending(folder: Path) -> dict[str, Any]:
    """Return what two replays of the same settings have in common to the last bit."""
    from safetensors.torch import load_file

    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    names = ("initial_validation_loss", "final_validation_loss", "final_test_loss", "n_changes", "tokens", "rollbacks")
    weights = load_file(folder / "model" / "model.safetensors")
    lines = (folder / "telemetry.jsonl").read_text(encoding="utf-8").splitlines()
    return {
        "summary": {name: summary.get(name) for name in names},
        "weights": digest_of(weights),
        "telemetry": [unmeasured(json.loads(line)) for line in lines],
    }


def digest_of(weights: dict[str, torch.Tensor]) -> str:
    """Return a digest of weights by name."""
    from trainpilot.llm_runtime.files import digest

    return digest(b"".join(name.encode() + weights[name].numpy().tobytes() for name in sorted(weights)))


def unmeasured(record: dict[str, Any]) -> dict[str, Any]:
    """Return a decision's record without what was measured in seconds, joules and bytes."""
    told = {name: value for name, value in record["telemetry"].items() if name not in MEASURED}
    return {"telemetry": told, "requested": record["requested"], "allowed": record["allowed"]}


def agent_ending(folder: Path) -> dict[str, Any]:
    """Return the weights of a trained policy: those that were kept, and those at the end of the training."""
    bundle = PolicyBundle.load(folder / "policy.safetensors")
    last = folder / "simulator" / "0" / "checkpoint.pt"
    weights = torch.load(last, weights_only=True)["policy"] if last.is_file() else {}
    return {"policy": bundle.digest(), "last weights": digest_of(weights)}


replay_ends = partial(endings, line=replay_line, ending=replay_ending)
agent_ends = partial(endings, line=agent_line, ending=agent_ending)
