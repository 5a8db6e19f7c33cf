"""Fine-tune a pretrained model of 135 M parameters from several learning rates, against a sweep of static settings.

    python benchmarks/fine_tuning.py [--methods full,lora] [--texts python-docs,stdlib] [--sequences 800] [--threads 2]

The model is SmolLM2-135M-Instruct (see `smollm2.py` for its package). The sweep has five learning rates at two batches,
under a linear schedule; the best setting is judged with other seeds. The policy starts at 0.1, 1 and 10 times the best
learning rate at the larger batch, with the guardrail for trained models and without it, and is asked for quality alone.
Refused requests are counted. Finished runs are not repeated. A run takes about five minutes on two cores, so the whole
takes a day; `--methods` and `--texts` take it in parts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from _common import write_result
from _simulated import rounded
from peft import LoraConfig, get_peft_model
from rich.console import Console
from smollm2 import LINEAR, VALIDATION, evaluate, loss_of, unpack
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainpilot.agents.bundle import policy_digest, policy_path
from trainpilot.agents.steering.settings import SteeringSettings
from trainpilot.agents.steering.steering import Steering
from trainpilot.experiments.progress import progress_bar
from trainpilot.llm_runtime.data.batches import BatchStream, fixed_batch
from trainpilot.llm_runtime.data.corpus import Corpus, PretrainedTokenizer, load_corpus
from trainpilot.llm_runtime.files import digest, write_json
from trainpilot.llm_runtime.process import use_threads

LENGTH, DECISIONS = 64, 50
RATES: Mapping[str, tuple[float, ...]] = {
    "full": (1e-5, 3e-5, 1e-4, 3e-4, 1e-3),
    "lora": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
}
"""Learning rates of the sweep."""
BATCHES = (2, 4)
STARTS = (0.1, 1.0, 10.0)
SEARCH_SEED = 1_000


@dataclass(frozen=True, kw_only=True)
class Run:
    """One fine-tuning run."""

    method: str
    """All weights (`full`), or low-rank adapters (`lora`)."""
    text: str
    sequences: int
    learning_rate: float
    batch_size: int
    seed: int
    policy: str = "none"
    start: float = 1.0
    """Starting learning rate over the best of the sweep."""
    guardrail: bool = True
    """Whether the learning rate stays within the bounds for trained models."""

    @property
    def name(self) -> str:
        """Name of its file."""
        return digest(asdict(self), 16)

    def settings(self) -> SteeringSettings:
        """Return its steering settings; a static follows a linear schedule, a policy its own."""
        return SteeringSettings(
            sequences=self.sequences,
            batch_size=self.batch_size,
            min_batch_size=2,  # a step of one sequence is inefficient on a processor
            sequence_length=LENGTH,
            policy=self.policy,
            preference="quality=1,energy=0,time=0",
            base_schedule=LINEAR if self.policy == "none" else None,
            fine_tuning=None if self.guardrail else False,
            decisions=DECISIONS,
        )


def train(run: Run, folder: Path, corpus: Corpus) -> dict[str, Any]:
    """Fine-tune the model once and return what came of it."""
    torch.manual_seed(run.seed)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if run.method == "lora":
        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    model.train()
    validation = torch.from_numpy(fixed_batch(corpus.validation, LENGTH, VALIDATION))
    before = evaluate(model, validation)
    weights = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=run.learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    steering = Steering(model, optimizer, run.settings())
    stream = BatchStream(corpus.train, LENGTH, run.seed)
    label = f"{run.method} {run.text} {run.policy} lr {run.learning_rate:.2g} batch {run.batch_size}"
    with progress_bar(Console(), label, 1.0) as advance:
        while not steering.finished:
            with steering.step() as step:
                batch = torch.from_numpy(stream.take(step.batch_size))
                part = partial(lambda batch, count: loss_of(model, batch[:count]), batch)
                loss = step.backward(partial(loss_of, model, batch), probe_loss=part)
            advance(steering.sequences / run.sequences, f"loss {float(loss):.3f}")
    summary, records = steering.summary(), [record.telemetry for record in steering.records]
    return {
        **asdict(run),
        "initial_loss": rounded(before),
        "loss": rounded(evaluate(model, validation)),
        "refusals": dict(summary["refusals"]),
        "rollbacks": len(summary["rollbacks"]),
        "fallen_back": summary["fallen_back"],
        "end_batch_size": records[-1].requested.batch_size,
        "learning_rates": [rounded(each.learning_rate) for each in records[:: DECISIONS // 10]],
        "time_s": rounded(summary["time_s"]),
    }


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A folder of finished runs."""

    out: Path
    model: Path
    corpora: Mapping[str, Corpus]

    def result(self, run: Run) -> dict[str, Any]:
        """Return the result of a run, from the folder if it is there."""
        path = self.out / "runs" / f"{run.name}.json"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, train(run, self.model, self.corpora[run.text]))
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def case(
        self, method: str, text: str, sequences: int, seeds: Sequence[int], policies: Sequence[str]
    ) -> dict[str, Any]:
        """Return the sweep of one method on one text, its best setting under other seeds, and the policies' runs."""
        common: dict[str, Any] = {"method": method, "text": text, "sequences": sequences}
        settings = [(rate, batch) for batch in BATCHES for rate in RATES[method]]
        swept = [
            self.result(Run(**common, learning_rate=rate, batch_size=batch, seed=SEARCH_SEED))
            for rate, batch in settings
        ]
        best = min(swept, key=lambda each: each["loss"])
        rate, batch = best["learning_rate"], best["batch_size"]
        judged = [self.result(Run(**common, learning_rate=rate, batch_size=batch, seed=seed)) for seed in seeds]
        steered = {}
        for policy in policies:
            for guardrail in (True, False):
                for start in STARTS:
                    rate_there = start * rate * (BATCHES[-1] / batch) ** 0.5
                    common_there = {**common, "learning_rate": rate_there, "batch_size": BATCHES[-1]}
                    steered[f"{policy}, {'with' if guardrail else 'without'} the guardrail, from {start:g}"] = [
                        self.result(Run(**common_there, seed=seed, policy=policy, start=start, guardrail=guardrail))
                        for seed in seeds
                    ]
        return {
            "method": method,
            "text": text,
            "sweep": [{key: each[key] for key in ("learning_rate", "batch_size", "loss")} for each in swept],
            "best": {"learning_rate": rate, "batch_size": batch, "losses": [each["loss"] for each in judged]},
            "initial_loss": best["initial_loss"],
            "steered": {name: [summary(each) for each in found] for name, found in steered.items()},
            "over_best": {
                name: rounded(fmean(each["loss"] for each in found) - fmean(each["loss"] for each in judged))
                for name, found in steered.items()
            },
        }


