"""Train a model interval by interval under controls that may change at every border, and measure it.

`LiveRun` is a `Plant`: a `Trainer` with its corpus, its data order and its random numbers. `Trainer` takes the training
steps; it is a `ControlledLoop` whose steps are made here.

Shapes: B sequences, b sequences of a micro-batch, T tokens of a sequence, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from trainpilot.llm_runtime import optimizer as adam
from trainpilot.llm_runtime.budget import Budget
from trainpilot.llm_runtime.clock import trusted_clock
from trainpilot.llm_runtime.config import (
    PRECISIONS,
    ControlLimits,
    Controls,
    Precision,
    RunConfig,
    StepPrice,
    batch_limits,
)
from trainpilot.llm_runtime.data.batches import BatchStream, fixed_batch
from trainpilot.llm_runtime.data.corpus import Corpus, load_corpus
from trainpilot.llm_runtime.distillation import Teacher
from trainpilot.llm_runtime.energy import select_meter
from trainpilot.llm_runtime.energy.meter import EnergyMeter, NoMeter
from trainpilot.llm_runtime.energy.plausible import plausible_meter
from trainpilot.llm_runtime.files import cache_dir, digest
from trainpilot.llm_runtime.importance import channel_activations
from trainpilot.llm_runtime.interval import StepRecord
from trainpilot.llm_runtime.layers import body_parameters
from trainpilot.llm_runtime.loop import ControlledLoop, eval_mode, is_out_of_memory
from trainpilot.llm_runtime.models import LoadedModel, context_length, load_model_of
from trainpilot.llm_runtime.optimizer import averaged_weights
from trainpilot.llm_runtime.plain_values import shown
from trainpilot.llm_runtime.precision import (
    double_device,
    kept_step_seconds,
    lacking,
    masked_precisions,
    measured_on,
    synchronise,
)
from trainpilot.llm_runtime.prices import affordable_rounds, batch_prices
from trainpilot.llm_runtime.probe import ProbeResult
from trainpilot.llm_runtime.process import RandomState
from trainpilot.llm_runtime.progress import BudgetProgress, MeasuredProgress, TokenProgress
from trainpilot.llm_runtime.saved_loop import SavedRun
from trainpilot.llm_runtime.scaling_laws import Advice, step_law
from trainpilot.llm_runtime.schedules import sequences_probed
from trainpilot.llm_runtime.telemetry import Snapshot, Telemetry
from trainpilot.llm_runtime.timing import Cost, alternate


class Trainer(ControlledLoop):
    """Takes training steps of a causal language model under controls.

    Args:
        model: The model; it is moved to the device.
        config: Optimizer, budget and starting controls.
        device: Where the model is trained.
        meter: Energy meter; by default none.
        clock: Returns seconds.

    Raises:
        ValueError: the device lacks the starting precision, the model cannot be pruned as asked, or the budget is in
            joules, and no meter counts them.
    """

    model: PreTrainedModel

    def __init__(
        self,
        model: PreTrainedModel,
        config: RunConfig,
        device: torch.device,
        meter: EnergyMeter | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        model.to(device).train()  # type: ignore[arg-type]
        super().__init__(
            model,
            adam.make_optimizer(model, config),
            progress_of(config),
            config.start(),
            pruning=config.pruning,
            meter=meter or NoMeter("this trainer has no meter"),
            clock=clock,
            gradient_clip=config.gradient_clip,
        )
        self.check_precision(config.precision)
        self.config, self.optimizer_name = config, config.optimizer
        self.scaler = self._new_scaler()
        self.micro_batch_size: int | None = None
        """Sequences that go through the model at once, once memory has run out; until then a whole batch."""
        self.teacher: Teacher | None = None
        """A model whose predictions the gradient is of too; `None` where the text alone is learned."""
        self.attach()

    def _new_scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(self.device.type, enabled=self.controls.precision == "fp16")

    def step(self, sequences: np.ndarray) -> StepRecord:
        """Train on one batch, at the learning rate that is set. Masked weights are left to `end_step`.

        Args:
            sequences: Token ids, int64 of shape (B, T + 1).
        """
        batch = torch.from_numpy(sequences).to(self.device)  # (B, T + 1)
        loss = self._gradient(batch, self.controls.precision)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.gradient_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return StepRecord(loss, norm)

    def _gradient(self, batch: torch.Tensor, precision: Precision) -> torch.Tensor:
        """Add up the batch's gradient in micro-batches, and return its mean loss, a scalar.

        The gradient is of a mixture where there is a teacher; the loss is always the cross-entropy. Where memory runs
        out, the micro-batch is halved and this batch is started again.
        """
        while True:
            micro = min(self.micro_batch_size or len(batch), len(batch))
            total = torch.zeros((), device=self.device)
            try:
                for part in torch.split(batch, micro):  # (b, T + 1)
                    share = len(part) / len(batch)
                    with self.autocast(precision):
                        logits = self._logits(part)
                        loss = _cross_entropy(logits, part)
                        aim = loss if self.teacher is None else self.teacher.mixed(loss, logits, part)
                    torch.autograd.backward(self.scaler.scale(aim * share))
                    total += loss.detach() * share
                return total
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
            self._shrink_micro_batch(micro)  # out here, where no traceback holds the batch's tensors

    def loss(self, sequences: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy of the next token, in nats/token, for sequences of shape (b, T + 1)."""
        return _cross_entropy(self._logits(sequences), sequences)

    def _logits(self, sequences: torch.Tensor) -> torch.Tensor:
        """Return the logits for all but the last token of sequences of shape (b, T + 1), of shape (b, T, V)."""
        logits: torch.Tensor = self.model(input_ids=sequences[:, :-1], use_cache=False).logits
        return logits

    def _shrink_micro_batch(self, micro: int) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if micro == 1:
            raise ValueError(
                "out of memory with a micro-batch of one sequence; lower sequence_length or take a smaller model"
            )
        self.micro_batch_size = micro // 2

    @property
    def micro_batch(self) -> int:
        """Sequences that go through the model at once, no more than a batch."""
        batch_size = int(self.controls.batch_size)
        return min(self.micro_batch_size or batch_size, batch_size)

    def rehearse(self, sequences: np.ndarray, precision: Precision) -> None:
        """Run one forward and backward pass in `precision` and drop its gradient: for timing only."""
        self._gradient(torch.from_numpy(sequences).to(self.device), precision)
        self.optimizer.zero_grad(set_to_none=True)

    def evaluate(self, sequences: np.ndarray) -> float:
        """Return the mean loss over sequences of shape (n, T + 1) in float32, in nats/token."""
        batch = torch.from_numpy(sequences).to(self.device)
        with ExitStack() as stack:
            stack.enter_context(averaged_weights(self.optimizer))
            stack.enter_context(eval_mode(self.model))
            stack.enter_context(torch.no_grad())
            stack.enter_context(self.autocast("fp32"))
            return float(self._mean_loss(batch, self._evaluated_at_once))

    @property
    def _evaluated_at_once(self) -> int:
        """Sequences that an evaluation takes through the model at once.

        Where a budget in seconds or joules pays for it, at least the starting batch: its cost is then known, and low.
        """
        if self.config.budget is None or self.micro_batch_size is not None:
            return self.micro_batch
        return max(self.config.batch_size, self.micro_batch)

    def probe_on(self, sequences: np.ndarray) -> ProbeResult | None:
        """Probe the curvature along the last update on sequences of shape (n, T + 1); `None` if it cannot be done."""
        batch = torch.from_numpy(sequences).to(self.device)
        update = partial(adam.update_direction, self.optimizer)
        return self.curvature(update, lambda: self._mean_loss(batch, self.micro_batch))

    def _mean_loss(self, batch: torch.Tensor, at_once: int) -> torch.Tensor:
        """Return the mean loss of a batch of any size, taken through the model in parts, a scalar."""
        parts = torch.split(batch, at_once)
        exact = double_device(self.device)
        losses = [self.loss(part).to(exact).double() * (len(part) / len(batch)) for part in parts]
        return torch.stack(losses).sum()

    def apply(self, controls: Controls) -> None:
        """Bring batch size, precision and width into force; float16 gets a fresh loss scaler.

        Raises:
            ValueError: a control cannot be used here; nothing has changed then.
        """
        before = self.controls.precision
        super().apply(controls)
        if controls.precision != before:
            self.scaler = self._new_scaler()

    def snapshot(self) -> Snapshot:
        """Return a copy of what training changes."""
        own = {"scaler": self.scaler.state_dict(), "micro_batch_size": self.micro_batch_size}
        return super().snapshot() | own

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a state that `snapshot` returned, bit for bit."""
        self.check_precision(snapshot["precision"])
        super().restore(snapshot)
        self.scaler = self._new_scaler()
        self.scaler.load_state_dict(snapshot["scaler"])
        self.micro_batch_size = snapshot["micro_batch_size"]


def _cross_entropy(logits: torch.Tensor, sequences: torch.Tensor) -> torch.Tensor:
    """Return the mean loss of the next token, a scalar, for logits (b, T, V) of sequences of shape (b, T + 1)."""
    return F.cross_entropy(logits.float().flatten(0, 1), sequences[:, 1:].flatten())


def progress_of(config: RunConfig) -> BudgetProgress:
    """Return the beginning of a run's budget."""
    budget, length = config.measured_budget(), config.sequence_length
    if budget is not None:
        schedule, decisions = config.base_schedule(), config.decisions
        return MeasuredProgress(schedule=schedule, sequence_length=length, decisions=decisions, budget=budget)
    return TokenProgress(
        schedule=config.base_schedule(),
        budget=config.n_sequences(),
        sequence_length=length,
        decisions=config.decisions,
    )


