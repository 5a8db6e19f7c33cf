"""Steer one small model with the shipped policy, and compare it with an untuned run and a learning-rate sweep."""

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
"""A usual default learning rate; the steered run starts with it, too."""
SWEEP_RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
SWEEP_WARMUP_SHARE = 0.1
"""Warm-up of the sweep's WSD schedule, as in the policy's own base schedule, so that only the steering differs."""

Summary = dict[str, Any]


def demo(options: DemoOptions, console: Console) -> None:
    """Run the demo, or resume an interrupted one.

    Raises:
        ValueError: the policy cannot be used. This is checked before the first run.
    """
    from trainpilot.agents.bundle import PolicyBundle, policy_path
    from trainpilot.experiments.replay import replay

    bundle = PolicyBundle.load(policy_path(options.policy))
    run_options("none", options.out / "base", options).run_config(bundle.decisions)  # a bad setting is refused here
    console.rule(f"1/3  {MODEL} under the default schedule, at a learning rate of {UNTUNED_RATE:g}")
    base = replay(run_options("none", options.out / "base", options), console)

    console.rule(f"2/3  steered by {options.policy}{_unseen(bundle.provenance)}")
    steered = replay(run_options(options.policy, options.out / "steered", options), console)

    console.rule(f"3/3  a tuned sweep: {len(SWEEP_RATES)} learning rates under WSD, a run each")
    sweep = [_swept(rate, options, console) for rate in SWEEP_RATES]

    console.rule("results")
    console.print(comparison(base, steered, sweep))
    console.print(verdict(base, steered, sweep), highlight=False)
    _print_next_steps(options, console)


def _unseen(provenance: Mapping[str, Any]) -> str:
    """Return a clause saying that the policy was not trained on the demo's model, if its provenance shows that."""
    cases = provenance.get("training_cases")
    models = {case.get("model") for case in cases or ()}
    return "" if cases is None or MODEL in models else f", which was not trained on {MODEL}"


def run_options(policy: str, out: Path, options: DemoOptions, **changes: Any) -> ReplayOptions:
    """Return the options of one run of the demo."""
    settings: dict[str, Any] = {
        "model": MODEL,
        **({"tokens": TOKENS} if options.budget is None else {"budget": options.budget}),
        "batch_size": 8,
        "sequence_length": 128,
        "base_learning_rate": UNTUNED_RATE,
        "seed": options.seed,
        "probe": policy != "none",  # only a policy needs it
    }
    return ReplayOptions(policy=policy, out=out, **(settings | changes))


def _swept(rate: float, options: DemoOptions, console: Console) -> Summary:
    from trainpilot.experiments.replay import replay

    wsd: dict[str, Any] = {"base_learning_rate": rate, "schedule": "wsd"}
    if options.budget is None:
        wsd["warmup_tokens"] = int(SWEEP_WARMUP_SHARE * TOKENS)
    else:
        wsd["warmup_share"] = SWEEP_WARMUP_SHARE
    summary = replay(run_options("none", options.out / f"sweep-{rate:g}", options, **wsd), Console(quiet=True))
    loss = summary["final_validation_loss"]
    reached = "diverged" if loss is None else f"{loss:.4f} nats/token"
    console.print(f"learning rate {rate:g}: {reached}, {summary['time_s']:.1f} s", highlight=False)
    return {**summary, "base_learning_rate": rate}


def best_of(sweep: Sequence[Summary]) -> Summary:
    """Return the run of the sweep with the lowest validation loss; a diverged run only if all diverged."""
    return min(sweep, key=lambda run: _or(run["final_validation_loss"], float("inf")))


def cost_of(sweep: Sequence[Summary]) -> Summary:
    """Return tokens, time and energy of the whole sweep; the energy is `None` if that of one run is unknown."""
    known = all(run["energy_j"] is not None for run in sweep)
    return {
        "tokens": sum(run["tokens"] for run in sweep),
        "time_s": sum(run["time_s"] for run in sweep),
        "energy_j": sum(run["energy_j"] for run in sweep) if known else None,
    }


def comparison(base: Summary, steered: Summary, sweep: Sequence[Summary]) -> Table:
    """Return a table of the untuned run, the steered run, the sweep's best run and the cost of the whole sweep."""
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
    """Sum up the table in a few lines, whether the steered run was better or worse."""
    best = best_of(sweep)
    if any(run["final_validation_loss"] is None for run in (base, steered, best)):
        return "[red]a run diverged, so the runs cannot be compared[/red]"
    key = "energy_j" if cost_of(sweep)["energy_j"] and steered["energy_j"] else "time_s"
    unit = "joules" if key == "energy_j" else "seconds"
    lines = [
        f"The steered run's loss is {_compared(steered, base)} than untuned and {_compared(steered, best)} than the "
        f"sweep's best.\nThe sweep took {cost_of(sweep)[key] / steered[key]:.1f} times the steered run's {unit}; "
        f"its best run alone took {best[key] / steered[key]:.2f} times."
    ]
    if best["base_learning_rate"] in (SWEEP_RATES[0], SWEEP_RATES[-1]):
        lines.append("The best rate lies on the edge of the sweep: a wider sweep might find a better one.")
    return "\n".join([*lines, "This is one seed of one model: `trainpilot compare` measures several with intervals."])


def _compared(run: Summary, other: Summary) -> str:
    gain = other["final_validation_loss"] - run["final_validation_loss"]
    return f"{abs(gain):.4f} nats/token {'lower' if gain > 0 else 'higher'}"


def _or(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value


def _print_next_steps(options: DemoOptions, console: Console) -> None:
    console.print(
        f"\nexplain decisions:  trainpilot inspect {options.out / 'steered'}\n"
        f"show the curves:    tensorboard --logdir {options.out}\n"
        f"show the policy:    trainpilot inspect {options.policy}\n"
        f"steer your own:     trainpilot replay --policy {options.policy} --model llama-micro --text YOUR_FILES "
        "--out runs/mine",
        soft_wrap=True,
    )
