"""Train a real model interval by interval, under controls that may change at every border, and measure it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trainpilot.llm_runtime import optimizer as adam
from trainpilot.llm_runtime.batches import BatchStream, fixed_batch
from trainpilot.llm_runtime.controls import ControlLimits, Controls, Precision
from trainpilot.llm_runtime.corpus import Corpus, load_corpus
from trainpilot.llm_runtime.energy import EnergyMeter, select_meter
from trainpilot.llm_runtime.interval import Interval
from trainpilot.llm_runtime.measure import memory_share
from trainpilot.llm_runtime.models import LoadedModel, context_length, load_model
from trainpilot.llm_runtime.plant import Snapshot
from trainpilot.llm_runtime.precision import lacking, masked_precisions, synchronise
from trainpilot.llm_runtime.probe_plan import probe_due, sequences_probed
from trainpilot.llm_runtime.random_state import RandomState
from trainpilot.llm_runtime.run_config import RunConfig
from trainpilot.llm_runtime.schedules import Cooldown
from trainpilot.llm_runtime.telemetry import Telemetry
from trainpilot.llm_runtime.trainer import Trainer
from trainpilot.llm_runtime.tuning_free import averaged_weights

TokenArray = NDArray[np.unsignedinteger[Any]]

EVALUATION_SHARE = 0.02
"""An evaluation takes this share of the budget in tokens, within the two bounds below."""
MIN_EVALUATION_TOKENS, MAX_EVALUATION_TOKENS = 8_192, 262_144
MASK_UPDATES = 5
"""Masks are raised this often along an interval."""
BATCH_RANGE = 16
"""The batch stays within this factor of the starting batch, and leaves at least four steps in an interval."""


class LiveRun:
    """One real training run. It is a `Plant`: the environment, the controller and the simulator share its methods.

    Args:
        config: What is trained, on what, and how it starts.
        meter: Energy meter; by default the best one that the device has.
        clock: Returns seconds; replaced in tests.
        probe: Whether to probe the curvature now and then (`probe_plan`).

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
    ) -> None:
        self.config = config
        self.device = resolve_device(config.device)
        self.clock = clock
        self.probing = probe and config.optimizer == "adamw"  # only its buffers tell the last update
        self.random_state = RandomState(self.device, config.seed)
        with self.random_state.apart():
            self.loaded: LoadedModel = load_model(config.model, config.seed)
        _check_context(self.loaded, config)
        self.corpus: Corpus = load_corpus(config.text, self.loaded.tokenizer)
        self.stream = BatchStream(self.corpus.train, config.sequence_length, config.seed)
        self.trainer = Trainer(self.loaded.model, config, self.device)
        self.meter = meter if meter is not None else select_meter(str(self.device))
        self.schedule = config.base_schedule()
        self.cooldown: Cooldown | None = None
        self.sequences = 0
        self.decision = 0
        self.target_share = 0.0
        self.sequences_probed = 0
        """Sequences that the curvature probe of the last interval looked at; 0 where there was none."""
        self.validation_loss: float | None = None
        self._evaluation_s = 0.0

    @property
    def tokens(self) -> int:
        """Tokens trained on."""
        return self.sequences * self.config.sequence_length

    @property
    def end_sequences(self) -> int:
        """Sequences at which the run ends: the budget, or the end of the cool-down."""
        if self.cooldown is None:
            return self.config.n_sequences()
        return -(-self.cooldown.end_tokens // self.config.sequence_length)

    @property
    def finished(self) -> bool:
        """Whether the budget is used up or the cool-down complete."""
        return self.sequences >= self.end_sequences

    @property
    def evaluation_sequences(self) -> int:
        """Sequences that one evaluation looks at."""
        wanted = min(max(EVALUATION_SHARE * self.config.tokens, MIN_EVALUATION_TOKENS), MAX_EVALUATION_TOKENS)
        return max(1, int(wanted) // self.config.sequence_length)

    def limits(self) -> ControlLimits:
        """Return what may be asked of this run; the first call measures which precisions pay (cached per device)."""
        return replace(self.base_limits(), masked_precisions=self._masked_precisions())

    def base_limits(self) -> ControlLimits:
        """Return the same without measuring: no precision is masked but what the device lacks."""
        config = self.config
        per_interval = config.n_sequences() // config.decisions
        span = BATCH_RANGE if config.optimizer == "adamw" else 1  # only AdamW can take another batch
        return ControlLimits(
            start=config.start(),
            min_batch_size=max(1, config.batch_size // span),
            max_batch_size=max(config.batch_size, min(config.batch_size * span, per_interval // 4)),
            masked_precisions=lacking(self.device),
            pruning=config.pruning,
            decisions=config.decisions,
        )

    def advance(self, controls: Controls, share: float) -> Telemetry:
        """Train on `share` of the budget under `controls`, at least one step, and return what was measured.

        Raises:
            ValueError: the run has finished, or a control cannot be used.
        """
        if self.finished:
            raise ValueError("advance needs a run that has not finished; make a new LiveRun or restore a snapshot")
        interval = self._begin(controls)
        self.target_share += share
        target = min(round(self.target_share * self.config.n_sequences()), self.end_sequences)
        span = max(target - self.sequences, 1)
        with self.random_state.in_force():
            while self.sequences < target or not interval.steps:
                self._prune(interval, (self.sequences - interval.start_sequences) / span)
                self._step(interval)
        self._prune(interval, 1.0)
        self._probe(interval)
        return self._end(interval)

    def _begin(self, controls: Controls) -> Interval:
        synchronise(self.device)
        reading = self.meter.read()
        start = self.clock()
        interval = Interval(controls, start, reading, self.sequences, self.trainer.sparsity())
        self.trainer.apply(controls)
        if controls.finish and self.cooldown is None:
            step_tokens = controls.batch_size * self.config.sequence_length
            self.cooldown = Cooldown.begin(self.schedule, self.tokens, step_tokens)
        interval.switch_s = self.clock() - start
        return interval

    def _step(self, interval: Interval) -> None:
        batch_size = min(self.trainer.batch_size, self.end_sequences - self.sequences)
        learning_rate = self.learning_rate(interval.controls)
        interval.note_step(self.trainer.step(self.stream.take(batch_size), learning_rate), self.trainer.optimizer)
        self.sequences += batch_size

    def learning_rate(self, controls: Controls) -> float:
        """Return the learning rate of the next step: base schedule x scale x the batch's neutral factor."""
        step_tokens = controls.batch_size * self.config.sequence_length
        if self.cooldown is not None:
            factor = self.cooldown.factor(self.tokens)
        else:
            factor = self.schedule.factor(self.tokens, step_tokens)
        neutral = adam.neutral_factor(controls.batch_size, self.config.batch_size)
        return self.config.base_learning_rate * controls.learning_rate_scale * factor * neutral

    def _prune(self, interval: Interval, done: float) -> None:
        """Raise the masks when the next of the interval's mask updates is due; `done` is its progress in [0, 1]."""
        due = min(int(done * MASK_UPDATES) + 1, MASK_UPDATES)
        if due > interval.mask_updates:
            interval.mask_updates = due
            start, end = interval.start_sparsity, interval.controls.sparsity
            self.trainer.prune_towards(start, end, due / MASK_UPDATES)

    def _probe(self, interval: Interval) -> None:
        self.sequences_probed = 0
        begun_at = interval.start_sequences / self.config.n_sequences()
        if not self.probing or not probe_due(self.decision, begun_at):
            return
        self.sequences_probed = int(sequences_probed(self.sequences - interval.start_sequences))
        synchronise(self.device)  # or the steps still under way would count as the probe's time
        start = self.clock()
        interval.probe = self.trainer.probe(self.stream.peek(self.sequences_probed))
        interval.probe_s = self.clock() - start

    def _end(self, interval: Interval) -> Telemetry:
        interval.note_moment(self.trainer.optimizer)
        config, trainer = self.config, self.trainer
        taken = self.sequences - interval.start_sequences
        batch_size = taken / len(interval.steps)
        learned = interval.losses_and_gradients(  # waits for the device, so the clock comes after
            batch_size, gradient_clip=config.gradient_clip, beta1=config.beta1
        )
        cost = interval.cost(self.clock(), self.meter.read())
        self.decision += 1
        evaluation_s, self._evaluation_s = self._evaluation_s, 0.0
        return Telemetry(
            **learned,
            **cost,
            decision=self.decision - 1,
            budget_used=self.sequences / config.n_sequences(),
            tokens=self.tokens,
            interval_tokens=taken * config.sequence_length,
            steps=len(interval.steps),
            epochs_seen=self.stream.epochs_seen,
            validation_loss=self.validation_loss,
            requested=interval.controls,
            learning_rate=adam.effective_learning_rate(trainer.optimizer),
            batch_size=batch_size,
            micro_batch_size=min(trainer.micro_batch_size or trainer.batch_size, trainer.batch_size),
            precision=trainer.effective_precision(),
            sparsity=trainer.sparsity(),
            finishing=self.cooldown is not None,
            finished=self.finished,
            evaluation_time_s=evaluation_s,
            memory_share=memory_share(self.device),
        )

    def evaluate(self) -> float:
        """Return the validation loss on fixed windows in float32, in nats/token."""
        self.validation_loss = self._evaluate(self.corpus.validation)
        return self.validation_loss

    def test(self) -> float:
        """Return the loss on the test split, in nats/token. For reports only: no decision may see it."""
        return self._evaluate(self.corpus.test)

    def _evaluate(self, tokens: TokenArray) -> float:
        start = self.clock()
        loss = self.trainer.evaluate(fixed_batch(tokens, self.config.sequence_length, self.evaluation_sequences))
        self._evaluation_s += self.clock() - start
        return loss

    def save(self, folder: Path) -> None:
        """Write the model as `evaluate` sees it (schedule-free's averaged weights), for plain transformers."""
        with averaged_weights(self.trainer.optimizer):
            self.loaded.save(folder)

    def snapshot(self) -> Snapshot:
        """Return a copy of everything that decides how the run goes on; `torch.save` can write it."""
        return {
            "trainer": self.trainer.snapshot(),
            "stream": self.stream.state_dict(),
            "random_state": self.random_state.state_dict(),
            "cooldown": asdict(self.cooldown) if self.cooldown is not None else None,
            "sequences": self.sequences,
            "decision": self.decision,
            "target_share": self.target_share,
            "validation_loss": self.validation_loss,
        }

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a state that `snapshot` returned; on a CPU the run then goes on bit for bit as it did."""
        self.trainer.restore(snapshot["trainer"])
        self.stream.load_state_dict(snapshot["stream"])
        self.random_state.load_state_dict(snapshot["random_state"])
        self.cooldown = Cooldown(**snapshot["cooldown"]) if snapshot["cooldown"] is not None else None
        self.sequences = snapshot["sequences"]
        self.decision = snapshot["decision"]
        self.target_share = snapshot["target_share"]
        self.validation_loss = snapshot["validation_loss"]

    def _masked_precisions(self) -> dict[Precision, str]:
        config = self.config
        batch = self.stream.peek(config.batch_size)
        key = f"{self.loaded.model.config.to_json_string()}|{config.batch_size}|{config.sequence_length}"
        with self.random_state.apart():
            reasons = masked_precisions(self.device, lambda precision: self.trainer.rehearse(batch, precision), key)
        reasons.pop(config.precision, None)
        return reasons


def resolve_device(name: str) -> torch.device:
    """Return the device called `name`; `auto` takes a GPU if there is one. Raises `ValueError` if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device: {name!r} needs an NVIDIA GPU that torch can see, found none; use 'cpu' or 'auto'")
    try:
        return torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be auto, cpu or cuda, got {name!r}") from None


def _check_context(loaded: LoadedModel, config: RunConfig) -> None:
    limit = context_length(loaded.model.config)
    if limit is not None and config.sequence_length > limit:
        raise ValueError(
            f"sequence_length must not exceed the model's context of {limit} tokens, got {config.sequence_length}"
        )
