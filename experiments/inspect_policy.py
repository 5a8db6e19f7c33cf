"""Print a policy bundle in the terminal, and the reasons for a policy's decisions in a run.

`print_policy` prints the network, provenance, training cost and scores of a bundle, and each observation field's share
of its first layer. `print_reasons` prints which fields had the largest effect on the decisions of a run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from trainpilot.agents.bundle import PolicyBundle, policy_digest, policy_path
from trainpilot.agents.controller import DecisionRecord
from trainpilot.agents.explain import Explanation, Push, explain, input_shares
from trainpilot.agents.logging.run_log import flatten, text
from trainpilot.envs.action import ACTION_FIELDS, LEARNING_RATE_FACTORS
from trainpilot.experiments.stored_run import StoredRun
from trainpilot.llm_runtime.plain_values import one_line, printable

MAX_LISTED = 6
"""Up to this many different values are listed."""
MOST_ROWS, MOST_CHARACTERS = 200, 2000
"""Most rows of a table of what a file says, and most characters in one of its cells."""
BARS, MORE_BARS = 6, 15
"""Number of fields that get a bar, in short and in full; the others are summed up in one row."""
TRAINED = (
    "recipe", "created", "versions.trainpilot", "preference_range.quality", "utility", "start_scale",
    "training_cases", "simulator.widening.weights",
)  # fmt: skip
"""Parts of the provenance that the short form shows, as far as they are stated."""
BAR_WIDTH = 40
SHOWN_APART = ("base_schedule", "decisions", "training_cost", "scores")
"""Parts of the provenance that are printed in tables of their own."""


def print_policy(path: Path, console: Console, *, everything: bool = False) -> None:
    """Print a bundle: its network, training, cost, scores, and the weight of each field in the first layer.

    Args:
        path: The bundle's file.
        console: Where to print.
        everything: Print the whole provenance and more fields; by default what fits one screen.

    Raises:
        ValueError: the file is not a bundle, or has an unsupported version.
    """
    bundle = PolicyBundle.load(path)
    console.print(Text(f"\n{printable(path)}", style="bold"), soft_wrap=True)
    console.print(_facts(path, bundle))
    for name, title in (("training_cost", "Training cost"), ("scores", "Scores")):
        if figures := bundle.provenance.get(name):
            print_table(title, _figures(figures), console)
    rest = flatten({key: value for key, value in bundle.provenance.items() if key not in SHOWN_APART})
    shown = rest if everything else {key: rest[key] for key in TRAINED if rest.get(key) not in (None, "", [])}
    if shown:
        print_bundle(shown, console)
    block = "█" if console.encoding.lower().startswith("utf") else "#"
    bars = _bars(input_shares(bundle), block, MORE_BARS if everything else BARS)
    print_table("First layer: each field's share of the sum of the weights' norms", bars, console)
    if len(shown) < len(rest):
        console.print(Text(f"\n{len(rest) - len(shown)} more settings of its training: add --all", style="dim"))


def print_table(title: str, table: Table, console: Console) -> None:
    """Print a table under a title that may be wider than the table."""
    console.print(Text(f"\n{title}", style="bold"))
    console.print(table)


def plain_table(*columns: str, left: int = 1) -> Table:
    """Return an empty table without borders; the first `left` columns are aligned to the left."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=any(columns))
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index < left else "right", header_style="dim")
    return table


