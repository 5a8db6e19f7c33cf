"""Write `benchmarks/results/attack.json` from the records of the attempts, and `docs/reliability.md` from that."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.attack import ROOT
from tests.attack.runner import KINDS, Suite, kind_of
from trainpilot.llm_runtime.files import write_json

RESULT = ROOT / "benchmarks" / "results" / "attack.json"
PAGE = ROOT / "docs" / "reliability.md"
SHOWN = 8
"""Failures of a promise that the page shows; the file holds all."""

HEAD = """# Reliability: what was attacked, and what held

`make attack` attacks each promise below, many times and in ways that are written down in `tests/attack`, and writes
this page from `benchmarks/results/attack.json`. Every attempt runs in a process and a folder of its own, with limits on
time and memory. *Held* means that the promise was kept to the letter; a crash, a hang and a second line of an error
message all count as failures. The same seed makes the same attempts:

    python -m tests.attack --only KIND --number NUMBER --seed SEED

repeats one of them and leaves its folder for you to look at.
"""

NOT_ATTACKED = """## What is not attacked

* GPUs and their meters: NVML is attacked with a compiled stand-in in the tests, never with a real driver here. RAPL
  counters, CUDA errors and running out of GPU memory are not attacked.
* Several processes that train one model together, and the adapters for Hugging Face and Lightning: their tests resume
  killed runs, but nothing attacks them here.
* Power cuts. A process is killed between any two of its writes and in the middle of one, as by `kill -9`; what had been
  written stays in the operating system's hands and is not lost.
* The live stage of `train-agent` and the worker processes of `compare` and `calibrate`: kills hit the process that
  writes the files, with the runs inside of it.
* A checkpoint, a state or a run's file that somebody forged with care, every value of which could be a real one. It is
  believed: it runs no code, but it decides what is trained.
* The network, the Hugging Face Hub, and the libraries that trainpilot stands on.
* Large models. The hostile policies steer a network of 50,000 weights for 300 steps; what a contract promises there, it
  need not be worth on a model ten thousand times as large.
"""


def keep_result(suite: Suite, records: Sequence[dict[str, Any]]) -> None:
    """Write the result of a kind beside the records of its attempts."""
    notes = suite.shared / "notes.json"
    result = {
        "title": suite.kind.TITLE,
        "attempts": len(suite.attempts),
        "tried": len(records),
        "held": sum(not record["failures"] for record in records),
        "cpu_s": round(sum(record["cpu_s"] for record in records), 1),
        "measured": json.loads(notes.read_text(encoding="utf-8")) if notes.is_file() else {},
        "promises": _by_promise(suite.kind.PROMISES, records),
    }
    write_json(suite.results.with_suffix(".json"), {"digest": suite.digest, "result": result})


def kept_result(work: Path, name: str, digest: str) -> dict[str, Any] | None:
    """Return the result of a kind that was made with the same product, suite and seed; `None` where there is none."""
    try:
        kept = json.loads((work / f"{name}.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return kept["result"] if kept["digest"] == digest else None


def _by_promise(promises: Mapping[str, Any], records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    found = {}
    for name in promises:
        tried = [record for record in records if name in record["promises"]]
        failed = [record for record in tried if name in record["failures"]]
        found[name] = {
            "tried": len(tried),
            "held": len(tried) - len(failed),
            "worst": max((each["measured"] for each in tried if each.get("measured") is not None), default=None),
            "failures": [
                {"number": record["number"], "attack": record["name"], "reason": record["failures"][name]}
                for record in failed
            ],
        }
    return found


def page(result: Mapping[str, Any]) -> str:
    """Return the page of a result."""
    parts = [HEAD, _summary(result), "## Promises\n", _table(result), NOT_ATTACKED, _failures(result)]
    return "\n".join(part.strip("\n") + "\n" for part in parts if part)


def _summary(result: Mapping[str, Any]) -> str:
    rows = ["| attack | tried | held | minutes |", "|---|---|---|---|"]
    kinds = result["kinds"].values()
    for kind in kinds:
        rows.append(f"| {kind['title']} | {kind['tried']} | {kind['held']} | {kind['cpu_s'] / 60:.1f} |")
    tried, held, seconds = (sum(kind[name] for kind in kinds) for name in ("tried", "held", "cpu_s"))
    rows.append(f"| all | {tried} | {held} | {seconds / 60:.1f} |")
    cores = result["machine"]["processor"]
    tail = f"Measured on {result['date']} with trainpilot {result['versions']['trainpilot']}, seed {result['seed']}, "
    left_out = sum(kind["attempts"] for kind in kinds) - tried
    note = f" A sample: {left_out:,} further attempts were not made." if left_out else ""
    return "\n".join([*rows, "", f"{tail}on one core of: {cores}.{note}"])


def _table(result: Mapping[str, Any]) -> str:
    rows = ["| promise | how it is attacked | tried | held |", "|---|---|---|---|"]
    for name in KINDS:
        kind, promises = result["kinds"].get(name), kind_of(name).PROMISES
        for key, promise in promises.items() if kind else ():
            found = kind["promises"][key]
            rows.append(f"| {promise.text} | {promise.attack} | {found['tried']} | {found['held']} |")
    notes = [note for kind in result["kinds"].values() if (note := kind["measured"].get("sentence"))]
    return "\n".join([*rows, "", *notes])


def _failures(result: Mapping[str, Any]) -> str:
    parts = []
    for name, kind in result["kinds"].items():
        for key, found in kind["promises"].items():
            if not found["failures"]:
                continue
            parts.append(f"* {kind_of(name).PROMISES[key].text} ({kind['title']})")
            for each in found["failures"][:SHOWN]:
                attack, reason = (_code(each[part]) for part in ("attack", "reason"))
                parts.append(f"    * {attack}: {reason}; `--only {name} --number {each['number']}`")
            if len(found["failures"]) > SHOWN:
                parts.append(f"    * and {len(found['failures']) - SHOWN} more, in the file")
    return "\n".join(["## Failures", "", *(parts or ["None."])])


def _code(text: str) -> str:
    """Return text as code of Markdown, whatever it holds."""
    return "`` " + text.replace("`", "'").strip()[:160] + " ``" if text.strip() else "` `"


def write_page(path: Path = PAGE) -> None:
    """Write the page from the file of the result."""
    path.write_text(page(json.loads(RESULT.read_text(encoding="utf-8"))), encoding="utf-8")
