"""Measure the overhead of steering: tokens/s of a steered run over a plain loop on the same model and batches.

The two alternate interval by interval inside one process, so that a change of the machine's speed affects both. The
steered run includes a policy network that always keeps, observations, masks, the curvature probe, the energy meter and
the telemetry; evaluation is not timed. The target is 0.97.

    python benchmarks/overhead.py [--models llama-micro llama-mini] [--threads 0]
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from _common import write_result
from torch import nn
from torch.nn import functional as F

from trainpilot.agents.bundle import PolicyBundle
from trainpilot.agents.controller import Controller
from trainpilot.envs.action import ACTION_FIELDS
from trainpilot.envs.decision import N_STACK, Preference
from trainpilot.envs.observation import OBSERVATION_FIELDS
from trainpilot.llm_runtime.config import RunConfig
from trainpilot.llm_runtime.data.batches import BatchStream
from trainpilot.llm_runtime.live_run import LiveRun
from trainpilot.llm_runtime.models import load_model
from trainpilot.llm_runtime.precision import synchronise
from trainpilot.llm_runtime.process import use_threads
from trainpilot.llm_runtime.telemetry import Telemetry
from trainpilot.llm_runtime.timing import alternating_seconds

DECISIONS = 50
TARGET = 0.97


def keeping_bundle() -> PolicyBundle:
    """Return a policy network of the usual size whose most likely action is to keep."""
    random = np.random.default_rng(0)
    sizes = [N_STACK * len(OBSERVATION_FIELDS), 64, 64]
    weights = {}
    for index, (n_in, n_out) in enumerate(pairwise(sizes)):
        weights[f"hidden.{index}.weight"] = random.normal(0, 0.1, (n_out, n_in)).astype(np.float32)
        weights[f"hidden.{index}.bias"] = np.zeros(n_out, np.float32)
    bias = np.concatenate([np.eye(len(f.choices), dtype=np.float32)[f.keep] for f in ACTION_FIELDS])
    weights["action.weight"] = np.zeros((len(bias), 64), np.float32)
    weights["action.bias"] = bias
    return PolicyBundle(weights)


class PlainLoop:
    """An ordinary training loop without records and controls."""

    def __init__(self, config: RunConfig, tokens: np.ndarray, device: torch.device) -> None:
        self.config, self.device = config, device
        self.model = load_model(config.model, config.seed).model.to(device).train()
        parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=config.base_learning_rate, betas=(config.beta1, config.beta2), fused=True
        )
        self.stream = BatchStream(tokens, config.sequence_length, config.seed)
        self.schedule = config.base_schedule()
        self.sequences = 0

    def train_until(self, sequences: int) -> None:
        """Train until the given number of sequences is done."""
        config = self.config
        while self.sequences < sequences:
            batch_size = min(config.batch_size, config.n_sequences() - self.sequences)
            batch = torch.from_numpy(self.stream.take(batch_size)).to(self.device)
            step_tokens = config.batch_size * config.sequence_length
            factor = self.schedule.factor(self.sequences * config.sequence_length, step_tokens)
            for group in self.optimizer.param_groups:
                group["lr"] = config.base_learning_rate * factor
            logits = self.model(input_ids=batch[:, :-1], use_cache=False).logits
            loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self.model.parameters(), config.gradient_clip)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.sequences += batch_size


@dataclass
class Clock:
    """Measures seconds per part."""

    plain_s: float = 0.0
    steered_s: float = 0.0
    decide_s: float = 0.0
    probe_s: float = 0.0
    switch_s: float = 0.0


def compare(config: RunConfig) -> dict[str, object]:
    """Run both loops interval by interval, in alternating order, and return the figures."""
    run = LiveRun(config)
    controller = Controller.of_bundle(keeping_bundle(), run.limits(), Preference())
    plain = PlainLoop(config, run.corpus.train, run.device)
    clock = Clock()
    telemetry: Telemetry | None = None
    targets = (round((n + 1) / config.decisions * config.n_sequences()) for n in range(config.decisions))

    def steered_interval() -> None:
        nonlocal telemetry
        start = time.perf_counter()
        controls = controller.decide(telemetry)
        clock.decide_s += time.perf_counter() - start
        telemetry = run.advance(controls, 1 / config.decisions)
        clock.probe_s += telemetry.probe_time_s
        clock.switch_s += telemetry.switch_time_s

    seconds = alternating_seconds(
        {"plain": lambda: plain.train_until(next(targets)), "steered": steered_interval},
        rounds=config.decisions,
        warm_up=0,
        turn_about=True,
        wait=partial(synchronise, run.device),
    )
    clock.plain_s, clock.steered_s = sum(seconds["plain"]), sum(seconds["steered"])
    ratios = [one / other for one, other in zip(seconds["plain"], seconds["steered"], strict=True)]
    rest = clock.steered_s - clock.plain_s - clock.decide_s - clock.probe_s - clock.switch_s
    assert run.progress.sequences == plain.sequences
    return {
        "model": config.model,
        "n_parameters": run.loaded.n_parameters,
        "tokens": config.tokens,
        "decisions": config.decisions,
        "batch_size": config.batch_size,
        "sequence_length": config.sequence_length,
        "energy_meter": run.meter.description,
        "plain_tokens_per_s": config.tokens / clock.plain_s,
        "steered_tokens_per_s": config.tokens / clock.steered_s,
        "ratio": clock.plain_s / clock.steered_s,
        "ratio_interval_quartiles": [float(q) for q in np.percentile(ratios, [25, 50, 75])],
        "target": TARGET,
        "target_met": bool(clock.plain_s / clock.steered_s >= TARGET),
        "share_of_steered_time": {
            "probe": clock.probe_s / clock.steered_s,
            "observation_and_policy": clock.decide_s / clock.steered_s,
            "switching": clock.switch_s / clock.steered_s,
            "telemetry_meter_and_noise": rest / clock.steered_s,
        },
    }


def main() -> None:
    """Measure the models named on the command line and write `results/overhead*.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["llama-micro", "llama-mini"])
    parser.add_argument("--threads", type=int, default=0, help="torch threads, 0 for all cores")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="budget of each run")
    parser.add_argument("--name", default="overhead", help="name of the result file")
    options = parser.parse_args()
    use_threads(options.threads)
    results, device = [], torch.device("cpu")
    for model in options.models:
        config = RunConfig(model=model, tokens=options.tokens, decisions=DECISIONS)
        results.append(compare(config))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        print(f"{model}: {results[-1]['ratio']:.4f} of the plain loop's tokens/s (target {TARGET})", flush=True)
    print(write_result(options.name, {"results": results}, device))


if __name__ == "__main__":
    main()