def _facts(path: Path, bundle: PolicyBundle) -> Table:
    layers = [f"hidden.{index}" for index in range(sum(name.startswith("hidden.") for name in bundle.weights) // 2)]
    sizes = [bundle.weights[f"{layer}.weight"].shape[1] for layer in (*layers, "action")]
    n_weights = sum(value.size for value in bundle.weights.values())
    table = plain_table("", "", left=2)
    table.add_row("network", f"{' - '.join(map(str, (*sizes, len(bundle.weights['action.bias']))))}, tanh")
    table.add_row("weights", f"{n_weights:,} ({path.stat().st_size / 1024:,.0f} KiB)")
    table.add_row("digest", policy_digest(path))
    table.add_row("decisions per run", str(bundle.decisions))
    table.add_row("base schedule", _schedule(bundle))
    return table


def _schedule(bundle: PolicyBundle) -> str:
    base = bundle.base_schedule
    if base is None:
        return "none of its own: linear with 2 % warm-up by default"
    return f"{base.schedule}, warm-up over {100 * base.warmup_share:g} % of the budget"


def _figures(figures: Any) -> Table:
    table = plain_table("", "")
    flat = flatten(figures if isinstance(figures, Mapping) else {"": figures})
    _add_rows(table, {key: value for key, value in flat.items() if not _repeats(flat, key)}, _figure)
    return table


def _repeats(flat: Mapping[str, Any], key: str) -> bool:
    """Return whether a figure is that of a part which is the whole."""
    stem, _, name = key.rpartition(".")
    return bool(stem and flat[key] is not None and flat.get(name) == flat[key])


def _add_rows(table: Table, content: Mapping[str, Any], form: Callable[[Any], str]) -> None:
    """Add a row for each value of nested content, up to `MOST_ROWS`."""
    flat = flatten(content)
    for key in list(flat)[:MOST_ROWS]:
        table.add_row(escape(_cut(printable(key))), escape(_cut(form(flat[key]))))
    if len(flat) > MOST_ROWS:
        table.add_row("...", f"and {len(flat) - MOST_ROWS:,} more", style="dim")


def _cut(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else f"{text[: MOST_CHARACTERS - 3]}..."


def _figure(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return text(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _bars(shares: Mapping[str, float], block: str, n: int) -> Table:
    table = plain_table("", "", "", left=2)
    top = list(shares.items())[:n]
    for name, share in top:
        table.add_row(name, block * round(BAR_WIDTH * share / max(top[0][1], 1e-30)), f"{share:.1%}")
    table.add_row(f"the other {len(shares) - len(top)}", "", f"{1 - sum(share for _, share in top):.1%}", style="dim")
    return table


def _entry(value: Any) -> str:
    """Format a value; a list of tables is summed up by its length and the fields in which the tables differ."""
    if not (isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value)):
        return text(value)
    columns = {key: list(dict.fromkeys(text(item.get(key)) for item in value)) for key in value[0]}
    differing = [
        f"{printable(key)} {', '.join(values)}" for key, values in columns.items() if 1 < len(values) <= MAX_LISTED
    ]
    return "; ".join([str(len(value)), *differing])


def titled_table(title: str, *columns: str) -> Table:
    """Return an empty table with a bold title; the first column is aligned to the left, the others to the right."""
    table = Table(
        title=f"\n{title}", title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0)
    )
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left", header_style="dim")
    return table


def print_bundle(info: Mapping[str, Any], console: Console) -> None:
    """Print the provenance of a bundle as a table."""
    table = titled_table("Policy", "", "")
    table.columns[1].justify = "left"
    _add_rows(table, info, _entry)
    console.print(table)


LARGEST_MOVES = 3
"""Number of learning-rate moves that are explained. Changes of other controls are all explained, up to `MOST_CHANGES`
rows in all."""
MOST_CHANGES = 12
PUSHES = 3
"""Number of fields named for each decision."""
FIELDS_SHOWN = 12
"""Number of rows in the table of mean effects."""
MIN_EFFECT, MIN_MEAN_EFFECT = 0.05, 0.005
"""Smaller effects, and smaller mean effects, are not shown."""
RATE = next(index for index, field in enumerate(ACTION_FIELDS) if field.name == "learning_rate")
LEGEND = (
    f"The {LARGEST_MOVES} largest moves of the learning rate, and the changes of the other controls. In brackets: a "
    "field's value (unit: docs/environment.md), and whether it is low or high for this run; then its effect for (+) or "
    "against (-) the choice, in log-odds against the best alternative."
)


@dataclass(frozen=True, kw_only=True)
class Change:
    """A change of one control, or a move of the learning rate: consecutive changes in the same direction."""

    decision: int
    """Index of the decision to explain; for a move, the (first) one with the largest factor."""
    control: int
    """Index of the control."""
    octaves: float = 0.0
    """Binary logarithm of the factor of the whole move on the learning rate."""
    n_decisions: int = 1
    """Number of decisions in the move."""

    @property
    def factor(self) -> float:
        """Factor of the whole move on the learning rate, within what a float holds."""
        return float(2.0 ** max(min(self.octaves, 1000.0), -1000.0))


@dataclass(frozen=True, kw_only=True)
class RunReasons:
    """Why a policy decided as it did in a run."""

    explanation: Explanation
    warning: str
    """What speaks against the explanation; empty if nothing does."""


def reasons_of(run: StoredRun) -> RunReasons | None:
    """Return the effects of the observation fields on the decisions of a run; `None` if no policy took them.

    Raises:
        ValueError: the policy is gone, or has other fields than the run.
        OSError: its file cannot be read.
    """
    if run.config.get("policy", "none") == "none":
        return None
    bundle, warning = _policy(run.config)
    explanation, n = explain(bundle, run.records), len(run.records)
    if explanation.n_repeated < n:
        warning = f"This policy would repeat only {explanation.n_repeated} of the {n} decisions. {warning}"
    return RunReasons(explanation=explanation, warning=warning.strip())


def print_reasons(run: StoredRun, console: Console) -> None:
    """Print which observation fields caused the decisions of a run, if a policy took them."""
    try:
        reasons = reasons_of(run)
    except (ValueError, OSError) as error:
        console.print(f"\n[dim]The decisions cannot be explained: {escape(one_line(error))}[/dim]", highlight=False)
        return
    if reasons is None:
        return
    if reasons.warning:
        console.print(f"\n[yellow]{escape(one_line(reasons.warning))}[/yellow]", highlight=False)
    explanation = reasons.explanation
    print_table("Why: fields with the largest effect on the decisions", _reasons(explanation, run.records), console)
    console.print(Text(LEGEND, style="dim"))
    print_table("Mean effect of the fields over the run, in log-odds", _importance(explanation), console)


def _policy(config: Mapping[str, Any]) -> tuple[PolicyBundle, str]:
    """Return the policy that steered the run, and a warning if its file has changed since."""
    path = policy_path(str(config["policy"]))
    bundle = PolicyBundle.load(path)
    changed = policy_digest(path) != config.get("policy_digest", policy_digest(path))
    return bundle, f"{config['policy']} has changed since it steered this run." if changed else ""


def _reasons(explanation: Explanation, records: Sequence[DecisionRecord]) -> Table:
    changes = changes_to_explain(records)
    table = plain_table("at", "control", "choice", "because", left=4)
    for change in changes[:MOST_CHANGES]:
        control = ACTION_FIELDS[change.control].name
        table.add_row(
            f"{change.decision} ({budget_before(records, change.decision):.0%})",
            control.replace("_", " "),
            _choice(change, records[change.decision], int(explanation.rivals[change.decision, change.control])),
            _because(explanation.pushes(change.decision, control, PUSHES)),
        )
    if len(changes) > MOST_CHANGES:
        table.add_row("", "", "", f"... and {len(changes) - MOST_CHANGES} more changes", style="dim")
    if not changes:
        table.add_row("-", "", "", "the policy changed nothing")
    return table


def _choice(change: Change, record: DecisionRecord, rival: int) -> str:
    choices = ACTION_FIELDS[change.control].choices
    text = choices[record.requested[change.control]] + (f", not {choices[rival]}" if rival >= 0 else "")
    return f"{text}\n(x{change.factor:.2g} in {change.n_decisions})" if change.n_decisions > 1 else text


def _because(pushes: Sequence[Push]) -> Text:
    shown = [push for push in pushes if abs(push.effect) >= MIN_EFFECT]
    return Text(", ".join(map(_push_text, shown)) or "no field that changed during the run")


def _push_text(push: Push) -> str:
    side = "low" if push.value < push.mean else "high"
    return f"{push.field} ({push.value:.3g}, {side}) {push.effect:+.1f}"


def changes_to_explain(records: Sequence[DecisionRecord]) -> list[Change]:
    """Return the largest moves of the learning rate (the earlier of equal ones) and all other changes, by decision."""
    moves = sorted(_moves(records), key=lambda move: -round(abs(move.octaves), 1))[:LARGEST_MOVES]
    others = [
        Change(decision=decision, control=control)
        for decision, record in enumerate(records)
        for control in range(len(ACTION_FIELDS))
        if control != RATE and _took_effect(record, control)
    ]
    return sorted([*moves, *others], key=lambda change: (change.decision, change.control))


def _moves(records: Sequence[DecisionRecord]) -> Iterator[Change]:
    """Yield the moves of the learning rate: consecutive decisions that all raised or all lowered it."""
    octaves = [math.log2(LEARNING_RATE_FACTORS[r.allowed[RATE]]) if _took_effect(r, RATE) else 0.0 for r in records]
    for sign, group in groupby(range(len(octaves)), key=lambda index: (octaves[index] > 0) - (octaves[index] < 0)):
        stretch = list(group)
        if sign:
            yield Change(
                decision=max(stretch, key=lambda decision: abs(octaves[decision])),
                control=RATE,
                octaves=sum(octaves[decision] for decision in stretch),
                n_decisions=len(stretch),
            )


def _took_effect(record: DecisionRecord, control: int) -> bool:
    return record.allowed[control] == record.requested[control] != ACTION_FIELDS[control].keep


def budget_before(records: Sequence[DecisionRecord], decision: int) -> float:
    """Return the share of the budget that was used when a decision was made."""
    return records[decision - 1].telemetry.budget_used if decision else 0.0


def mean_effects(explanation: Explanation) -> tuple[list[str], list[tuple[str, list[float]]]]:
    """Return the controls with a mean effect to speak of, and the fields with theirs on each, the strongest first."""
    table = explanation.importance()
    names = [name for name in table if max(table[name].values()) >= MIN_MEAN_EFFECT]
    fields = sorted(next(iter(table.values()), {}), key=lambda f: -sum(table[name][f] for name in names))
    strong = (f for f in fields[:FIELDS_SHOWN] if any(table[name][f] >= MIN_MEAN_EFFECT for name in names))
    return names, [(field, [table[name][field] for name in names]) for field in strong]


def _importance(explanation: Explanation) -> Table:
    names, fields = mean_effects(explanation)
    shown = plain_table("", *(name.replace("_", " ") for name in names))
    for field, effects in fields:
        shown.add_row(field, *(f"{effect:.2f}" for effect in effects))
    return shown
