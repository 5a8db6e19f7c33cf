"""Show a bundle, a run or an agent's folder in the terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from trainpilot.agents.bundle import PolicyBundle
from trainpilot.experiments.run_plot import print_bundle, print_run


def inspect_path(path: Path, console: Console) -> None:
    """Print what `path` holds.

    Raises:
        ValueError: it holds neither a bundle nor a run.
    """
    if path.is_file():
        print_bundle(dict(PolicyBundle.load(path).provenance), console)
    elif (path / "telemetry.jsonl").is_file():
        print_run(path, console)
    elif (path / "policy.safetensors").is_file():
        inspect_path(path / "policy.safetensors", console)
        console.print(f"watch its training: tensorboard --logdir {path / 'tb'}")
    else:
        raise ValueError(f"path must be a bundle, a run's folder or an agent's folder, got {path}")
