"""Compare methods that make a model cheaper, at equal budget, on small models, and write `compression_rows.json`.

    python benchmarks/compression_rows.py [--seeds 3] [--methods wsd,small,minitron,...] [--jobs 1]

Every row trains on the same tokens: `prune-...` and `minitron` cut the model to half after 60 % of them, `small` has
that shape from the start, and the rounded rows are judged in the format that they are used in
(`docs/measuring.md`). Learning rate and batch are those of the case, the same for all rows. Runs lie in OUT; the same
command resumes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from _common import write_result
from _simulated import rounded
from rich.console import Console

from trainpilot.experiments.compare.command import compare
from trainpilot.experiments.options import CompareOptions
from trainpilot.llm_runtime.files import write_json

METHODS = (
    "wsd,small,prune-ffn,prune-heads,prune-depth,minitron,distil,early-stop,quantise-int8,quantise-int4,shift-add,"
    "minitron+quantise-int4"
)
CASES = {
    "common": {"tokens": 131_072, "batch_size": 8, "sequence_length": 64, "decisions": 50, "schedule": "wsd"},
    "cases": [
        {"name": "scripts", "model": "llama-nano", "text": "stdlib:*.py", "base_learning_rate": 3e-3},
        {
            "name": "packages",
            "model": "llama-nano",
            "text": "stdlib:ctypes,re,collections,zoneinfo,tomllib,sqlite3",
            "base_learning_rate": 3e-3,
        },
    ],
}


def main() -> None:
    """Run what is missing, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/compression_rows"))
    options = parser.parse_args()
    cases = options.out / "cases.json"
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(cases, CASES)
    asked = CompareOptions(
        cases=str(cases), methods=options.methods, seeds=options.seeds, jobs=options.jobs, out=options.out
    )
    compare(asked, Console())
    uses = json.loads((options.out / "figures.json").read_text(encoding="utf-8"))["uses"]
    rows = {name: row([use for use in uses if use["method"] == name]) for name in options.methods.split(",")}
    for name, each in rows.items():
        print(name, each)
    result = {"seeds": options.seeds, "cases": CASES, "mean_over_cases": rows, "uses": uses}
    print(write_result("compression_rows", result, torch.device("cpu")))


def row(uses: list[dict[str, Any]]) -> dict[str, float | None]:
    """Return the means over the cases."""
    names = ("validation_loss", "n_parameters", "weight_bytes", "training_j", "latency_s", "use_j")
    known = {name: [use[name] for use in uses if use[name] is not None] for name in names}
    return {name: rounded(fmean(values)) if values else None for name, values in known.items()}


if __name__ == "__main__":
    main()
