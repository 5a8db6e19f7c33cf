"""Compare one run under the shipped policy with an untuned run and with a sweep of learning rates, on a new model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from trainpilot.experiments.options import DemoOptions, ReplayOptions

MODEL = "gpt2-micro"
TOKENS = 600_000
UNTUNED_RATE = 3e-4
"""A common untuned learning rate; the run under the policy starts there too."""
SWEEP_RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
SWEEP_WARMUP_SHARE = 0.1
"""Warm-up of the sweep, whose base schedule is WSD as the policy's is, so that only the controls differ."""

Summary = dict[str, Any]


def demo(options: DemoOptions, console: Console) -> None:
    """Run the demo, or resume an interrupted one.

    Raises:
        ValueError: the policy cannot be used; nothing has been run then.
    """
    from trainpilot.agents.bundle import PolicyBundle, policy_path
    from trainpilot.experiments.replay import replay

    bundle = PolicyBundle.load(policy_path(options.policy))
    console.rule(f"1/3  {MODEL} under the default schedule, at a learning rate of {UNTUNED_RATE:g}")
    base = replay(run_options("none", options.out / "base", options), console)

    console.rule(f"2/3  steered by {options.policy}{_unseen(bundle.provenance)}")
    steered = replay(run_options(options.policy, options.out / "steered", options), console)

    console.rule(f"3/3  a tuned sweep: {len(SWEEP_RATES)} learning rates under WSD, a run each")
    sweep = [_swept(rate, options, console) for rate in SWEEP_RATES]

    console.rule("what was measured")
    console.print(comparison(base, steered, sweep))
    console.print(verdict(base, steered, sweep), highlight=False)
    _say_where(options, console)


def _unseen(provenance: Mapping[str, Any]) -> str:
    """Return a remark if the policy's provenance shows that it was not trained on the demo's model."""
    cases = provenance.get("training_cases")
    models = {case.get("model") for case in cases or ()}
    return "" if cases is None or MODEL in models else f", which has never seen {MODEL}"


def run_options(policy: str, out: Path, options: DemoOptions, **changes: Any) -> ReplayOptions:
    """Return one run of the demo."""
    settings: dict[str, Any] = {
        "model": MODEL,
        "tokens": TOKENS,
        "batch_size": 8,
        "sequence_length": 128,
        "base_learning_rate": UNTUNED_RATE,
        "seed": options.seed,
        "probe": policy != "none",  # only a policy reads it
    }
    return ReplayOptions(policy=policy, out=out, **(settings | changes))


def _swept(rate: float, options: DemoOptions, console: Console) -> Summary:
    from trainpilot.experiments.replay import replay

    wsd = {"base_learning_rate": rate, "schedule": "wsd", "warmup_tokens": int(SWEEP_WARMUP_SHARE * TOKENS)}
    summary = replay(run_options("none", options.out / f"sweep-{rate:g}", options, **wsd), Console(quiet=True))
    loss = summary["final_validation_loss"]
    reached = "diverged" if loss is None else f"{loss:.4f} nats/token"
    console.print(f"learning rate {rate:g}: {reached}, {summary['time_s']:.1f} s", highlight=False)
    return {**summary, "base_learning_rate": rate}


def best_of(sweep: Sequence[Summary]) -> Summary:
    """Return the sweep's run with the lowest validation loss; diverged runs come last."""
    return min(sweep, key=lambda run: _or(run["final_validation_loss"], float("inf")))


def cost_of(sweep: Sequence[Summary]) -> Summary:
    """Return tokens, seconds and joules of the whole sweep; joules are unknown if those of one run are."""
    known = all(run["energy_j"] is not None for run in sweep)
    return {
        "tokens": sum(run["tokens"] for run in sweep),
        "time_s": sum(run["time_s"] for run in sweep),
        "energy_j": sum(run["energy_j"] for run in sweep) if known else None,
    }


def comparison(base: Summary, steered: Summary, sweep: Sequence[Summary]) -> Table:
    """Return the table of the untuned run, the steered one, the sweep's best and the sweep's cost."""
    best = best_of(sweep)
    table = Table(title=f"{base['model']}, {base['n_parameters']:,} parameters, one seed", title_style="bold")
    columns = {
        "untuned": {**base, "rate": UNTUNED_RATE},
        "steered": {**steered, "rate": UNTUNED_RATE},
        "sweep's best": {**best, "rate": best["base_learning_rate"]},
        f"all {len(sweep)} runs": cost_of(sweep),
    }
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    rows = [
        ("learning rate", "rate", "{:g}"),
        ("validation, nats/token", "final_validation_loss", "{:.4f}"),
        ("test, nats/token", "final_test_loss", "{:.4f}"),
        ("tokens", "tokens", "{:,}"),
        ("time, s", "time_s", "{:.1f}"),
        (f"energy, J, {base['energy_source'] or 'no meter'}", "energy_j", "{:.1f}"),
    ]
    for label, key, form in rows:
        values = [figures.get(key) for figures in columns.values()]
        table.add_row(label, *("-" if value is None else form.format(value) for value in values))
    for name, show in _CONTROLS.items():
        table.add_row(f"{name} at end", "", show(steered["final_controls"]), "", "")
    table.add_row("changes", "", str(steered["n_changes"]), "", "")
    return table


_CONTROLS: dict[str, Callable[[dict[str, Any]], str]] = {
    "learning-rate scale": lambda controls: f"{controls['learning_rate_scale']:.3g}",
    "batch": lambda controls: str(controls["batch_size"]),
    "precision": lambda controls: str(controls["precision"]),
}


def verdict(base: Summary, steered: Summary, sweep: Sequence[Summary]) -> str:
    """Return a summary of the table in a few lines, whether favourable or not."""
    best = best_of(sweep)
    if any(run["final_validation_loss"] is None for run in (base, steered, best)):
        return "[red]a run diverged: nothing can be compared[/red]"
    key = "energy_j" if cost_of(sweep)["energy_j"] and steered["energy_j"] else "time_s"
    unit = "joules" if key == "energy_j" else "seconds"
    lines = [
        f"Steered, {_compared(steered, base)} than untuned and {_compared(steered, best)} than the sweep's best, "
        f"in one run.\nThe sweep took {cost_of(sweep)[key] / steered[key]:.1f} times the steered run's {unit}; "
        f"its best run alone, had one known it, {best[key] / steered[key]:.2f} times."
    ]
    if best["base_learning_rate"] in (SWEEP_RATES[0], SWEEP_RATES[-1]):
        lines.append("The best rate lies on the edge of the sweep: a wider one might find a better.")
    return "\n".join([*lines, "One seed of one model: `trainpilot compare` says what it is worth."])


def _compared(run: Summary, other: Summary) -> str:
    gain = other["final_validation_loss"] - run["final_validation_loss"]
    return f"{abs(gain):.4f} nats/token {'lower' if gain > 0 else 'higher'}"


def _or(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value


def _say_where(options: DemoOptions, console: Console) -> None:
    console.print(
        f"\nwhy it steered so:  trainpilot inspect {options.out / 'steered'}\n"
        f"look at the runs:   tensorboard --logdir {options.out}\n"
        f"the policy:         trainpilot inspect {options.policy}\n"
        f"steer your own:     trainpilot replay --policy {options.policy} --model llama-micro --text YOUR_FILES "
        "--out runs/mine",
        soft_wrap=True,
    )
