"""Measure how much faster a training step gets when half of the feed-forward channels are removed.

python benchmarks/width_speed.py [--models llama-micro llama-mini]
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from functools import partial

import torch
from _common import write_result

from trainpilot.llm_runtime.config import RunConfig
from trainpilot.llm_runtime.live_run import LiveRun
from trainpilot.llm_runtime.precision import synchronise
from trainpilot.llm_runtime.process import use_threads
from trainpilot.llm_runtime.timing import alternating_seconds
from trainpilot.llm_runtime.width import ffn_width


def compare(model: str, rounds: int) -> dict[str, object]:
    """Return seconds per optimiser step of the dense model and of one with half its channels."""
    config = RunConfig(model=model, pruning="width")
    runs = {"dense": LiveRun(config, probe=False), "half": LiveRun(config, probe=False)}
    runs["half"].trainer.apply(replace(config.start(), sparsity=0.5))
    for run in runs.values():
        run.trainer.set_learning_rate(1e-4)
    passes = {name: partial(run.trainer.step, run.stream.take(config.batch_size)) for name, run in runs.items()}
    wait = partial(synchronise, runs["dense"].device)
    seconds = alternating_seconds(passes, rounds=rounds, warm_up=2, turn_about=True, wait=wait)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "model": model,
        "channels": {name: ffn_width(run.loaded.model) for name, run in runs.items()},
        "n_parameters": {name: run.loaded.n_parameters for name, run in runs.items()},
        "step_s": medians,
        "step_time_ratio": medians["half"] / medians["dense"],
    }


def main() -> None:
    """Measure the models named on the command line and write `results/width_speed.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["llama-micro", "llama-mini"])
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    use_threads(0)
    results = [compare(model, options.rounds) for model in options.models]
    for result in results:
        print(f"{result['model']}: a step takes {result['step_time_ratio']:.3f} of the dense one's time")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(write_result("width_speed", {"results": results}, device))


if __name__ == "__main__":
    main()
