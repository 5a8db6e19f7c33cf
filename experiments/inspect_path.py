"""Show a bundle, a run or an agent's folder in the terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from trainpilot.agents.bundle import policy_path, shipped_policies
from trainpilot.experiments.inspect_policy import print_policy
from trainpilot.experiments.inspect_reasons import print_reasons
from trainpilot.experiments.run_plot import print_run


def inspect_path(path: Path, console: Console) -> None:
    """Print what `path` holds, or the policy of that name that comes with trainpilot.

    Raises:
        ValueError: it holds neither a bundle nor a run.
    """
    if path.is_file():
        print_policy(path, console)
    elif (path / "telemetry.jsonl").is_file():
        print_run(path, console)
        print_reasons(path, console)
    elif (path / "policy.safetensors").is_file():
        print_policy(path / "policy.safetensors", console)
        console.print(f"watch its training: tensorboard --logdir {path / 'tb'}", soft_wrap=True)
    elif not path.exists() and str(path) in shipped_policies():
        print_policy(policy_path(str(path)), console)
    else:
        shipped = ", ".join(shipped_policies()) or "none"
        raise ValueError(
            f"path must be a bundle, a run's folder or an agent's folder, got {path}; "
            f"policies that come with trainpilot: {shipped}"
        )
