"""Print what `doctor` found on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

BUSY = 1.5
"""A machine is called busy where the same pass takes this much longer once than another time."""


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """Print what `diagnose` returned."""
    rows: list[tuple[str, str]] = [
        ("versions", ", ".join(f"{name} {number}" for name, number in report["versions"].items())),
        *(("device", _device(device, report["default_device"])) for device in report["devices"]),
        ("threads", f"{report['threads']['torch']} in use by torch, {report['threads']['cores']} cores"),
        ("energy", report["energy"]["description"]),
        *((f"  {name}", _meter(meter)) for name, meter in report["energy"]["meters"].items()),
        ("corpus stdlib", _corpus(report["corpora"]["stdlib"])),
        ("corpus hub", report["corpora"]["hub"]["why_not"] or "datasets is installed; the network was not tried"),
        ("cache", _cache_line(report["cache"])),
        *((f"optional {name}", _package(about)) for name, about in report["optional"].items()),
    ]
    table = _table("This machine", rows)
    console.print(table)
    console.print(_table("Controls", [(name, about["verdict"]) for name, about in report["controls"].items()]))
    console.print(f"\n[dim]{escape(_measured(report['payoff']))}[/dim]")


def _table(title: str, rows: list[tuple[str, str]]) -> Table:
    table = Table(title=f"\n{title}", title_justify="left", title_style="bold", box=None, show_header=False)
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for name, text in rows:
        table.add_row(name, escape(text))
    return table


def _device(device: Mapping[str, Any], default: str) -> str:
    parts = [f"{device['kind']}: {device['name']}"]
    if device["memory_bytes"] is not None:
        parts.append(f"{device['memory_bytes'] / 2**30:.1f} GiB")
    if device["compute_capability"] is not None:
        parts.append(f"compute capability {device['compute_capability']}")
    return ", ".join(parts) + (" (default)" if device["kind"].partition(":")[0] == default else "")


def _meter(meter: Mapping[str, Any]) -> str:
    if meter["available"]:
        return f"{meter['power_w']:.1f} W over one second at rest, {meter['source']}"
    way_out = f"; way out: {meter['way_out']}" if meter["way_out"] else ""
    return f"not available: {meter['description']}{way_out}"


def _corpus(stdlib: Mapping[str, Any]) -> str:
    if not stdlib["available"]:
        return str(stdlib["why_not"])
    return f"{stdlib['bytes'] / 1e6:.1f} MB of Python source in {stdlib['documents']:,} files"


def _cache_line(cache: Mapping[str, Any]) -> str:
    state = "" if cache["writable"] else "; cannot be written: set TRAINPILOT_CACHE to another folder"
    return f"{cache['folder']}, {cache['bytes'] / 1e6:.1f} MB, {cache['free_bytes'] / 1e9:.1f} GB free on disk{state}"


def _package(about: Mapping[str, Any]) -> str:
    state = about["version"] or f"not installed: {about['way_out']}"
    return f"{state}, for {about['for']}"


def _measured(payoff: Mapping[str, Any]) -> str:
    if "error" in payoff:
        return "Nothing was timed."
    text = (
        f"Timed on {payoff['model']}, batch {payoff['batch_size']}, {payoff['rounds']} rounds: a first impression. "
        "A run measures precision again on its own model."
    )
    if payoff["spread"] > BUSY:
        text += (
            f" This machine is busy: the same pass took up to {payoff['spread']:.1f} times as long; "
            "ask again when it is at rest."
        )
    return text
