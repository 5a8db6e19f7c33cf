"""Show a policy in the terminal: what it is, what it cost and scored, which fields its first layer reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from trainpilot.agents.bundle import PolicyBundle, policy_digest
from trainpilot.agents.explain import input_shares
from trainpilot.agents.logging.run_log import flatten, text

pass
from trainpilot.agents.logging.run_log import flatten, text
from trainpilot.experiments.inspect_policy import MANY, _entry, titled_table

MANY = 6
"""More different values than this are not listed."""


BARS = 15
"""Fields shown with a bar; the others count together."""
BAR_WIDTH = 40
SHOWN_APART = ("base_schedule", "decisions", "training_cost", "scores")
"""Parts of the provenance with a place of their own."""


def print_policy(path: Path, console: Console) -> None:
    """Print what a policy file says about itself, and what can be told from its weights.

    Raises:
        ValueError: the file is no bundle, or one of another version.
    """
    bundle = PolicyBundle.load(path)
    console.print(Text(f"\n{path}", style="bold"), soft_wrap=True)
    console.print(_facts(path, bundle))
    for name, title in (("training_cost", "What training it cost"), ("scores", "Scores")):
        if figures := bundle.provenance.get(name):
            print_table(title, _figures(figures), console)
    if rest := {key: value for key, value in bundle.provenance.items() if key not in SHOWN_APART}:
        print_bundle(rest, console)
    bars = _bars(input_shares(bundle), "█" if console.encoding.lower().startswith("utf") else "#")
    print_table("What its first layer reads: each field's share of the weights' norms", bars, console)


def print_table(title: str, table: Table, console: Console) -> None:
    """Print a table under a title of its own line, which may be wider than the table."""
    console.print(Text(f"\n{title}", style="bold"))
    console.print(table)


def plain_table(*columns: str, left: int = 1) -> Table:
    """Return a table without lines; the first `left` columns are aligned to the left."""
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
        return "none of its own: linear with 2 % warm-up unless told otherwise"
    return f"{base.schedule}, warm-up over {100 * base.warmup_share:g} % of the budget"


def _figures(figures: Any) -> Table:
    table = plain_table("", "")
    for key, value in flatten(figures if isinstance(figures, Mapping) else {"": figures}).items():
        table.add_row(escape(key), _figure(value))
    return table


def _figure(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return escape(text(value))
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _bars(shares: Mapping[str, float], block: str) -> Table:
    table = plain_table("", "", "", left=2)
    top = list(shares.items())[:BARS]
    for name, share in top:
        table.add_row(name, block * round(BAR_WIDTH * share / max(top[0][1], 1e-30)), f"{share:.1%}")
    table.add_row(f"the other {len(shares) - len(top)}", "", f"{1 - sum(share for _, share in top):.1%}", style="dim")
    return table


def _entry(value: Any) -> str:
    """Return a value as text; of a list of tables, how many there are and in what they differ."""
    if not (isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value)):
        return text(value)
    columns = {key: list(dict.fromkeys(text(item.get(key)) for item in value)) for key in value[0]}
    differing = [f"{key} {', '.join(seen)}" for key, seen in columns.items() if 1 < len(seen) <= MANY]
    return "; ".join([str(len(value)), *differing])


def titled_table(title: str, *columns: str) -> Table:
    table = Table(
        title=f"\n{title}", title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0)
    )
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left", header_style="dim")
    return table


def print_bundle(info: Mapping[str, Any], console: Console) -> None:
    """Print what a policy file says about itself."""
    table = titled_table("Policy", "", "")
    table.columns[1].justify = "left"
    for key, value in flatten(info).items():
        table.add_row(escape(key), escape(_entry(value)))
    console.print(table)
