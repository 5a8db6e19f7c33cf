"""Run the demo, or take up a finished one, and keep what both of its runs measured.

    python benchmarks/demo.py [--out runs/demo] [--name demo]

The result is `results/NAME.json`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from _common import write_result

from trainpilot.agents.bundle import PolicyBundle


def main() -> None:
    """Run `trainpilot demo` and write `results/NAME.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--name", default="demo")
    options = parser.parse_args()
    command = [sys.executable, "-m", "trainpilot.experiments.cli", "demo", "--out", str(options.out)]
    subprocess.run(command, check=True)
    names = ("base", "steered")
    runs = {n: json.loads((options.out / n / "summary.json").read_text(encoding="utf-8")) for n in names}
    provenance = PolicyBundle.load(options.out / "agent" / "policy.safetensors").provenance
    cost = {"policy_training_cost": provenance["training_cost"]}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(write_result(options.name, {**cost, "runs": runs}, device))


if __name__ == "__main__":
    main()