TokenArray = NDArray[np.unsignedinteger[Any]]

EVALUATION_SHARE = 0.02
"""An evaluation takes this share of the run's tokens, within the two bounds below."""
MIN_EVALUATION_TOKENS, MAX_EVALUATION_TOKENS = 8_192, 262_144
IMPORTANCE_TOKENS = 8_192
"""Tokens of validation text, at most, on which the importance of feed-forward channels is measured."""
STEP_VISIT_S = 0.05
"""Seconds for which steps are timed on end before a run under a budget in seconds or joules."""


class LiveRun:
    """One real training run. It is a `Plant`: the environment, the controller and the simulator share its methods.

    Args:
        config: What is trained, on what, and how it starts.
        meter: Energy meter; by default the best one that the device has.
        clock: Returns seconds; replaced in tests.
        probe: Whether to probe the curvature now and then (`schedules.probe_due`).
        counts_pauses: Whether the time between two calls counts too, under a budget in seconds or joules.

    Raises:
        ValueError: the model, the text or a setting cannot be used; the message says what to do.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        meter: EnergyMeter | None = None,
        clock: Callable[[], float] = time.perf_counter,
        probe: bool = True,
        counts_pauses: bool = True,
    ) -> None:
        self.config = config
        self.counts_pauses = counts_pauses
        self.device = resolve_device(config.device)
        self.clock = trusted_clock(clock)
        self.probing = probe and config.optimizer == "adamw"  # the last update is read from AdamW's buffers
        self.random_state = RandomState(self.device, config.seed)
        with self.random_state.apart():
            self.loaded: LoadedModel = load_model_of(config)
            teacher = self._teacher()
        for each in (self.loaded.model, *([teacher.model] if teacher is not None else [])):
            _check_context(each, config)
        self.corpus: Corpus = load_corpus(config.text, self.loaded.tokenizer)
        self.stream = BatchStream(self.corpus.train, config.sequence_length, config.seed)
        self.meter = plausible_meter(meter if meter is not None else select_meter(str(self.device)))
        self.trainer = Trainer(self.loaded.model, config, self.device, self.meter, self.clock)
        self.trainer.teacher = teacher
        if config.pruning_importance == "activation":
            self.trainer.channel_importance = self._channel_importance
        self.progress = self.trainer.progress
        self.target_share = 0.0
        """Share of the budget at which the newest interval ends."""
        self.sequences_probed = 0
        """Sequences that the curvature probe of the last interval took; 0 where there was none."""
        self.validation_loss: float | None = None
        self.tokens = self._expected_tokens()
        """Tokens of the whole run; under a budget in seconds or joules an estimate, from the cost of a first step."""

    def _teacher(self) -> Teacher | None:
        config = self.config
        if config.teacher is None or config.distillation_weight == 0:
            return None
        weight, temperature = config.distillation_weight, config.distillation_temperature
        return Teacher.load(config.teacher, self.loaded, self.device, weight, temperature)

    def _expected_tokens(self) -> int:
        """Return the tokens of the whole run, and begin a budget in seconds or joules with the cost of a step."""
        config, progress = self.config, self.progress
        if not isinstance(progress, MeasuredProgress):
            return config.tokens
        cost = self._step_cost(progress.budget)
        used = cost.time_s if progress.currency == "time_s" else cost.energy_j or cost.time_s
        progress.expect(used, config.batch_size)
        return max(int(progress.budget.amount / used * config.batch_size), 1) * config.sequence_length

    def _step_cost(self, budget: Budget) -> Cost:
        """Return the cost of a forward and backward pass of the starting batch, measured once on a machine."""
        meter = self.meter if budget.currency == "energy_j" else NoMeter("seconds need none")
        label = measured_on(self.device, f"{self._key}|{self.config.precision}|{meter.description}")
        path = cache_dir() / "step_cost" / f"{digest(label, 10)}.json"
        if (kept := Cost.read(path)) is not None and kept.time_s > 0:
            return kept
        batch, precision = self.stream.peek(self.config.batch_size), self.config.precision
        with self.random_state.apart():
            measured = alternate(
                {"step": lambda: self.trainer.rehearse(batch, precision)},
                meter,
                visit_s=max(STEP_VISIT_S, meter.resolution_s),
                limit_s=STEP_VISIT_S,
                wait=partial(synchronise, self.device),
                clock=self.clock,
            )
        cost = measured["step"].cost
        with suppress(OSError):  # a cache that cannot be written only costs time
            cost.write(path)
        return cost

    @property
    def spent(self) -> float | None:
        """Seconds or joules used when they were last read, of a budget in these; `None` for tokens."""
        return self.progress.spent if isinstance(self.progress, MeasuredProgress) else None

    @property
    def finished(self) -> bool:
        """Whether the budget is used up or the cool-down complete."""
        return self.progress.finished

    @property
    def evaluation_sequences(self) -> int:
        """Sequences of one evaluation; no lower bound holds where a budget in seconds or joules pays for it."""
        least = MIN_EVALUATION_TOKENS if self.config.budget is None else 0
        wanted = min(max(EVALUATION_SHARE * self.tokens, least), MAX_EVALUATION_TOKENS)
        return max(1, int(wanted) // self.config.sequence_length)

    def limits(self) -> ControlLimits:
        """Return the limits of the controls, and the price list of the start; the first call measures what pays.

        It is kept for later runs on the same device.
        """
        limits = self.base_limits()
        untimed = {*limits.masked_precisions, self.config.precision}
        timed = tuple(name for name in PRECISIONS if name not in untimed)
        masked = self._masked_precisions()
        return replace(limits, masked_precisions=masked, timed_precisions=timed, prices=self._prices(limits))

    def base_limits(self) -> ControlLimits:
        """Return the limits without measuring: only precisions that the device lacks are masked."""
        config, advice = self.config, self.advice()
        sequences = self.tokens // config.sequence_length
        smallest, largest = batch_limits(config.batch_size, sequences // config.decisions)
        if config.optimizer != "adamw":  # only AdamW can take another batch
            smallest = largest = config.batch_size
        return ControlLimits(
            start=config.start(),
            min_batch_size=smallest,
            max_batch_size=largest,
            masked_precisions=lacking(self.device),
            pruning=config.pruning,
            decisions=config.decisions,
            currency=self.progress.currency,
            learning_rate_over_law=None if advice is None else config.base_learning_rate / advice.learning_rate,
            batch_over_law=None if advice is None else config.batch_size * config.sequence_length / advice.batch_tokens,
        )

    def advice(self) -> Advice | None:
        """Return what a scaling law advises; `None` for a pretrained or bodiless model or an optimizer but AdamW."""
        n_parameters = body_parameters(self.loaded.model)
        if self.loaded.pretrained or self.config.optimizer != "adamw" or not n_parameters:
            return None
        return step_law(n_parameters, self.tokens)

    def advance(self, controls: Controls, share: float) -> Telemetry:
        """Train on `share` of the budget under `controls`, at least one step, and return what was measured.

        Raises:
            ValueError: the run has finished, or a control cannot be used.
        """
        if self.finished:
            raise ValueError("advance needs a run that has not finished; make a new LiveRun or restore a snapshot")
        trainer, progress = self.trainer, self.progress
        trainer.begin_interval(controls, end_share=self.target_share + share)
        self.target_share += share
        first = True
        with self.random_state.in_force():
            while first or not progress.interval_over:
                first = False
                batch_size = trainer.begin_step()
                record = trainer.step(self.stream.take(batch_size))
                trainer.end_step(record.gradient_norm, batch_size, record.loss)
        trainer.raise_masks(1.0)
        self._probe()
        telemetry = trainer.end_interval(
            validation_loss=self.validation_loss,
            epochs_seen=self.stream.epochs_seen,
            micro_batch_size=trainer.micro_batch,
        )
        self._pause()
        return telemetry

    def _pause(self) -> None:
        if not self.counts_pauses:
            self.progress.suspend()

    def _probe(self) -> None:
        """Probe the curvature where that is due, on the sequences that come next in the stream."""
        trainer, self.sequences_probed = self.trainer, 0
        if self.probing and trainer.probe_due():
            self.sequences_probed = int(sequences_probed(trainer.recorder.sequences))
            trainer.record_probe(lambda: trainer.probe_on(self.stream.peek(self.sequences_probed)))

    def evaluate(self) -> float:
        """Return the validation loss on fixed windows in float32, in nats/token."""
        with self.trainer.evaluation():
            self.validation_loss = self._evaluate(self.corpus.validation)
        self._pause()
        return self.validation_loss

    def test(self) -> float:
        """Return the loss on the test split, in nats/token. For reports only: no decision sees it, no budget pays."""
        with self.trainer.evaluation(counts=False):
            return self._evaluate(self.corpus.test)

    def _evaluate(self, tokens: TokenArray) -> float:
        windows = fixed_batch(tokens, self.config.sequence_length, self.evaluation_sequences)
        return self.trainer.evaluate(windows)

    def _channel_importance(self) -> list[torch.Tensor]:
        """Return how much each feed-forward channel does on windows of the validation text."""
        count = min(max(IMPORTANCE_TOKENS // self.config.sequence_length, 1), self.evaluation_sequences)
        windows = fixed_batch(self.corpus.validation, self.config.sequence_length, count)
        sequences = torch.from_numpy(windows[:, :-1]).to(self.device)
        return channel_activations(self.loaded.model, sequences, self.trainer.micro_batch)

    def save(self, folder: Path) -> None:
        """Write the model as `evaluate` sees it (schedule-free's averaged weights), for plain transformers."""
        with averaged_weights(self.trainer.optimizer):
            self.loaded.save(folder)

    def snapshot(self) -> Snapshot:
        """Return a copy of everything that a continued run depends on; `torch.save` can write it."""
        return {
            "trainer": self.trainer.snapshot(),
            "stream": self.stream.state_dict(),
            "random_state": self.random_state.state_dict(),
            **self.progress.state_dict(),
            "target_share": self.target_share,
            "validation_loss": self.validation_loss,
            **self._teacher_digest(),
        }

    def _teacher_digest(self) -> dict[str, str]:
        teacher = self.trainer.teacher
        return {} if teacher is None else {"teacher": teacher.digest}

    def is_finite(self) -> bool:
        """Return whether all weights are finite numbers, so that a run can go on from them."""
        return all(bool(torch.isfinite(weights).all()) for weights in self.loaded.model.parameters())

    def check_snapshot(self, snapshot: Snapshot) -> None:
        """Raise `ValueError` for a snapshot from a file that `restore` cannot go back to, or that is no snapshot."""
        SavedRun.from_json(snapshot)
        self.progress.check_state(snapshot)
        own, theirs = self._teacher_digest().get("teacher"), snapshot.get("teacher")
        if own != theirs:
            raise ValueError(f"teacher must be the one that the run began with, {shown(theirs)}, got {shown(own)}")
        self.trainer.check_snapshot(snapshot["trainer"])
        self.random_state.check_state(snapshot["random_state"])

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a state that `snapshot` returned; on a CPU the run then goes on bit for bit as it did."""
        self.trainer.restore(snapshot["trainer"])
        self.stream.load_state_dict(snapshot["stream"])
        self.random_state.load_state_dict(snapshot["random_state"])
        self.progress.load_state_dict(snapshot)
        self.trainer.recorder.decision = self.progress.decision
        self.target_share = snapshot["target_share"]
        self.validation_loss = snapshot["validation_loss"]

    @property
    def _key(self) -> str:
        """What the seconds of a step depend on, besides the device."""
        config, teacher = self.config, self.trainer.teacher
        key = f"{self.loaded.model.config.to_json_string()}|{config.batch_size}|{config.sequence_length}"
        return key if teacher is None else f"{key}|{teacher.model.config.to_json_string()}"

    def _masked_precisions(self) -> dict[Precision, str]:
        config = self.config
        batch = self.stream.peek(config.batch_size)
        with self.random_state.apart():
            reasons = masked_precisions(self.device, partial(self.trainer.rehearse, batch), self._key)
        reasons.pop(config.precision, None)
        return reasons

    def _prices(self, limits: ControlLimits) -> tuple[StepPrice, ...]:
        """Return the prices of the batches, and those of the other precisions by their ratios to the starting one."""
        config, prices = self.config, self._measured_batches(limits)
        seconds = kept_step_seconds(self.device, self._key)
        if config.precision not in seconds:
            return prices
        now = {each.batch_size: each.time_s for each in prices}.get(config.batch_size, seconds[config.precision])
        return prices + tuple(
            StepPrice(
                batch_size=config.batch_size,
                precision=precision,
                time_s=now * time_s / seconds[config.precision],
                energy_j=None,
            )
            for precision, time_s in seconds.items()
            if precision != config.precision or not prices
        )

    def _measured_batches(self, limits: ControlLimits) -> tuple[StepPrice, ...]:
        """Return the prices at half, the same and double the batch, if the run is long enough to measure them."""
        config, trainer, before = self.config, self.trainer, self.trainer.micro_batch_size
        batches = [config.batch_size // 2, config.batch_size, 2 * config.batch_size]
        if batches[0] < limits.min_batch_size or batches[2] > limits.max_batch_size:
            return ()

        def rehearse(sequences: np.ndarray) -> None:
            trainer.rehearse(sequences, config.precision)
            if trainer.micro_batch_size != before:
                raise ValueError("memory ran out")

        key = measured_on(self.device, f"{self._key}|{config.precision}|{self.meter.description}")
        try:
            with self.random_state.apart():
                return batch_prices(
                    {size: partial(rehearse, self.stream.peek(size)) for size in batches},
                    config.precision,
                    self.meter,
                    rounds=affordable_rounds(batches, self.tokens // config.sequence_length),
                    path=cache_dir() / "prices" / f"{digest(key, 10)}.json",
                    label=key,
                    wait=partial(synchronise, self.device),
                )
        except ValueError:
            return ()
        finally:
            trainer.micro_batch_size = before


def resolve_device(name: str) -> torch.device:
    """Return the device called `name`. Raises `ValueError` if it is not there.

    `auto` is `cuda` where torch sees such a GPU, and otherwise `cpu`: `mps`, Apple's GPU, is taken by name alone.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device: {name!r} needs an NVIDIA GPU that torch can see, found none; use 'cpu' or 'auto'")
    if name == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device: 'mps' needs a Mac with Apple silicon and a torch made for it; use 'cpu' or 'auto'")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"device must be auto, cpu, cuda or mps, got {name!r}")
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= count:
        raise ValueError(f"device: {name!r} is not there, as torch sees {count} of that type; use {device.type!r}")
    return device


def _check_context(model: PreTrainedModel, config: RunConfig) -> None:
    limit = context_length(model.config)
    if limit is not None and config.sequence_length > limit:
        raise ValueError(
            f"sequence_length must not exceed the model's context of {limit} tokens, got {config.sequence_length}"
        )
