"""Do the main job once: reference runs, PPO on live runs, then the policy steers a model that it has never seen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from trainpilot.envs.reward import MAX_QUALITY
from trainpilot.experiments.options import DemoOptions, ReplayOptions, TrainAgentOptions

TRAINED_ON = "llama-nano (0.2 M)"
REPLAYED_ON = "gpt2-micro"


def demo(options: DemoOptions, console: Console) -> None:
    """Run the demo, or go on with an interrupted one."""
    from trainpilot.experiments.replay import replay
    from trainpilot.experiments.train_agent import train_agent

    console.rule(f"1/3  train a policy with PPO on live runs of {TRAINED_ON}")
    agent = options.out / "agent"
    train_agent(TrainAgentOptions(recipe="demo", out=agent, set=(f"ppo.seed={options.seed}",)), console)

    console.rule(f"2/3  {REPLAYED_ON} under its base schedule: another architecture, five times the size")
    base = replay(_run("none", options.out / "base", options), console)

    console.rule(f"3/3  the same run, steered by the policy, which has never seen {REPLAYED_ON}")
    steered = replay(_run(str(agent / "policy.safetensors"), options.out / "steered", options), console)

    console.rule("what was measured")
    console.print(comparison(base, steered))
    console.print(verdict(base, steered))
    _say_where(options.out, console)


def _run(policy: str, out: Path, options: DemoOptions) -> ReplayOptions:
    return ReplayOptions(
        policy=policy,
        out=out,
        model=REPLAYED_ON,
        tokens=600_000,
        batch_size=8,
        sequence_length=128,
        base_learning_rate=3e-4,
        decisions=25,
        seed=options.seed,
        reference=policy != "none",
    )


def comparison(base: dict[str, Any], steered: dict[str, Any]) -> Table:
    """Return the table of both runs and their ratio."""
    table = Table(title=f"{steered['model']}, {steered['n_parameters']:,} parameters, one seed", title_style="bold")
    for name in ("", "base schedule", "steered", "ratio"):
        table.add_column(name, justify="left" if not name else "right")
    source = steered["energy_source"] or "no meter"
    rows = [
        ("validation, nats/token", "final_validation_loss", "{:.4f}"),
        ("test, nats/token", "final_test_loss", "{:.4f}"),
        ("tokens", "tokens", "{:,}"),
        ("time, s", "time_s", "{:.1f}"),
        (f"energy, J, {source}", "energy_j", "{:.1f}"),
    ]
    for label, key, form in rows:
        a, b = base[key], steered[key]
        known = a is not None and b is not None
        cells = [form.format(value) if value is not None else "-" for value in (a, b)]
        table.add_row(label, *cells, f"{b / a:.3f}" if known else "-")
    for name, show in _CONTROLS.items():
        table.add_row(f"{name} at the end", show(base["final_controls"]), show(steered["final_controls"]), "")
    table.add_row("changes of controls", str(base["n_changes"]), str(steered["n_changes"]), "")
    return table


_CONTROLS: dict[str, Callable[[dict[str, Any]], str]] = {
    "learning-rate scale": lambda controls: f"{controls['learning_rate_scale']:.3g}",
    "batch": lambda controls: str(controls["batch_size"]),
    "precision": lambda controls: str(controls["precision"]),
    "pruned": lambda controls: f"{controls['sparsity']:.0%}",
}


def verdict(base: dict[str, Any], steered: dict[str, Any]) -> str:
    """Say in one line what the table shows, also where it is bad news."""
    if steered["diverged"] or base["diverged"]:
        return "[red]a run diverged: nothing can be compared[/red]"
    gain = base["final_validation_loss"] - steered["final_validation_loss"]
    quality = steered["reference"]["quality"]
    share = f"about {quality:.2f} times" if quality < MAX_QUALITY else f"more than {MAX_QUALITY:g} times"
    word = "lower" if gain > 0 else "higher"
    return (
        f"The steered run's validation loss is {abs(gain):.4f} nats/token {word}: the base schedule would need "
        f"{share} its budget for it.\nOne seed, a base schedule whose learning rate nobody tuned, and a policy "
        "trained for minutes: this shows the machinery, not a result."
    )


def _say_where(out: Path, console: Console) -> None:
    console.print(
        f"\nlook at the runs:   tensorboard --logdir {out}\n"
        f"in the terminal:    trainpilot inspect {out / 'steered'}\n"
        f"the policy:         trainpilot inspect {out / 'agent' / 'policy.safetensors'}\n"
        f"steer your own:     trainpilot replay --policy {out / 'agent' / 'policy.safetensors'} "
        "--model llama-micro --text YOUR_FILES --out runs/mine",
        soft_wrap=True,
    )