def summary(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the result keeps of a steered run."""
    kept = {key: run[key] for key in ("seed", "loss", "rollbacks", "fallen_back", "end_batch_size", "learning_rates")}
    return {**kept, "refusals": sum(run["refusals"].values())}


def main() -> None:
    """Run what is missing, and write `results/fine_tuning.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="full,lora", help="full, lora, or both with a comma between them")
    parser.add_argument("--texts", default="python-docs,stdlib", help="texts, with commas between them")
    parser.add_argument("--policies", default="default", help="names or files, with commas between them; may be empty")
    parser.add_argument("--sequences", type=int, default=800)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/fine_tuning"))
    options = parser.parse_args()
    use_threads(options.threads)
    policies = [name for name in options.policies.split(",") if name]
    model = options.out / "model"
    if not model.is_dir():
        unpack(model)
    tokenizer = PretrainedTokenizer(AutoTokenizer.from_pretrained(model))
    texts = options.texts.split(",")
    bench = Bench(out=options.out, model=model, corpora={text: load_corpus((text,), tokenizer) for text in texts})
    cases = [
        bench.case(method, text, options.sequences, range(options.seeds), policies)
        for method in options.methods.split(",")
        for text in texts
    ]
    result = {
        "model": "SmolLM2-135M-Instruct",
        "sequences": options.sequences,
        "sequence_length": LENGTH,
        "decisions": DECISIONS,
        "policies": {name: policy_digest(policy_path(name)) for name in policies},
        "cases": cases,
    }
    for case in cases:
        print(case["method"], case["text"], case["best"], json.dumps(case["over_best"], indent=2))
    print(write_result("fine_tuning", result, torch.device("cpu")))


if __name__ == "__main__":
    main()
