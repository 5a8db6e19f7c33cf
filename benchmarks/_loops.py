"""Run the loops that people have, as they are and steered by a policy that keeps everything.

Each loop is a function of a `Work`, the small training, and of whether it is steered. `REFUSED` are the loops that
steering refuses: each makes one and returns what is said.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from trainpilot.agents.controller import keep
from trainpilot.agents.integrations.common import ProcessGroupRanks, accelerated
from trainpilot.agents.steering.loader_batches import batches
from trainpilot.agents.steering.settings import SteeringSettings
from trainpilot.agents.steering.steering import Steering
from trainpilot.agents.steering.torch_schedules import schedule_of
from trainpilot.llm_runtime.data.batches import BatchStream
from trainpilot.llm_runtime.data.corpus import ByteTokenizer, load_corpus
from trainpilot.llm_runtime.models import load_model
from trainpilot.llm_runtime.optimizer import full_tensor

Batch = dict[str, Tensor]
BATCH, MICRO_BATCHES, LENGTH, RATE = 8, 2, 64, 3e-3
"""Sequences of a step, of all processes; micro-batches that they come in; tokens of a sequence; peak learning rate."""
ROWS = 256
"""Sequences of the data: fewer than are trained on, so that epochs end within the run."""
WARM_UP, CLIP, INTERVAL = 5, 1.0, 10
"""Steps of warm-up; largest norm of the gradient; steps between two decisions."""
UNDER_WAY = 0.3
"""Share of the run that is done when steering begins, in the run that is under way."""


@dataclass(kw_only=True)
class Work:
    """A small training: its model and data, and what comes of it."""

    model_name: str
    steps: int
    folder: Path
    tick: Callable[[], None] = lambda: None
    """Called after every optimiser step."""
    rank: int = 0
    processes: int = 1
    losses: list[Tensor] = field(default_factory=list)
    """Loss of every micro-batch of this process, a scalar each."""
    model: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.model = load_model(self.model_name, 0).model.train()
        stream = BatchStream(load_corpus(("python-docs",), ByteTokenizer()).train, LENGTH, 0)
        self.rows = torch.from_numpy(stream.take(ROWS)[:, :-1])

    def data(self) -> list[Batch]:
        """Return the rows of this process."""
        mine = self.rows[self.rank :: self.processes]
        return [{"input_ids": row, "labels": row} for row in mine]

    def loader(self) -> DataLoader[Batch]:
        """Return a loader of this process's micro-batches, in the same order with and without steering."""
        shuffled: Any = self.data()
        size = BATCH // MICRO_BATCHES // self.processes
        return DataLoader(shuffled, batch_size=size, shuffle=True, generator=torch.Generator().manual_seed(0))

    def loss_of(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean loss of a micro-batch."""
        loss: Tensor = model(**batch, use_cache=False).loss
        return loss

    def settings(self, **more: Any) -> SteeringSettings:
        """Return the settings of the steered side: the policy keeps everything."""
        usual = {
            "sequences": self.steps * BATCH,
            "batch_size": BATCH,
            "sequence_length": LENGTH,
            "policy": keep,
            "decisions": self.steps // INTERVAL,
            "gradient_clip": CLIP,
        }
        return SteeringSettings(**usual | more)

    def optimizer(self, parameters: Any = None) -> Optimizer:
        """Return a new AdamW."""
        return torch.optim.AdamW(parameters or self.model.parameters(), lr=RATE, betas=(0.9, 0.95))

    def scheduler(self, optimizer: Optimizer) -> LRScheduler:
        """Return a cosine with warm-up, as people write it."""
        from transformers import get_cosine_schedule_with_warmup

        return get_cosine_schedule_with_warmup(optimizer, WARM_UP, self.steps)

    def weights(self) -> list[Tensor]:
        """Return the final weights."""
        return [full_tensor(p.detach()).clone() for p in self.model.parameters()]


Context = Callable[[], AbstractContextManager[Any]]


def by_hand(
    work: Work,
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    *,
    steps: int | None = None,
    sync: Callable[[bool], None] = lambda last: None,
    context: Context = nullcontext,
    tick: Callable[[], None] | None = None,
) -> None:
    """Train as an ordinary PyTorch loop does, by default the whole run."""
    schedulers = [work.scheduler(optimizer) for optimizer in optimizers]
    stream = chain.from_iterable(repeat(work.loader()))
    for _ in range(steps or work.steps):
        for part in range(MICRO_BATCHES):
            sync(part == MICRO_BATCHES - 1)
            with context():
                loss = work.loss_of(model, next(stream))
            (loss / MICRO_BATCHES).backward()
            work.losses.append(loss.detach())
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        (tick or work.tick)()


def by_steering(work: Work, steering: Steering, model: nn.Module, data: Any, context: Context = nullcontext) -> None:
    """Train the same under steering."""

    def loss_of(batch: Batch) -> Tensor:
        with context():
            return work.loss_of(model, batch)

    while not steering.finished:
        with steering.step() as step:
            for batch in data.take(step.batch_size):
                work.losses.append(step.backward(loss_of, batch=batch))
        work.tick()


def steered(
    work: Work, model: nn.Module, optimizers: Sequence[Optimizer], context: Context = nullcontext, **more: Any
) -> None:
    """Attach steering to an ordinary loop, and train the whole run."""
    schedule = schedule_of(work.scheduler(optimizers[0]), work.steps)
    data = batches(work.loader())
    steering = Steering(model, optimizers, work.settings(base_schedule=schedule), data=data, **more)
    by_steering(work, steering, model, data, context)


# The loops -----------------------------------------------------------------------------------------------------------


def plain(work: Work, is_steered: bool) -> None:
    """Train in a plain loop over a `DataLoader`."""
    optimizers = [work.optimizer()]
    (steered if is_steered else by_hand)(work, work.model, optimizers)


def compiled(work: Work, is_steered: bool) -> None:
    """Train a compiled model under the loop's own bf16 autocast."""
    model: Any = torch.compile(work.model)
    context = partial(torch.autocast, "cpu", torch.bfloat16)
    (steered if is_steered else by_hand)(work, model, [work.optimizer()], context=context)


def muon(work: Work, is_steered: bool) -> None:
    """Train the layers' matrices with Muon and the rest with AdamW."""
    named = list(work.model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "layers" in name]
    others = [p for name, p in named if not (p.ndim == 2 and "layers" in name)]
    optimizers = [torch.optim.Muon(matrices, lr=0.02), work.optimizer(others)]
    (steered if is_steered else by_hand)(work, work.model, optimizers)


def under_way(work: Work, is_steered: bool) -> None:
    """Train the first part in a plain loop, save, and let steering take over the rest; the other side goes on."""
    optimizer = work.optimizer()
    done = round(UNDER_WAY * work.steps)
    turns = iter([False] * done + [True] * work.steps)
    if not is_steered:
        return by_hand(work, work.model, [optimizer], tick=lambda: work.tick() if next(turns) else None)
    checkpoint = work.folder / "checkpoint.pt"
    by_hand(work, work.model, [optimizer], steps=done, tick=lambda: None)
    torch.save({"model": work.model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint)

    work.model = load_model(work.model_name, 1).model.train()
    optimizer = work.optimizer()
    schedule = schedule_of(work.scheduler(optimizer), work.steps)
    saved = torch.load(checkpoint)
    work.model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    data = batches(work.loader())
    data.take(done * BATCH)
    settings = work.settings(base_schedule=schedule, sequences_done=done * BATCH)
    by_steering(work, Steering(work.model, optimizer, settings, data=data), work.model, data)
    return None


def accelerate(work: Work, is_steered: bool) -> None:
    """Train with Accelerate's own accumulation; steered, with `accelerated`."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=1 if is_steered else MICRO_BATCHES)
    own = work.optimizer()
    scheduler = work.scheduler(own)
    model, optimizer, loader = accelerator.prepare(work.model, own, work.loader())
    if is_steered:
        settings, data = work.settings(base_schedule=schedule_of(scheduler, work.steps)), batches(loader)
        return by_steering(work, accelerated(accelerator, model, optimizer, settings, data=data), model, data)
    scheduler = accelerator.prepare(scheduler)
    stream = chain.from_iterable(repeat(loader))
    for _ in range(work.steps * MICRO_BATCHES):
        batch = next(stream)  # before `accumulate`, which asks whether it is the epoch's last
        with accelerator.accumulate(model):
            loss = work.loss_of(model, batch)
            accelerator.backward(loss)
            work.losses.append(loss.detach())
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            work.tick()
    return None


def _train(work: Work, kind: type, arguments: Any, **more: Any) -> None:
    """Train with a Trainer of a kind, and note the losses that it computes in training."""
    from transformers import TrainerCallback

    class Noting(kind):  # type: ignore[misc]
        def compute_loss(self, model: Any, *rest: Any, **named: Any) -> Any:
            loss = super().compute_loss(model, *rest, **named)
            if model.training:
                work.losses.append((loss[0] if isinstance(loss, tuple) else loss).detach())
            return loss

    class Ticks(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            work.tick()

    trainer = Noting(model=work.model, args=arguments, **more)
    trainer.add_callback(Ticks())
    trainer.train()


def _arguments(work: Work) -> dict[str, Any]:
    return {
        "output_dir": str(work.folder),
        "per_device_train_batch_size": BATCH // MICRO_BATCHES,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "max_steps": work.steps,
        "learning_rate": RATE,
        "lr_scheduler_type": "cosine",
        "warmup_steps": WARM_UP,
        "max_grad_norm": CLIP,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1_000,
    }


def _steering(work: Work) -> dict[str, Any]:
    return {"policy": keep, "decisions": work.steps // INTERVAL, "sequence_length": LENGTH}


def lora(work: Work, is_steered: bool) -> None:
    """Train LoRA adapters in bf16 with the Hugging Face Trainer; steered, with `SteeredTrainer`."""
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    from trainpilot.agents.integrations.huggingface import SteeredTrainer

    torch.manual_seed(0)
    base: Any = work.model
    work.model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    arguments = TrainingArguments(**_arguments(work), bf16=True)
    more = {"steering": _steering(work)} if is_steered else {}
    _train(work, SteeredTrainer if is_steered else Trainer, arguments, train_dataset=work.data(), **more)


def sft(work: Work, is_steered: bool) -> None:
    """Train on packed texts with TRL's SFTTrainer; steered, with `SteeringMixin` in front of it."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    from trainpilot.agents.integrations.huggingface import SteeringMixin

    class SteeredSFTTrainer(SteeringMixin, SFTTrainer):  # type: ignore[misc]
        pass

    fast: Any = PreTrainedTokenizerFast
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, "<eos>"))
    tokenizer = fast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    # Their packed rows fill whole steps: the plain Trainer cuts an epoch's last step short, which steering does not.
    texts = [row[: LENGTH // 2 + 4 * (index % 8)].tolist() for index, row in enumerate(work.rows)]
    packing = {"packing": True, "packing_strategy": "wrapped", "max_length": LENGTH}
    arguments = SFTConfig(**_arguments(work), **packing, bf16=False, gradient_checkpointing=False)
    more = {"steering": _steering(work)} if is_steered else {}
    _train(
        work,
        SteeredSFTTrainer if is_steered else SFTTrainer,
        arguments,
        train_dataset=Dataset.from_dict({"input_ids": texts}),
        processing_class=tokenizer,
        **more,
    )


def lightning(work: Work, is_steered: bool) -> None:
    """Train with Lightning and a scheduler; steered, with `LightningSteering`."""
    import lightning.pytorch as pl

    from trainpilot.agents.integrations.lightning import LightningSteering

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = work.model

        def training_step(self, batch: Batch, _index: int) -> Tensor:
            loss = work.loss_of(self.model, batch)
            if self.training:
                work.losses.append(loss.detach())
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = work.optimizer()
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": work.scheduler(optimizer), "interval": "step"},
            }

        def on_train_batch_end(self, _outputs: Any, _batch: Any, batch_idx: int) -> None:
            if (batch_idx + 1) % MICRO_BATCHES == 0:
                work.tick()

    steering = {"policy": keep, "decisions": work.steps // INTERVAL, "sequence_length": LENGTH}
    trainer = pl.Trainer(
        max_steps=work.steps,
        accumulate_grad_batches=MICRO_BATCHES,
        gradient_clip_val=CLIP,
        callbacks=[LightningSteering(steering)] if is_steered else [],
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=work.folder,
    )
    trainer.fit(Module(), work.loader())


def ddp(work: Work, is_steered: bool) -> None:
    """Train in one of two processes with DistributedDataParallel."""
    model = nn.parallel.DistributedDataParallel(work.model)
    optimizers = [work.optimizer()]
    if is_steered:
        return steered(work, model, optimizers, ranks=ProcessGroupRanks())

    def sync(last: bool) -> None:
        model.require_backward_grad_sync = last

    return by_hand(work, model, optimizers, sync=sync)


def fsdp2(work: Work, is_steered: bool) -> None:
    """Train in one of two processes with `fully_shard`."""
    from torch.distributed.fsdp import fully_shard

    model: Any = work.model
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizers = [work.optimizer()]
    if is_steered:
        return steered(work, model, optimizers, ranks=ProcessGroupRanks())
    return by_hand(work, model, optimizers, sync=model.set_requires_gradient_sync)


Loop = Callable[[Work, bool], None]
LOOPS: dict[str, Loop] = {
    "plain loop, DataLoader": plain,
    "plain loop, bf16 autocast, torch.compile": compiled,
    "Accelerate": accelerate,
    "Trainer, bf16, LoRA": lora,
    "SFTTrainer, packing": sft,
    "Lightning, scheduler": lightning,
    "torchrun, DDP": ddp,
    "torchrun, FSDP2": fsdp2,
    "Muon and AdamW": muon,
    "steered from 30 % on": under_way,
}
NEEDS: dict[str, tuple[str, ...]] = {
    "Accelerate": ("accelerate",),
    "Trainer, bf16, LoRA": ("accelerate", "peft"),
    "SFTTrainer, packing": ("accelerate", "datasets", "trl"),
    "Lightning, scheduler": ("lightning",),
}
"""Packages of a loop that may not be installed."""
REMARKS = {
    "plain loop, bf16 autocast, torch.compile": "compiling is not timed; the probe compiles once more",
    "SFTTrainer, packing": '`packing_strategy="wrapped"`; the batch divides the epoch',
    "torchrun, DDP": "two gloo processes on one core",
    "torchrun, FSDP2": "two gloo processes on one core",
    "Muon and AdamW": "one scale for both rates",
    "steered from 30 % on": "plain up to there, saved and loaded; `sequences_done`",
}


# What is refused -----------------------------------------------------------------------------------------------------


def _said(model: nn.Module) -> str:
    """Return how steering refuses a model."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    try:
        Steering(model, optimizer, SteeringSettings(sequences=100, batch_size=BATCH, policy=keep))
    except ValueError as error:
        return str(error)
    raise AssertionError("it was not refused")


def deepspeed(work: Work) -> str:
    """Refuse DeepSpeed's engine; a class of its name stands in for it, as DeepSpeed is not needed for that."""
    engine: Any = type("DeepSpeedEngine", (nn.Linear,), {"__module__": "deepspeed.runtime.engine"})
    return _said(engine(2, 2))


def packing(work: Work) -> str:
    """Refuse batches that lay all sequences into one row."""
    from transformers import TrainingArguments

    from trainpilot.agents.integrations.huggingface import SteeredTrainer

    class Flattened:
        def __call__(self, rows: list[Batch]) -> Batch:
            whole = torch.cat([row["input_ids"] for row in rows])[None]
            return {"input_ids": whole, "labels": whole, "position_ids": torch.arange(LENGTH).repeat(len(rows))[None]}

    arguments = TrainingArguments(**_arguments(work))
    trainer = SteeredTrainer(
        work.model, arguments, train_dataset=work.data(), data_collator=Flattened(), steering=_steering(work)
    )
    try:
        trainer.train()
    except ValueError as error:
        return str(error)
    raise AssertionError("it was not refused")


def fsdp1(work: Work) -> str:
    """Refuse FSDP1."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    return _said(FullyShardedDataParallel(work.model, device_id=torch.device("cpu")))


def tensor_parallel(work: Work) -> str:
    """Refuse tensor parallelism."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan = {"model.layers.*.mlp.up_proj": ColwiseParallel(), "model.layers.*.mlp.down_proj": RowwiseParallel()}
    return _said(parallelize_module(work.model, init_device_mesh("cpu", (dist.get_world_size(),)), plan))


REFUSED: dict[str, Callable[[Work], str]] = {
    "DeepSpeed": deepspeed,
    "FSDP1": fsdp1,
    "tensor parallelism": tensor_parallel,
    "padding-free batches": packing,
}
