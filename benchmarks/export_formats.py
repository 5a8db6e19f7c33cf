"""Train a small Llama, and write and weigh it in every format that `trainpilot export` has.

    pip install -c constraints.txt -e '.[export,llama-cpp,torchao]'
    python benchmarks/export_formats.py [--tokens 200000] [--out runs/export]

It takes about three minutes on one core. The table of `docs/export.md` shows the result.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from _common import write_result
from rich.console import Console

from trainpilot.experiments.export.command import export
from trainpilot.experiments.options import ExportOptions, ReplayOptions
from trainpilot.experiments.replay import replay
from trainpilot.llm_runtime.process import use_threads

MODEL, TEXT = "llama-nano", "stdlib"


def main() -> None:
    """Train and export what is missing, and write `results/export_formats.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--out", type=Path, default=Path("runs/export"))
    options = parser.parse_args()
    use_threads(1)
    console, run = Console(), options.out / "run"
    replay(ReplayOptions(policy="none", model=MODEL, text=(TEXT,), tokens=options.tokens, out=run), console)
    export(ExportOptions(path=run, out=options.out / "formats", threads=1), console)
    result = json.loads((options.out / "formats" / "export.json").read_text(encoding="utf-8"))
    result["source"] = MODEL
    print(write_result("export_formats", result, torch.device("cpu")))


if __name__ == "__main__":
    main()
