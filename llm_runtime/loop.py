"""Bring controls into force on a model and an optimiser that belong to somebody else, and read them back.

Copy the state of an optimiser, whatever it is made of.

Collect what somebody else's loop tells, step by step, and make the telemetry of an interval of it.

Keep a copy of somebody else's run to go back to, and go back to it.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.utils.hooks import RemovableHandle

from trainpilot.llm_runtime import optimizer as adam
from trainpilot.llm_runtime import precision as number_format
from trainpilot.llm_runtime.config import PRECISIONS, Controls, Precision
from trainpilot.llm_runtime.energy.meter import EnergyMeter, EnergyReading
from trainpilot.llm_runtime.interval import Interval, StepRecord, memory_share
from trainpilot.llm_runtime.masks import WeightMasks
from trainpilot.llm_runtime.precision import synchronise
from trainpilot.llm_runtime.probe import ProbeResult, probe_curvature
from trainpilot.llm_runtime.process_group import Ranks, Share
from trainpilot.llm_runtime.schedules import BudgetProgress, cubic_sparsity, probe_due, sequences_probed
from trainpilot.llm_runtime.telemetry import Snapshot, Telemetry
from trainpilot.llm_runtime.timing import Stopwatch


def copied(state: Any) -> Any:
    """Return a deep copy. `copy.deepcopy` fails with 8-bit states that are tensors made of tensors (torchao)."""
    if isinstance(state, Mapping):
        return {name: copied(value) for name, value in state.items()}
    if isinstance(state, list):
        return [copied(value) for value in state]
    if not isinstance(state, Tensor):
        return copy.deepcopy(state)
    try:
        return state.detach().clone()
    except NotImplementedError:
        parts, context = state.__tensor_flatten__()  # type: ignore[attr-defined]
        inner = {name: copied(getattr(state, name)) for name in parts}
        return type(state).__tensor_unflatten__(inner, context, state.size(), state.stride())  # type: ignore[attr-defined]


MaskPruning = Literal["none", "magnitude", "evolution"]
_CLAIMED = "_trainpilot_steered"


class Levers:
    """Learning rate, batch, precision and weight masks of one model and its optimiser.

    The parameter groups keep the ratios that their learning rates had at the beginning. The batch itself is the
    loop's: here only Adam's decay follows it, so that the change alone does not move the run.

    Args:
        model: What is trained.
        optimizer: Steps it.
        start: Controls at the beginning.
        pruning: What raising the sparsity does.

    Raises:
        ValueError: the optimiser is steered already, has no parameters, steps others than the model's, or none at a
            rate above 0.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, start: Controls, pruning: MaskPruning = "none") -> None:
        owner = getattr(optimizer, _CLAIMED, None)
        if owner is not None and owner() is not None:
            raise ValueError(
                "optimizer must be steered by one controller, this one has one already; "
                "call close() on the other, or drop one of the two"
            )
        self.model = model
        self.optimizer = optimizer
        self.controls = start
        self.device = _device(model, optimizer)
        self.masks = None if pruning == "none" else WeightMasks(model, pruning)
        self.peak = max(_first_rate(group) for group in optimizer.param_groups)
        if self.peak <= 0:
            raise ValueError(
                "optimizer must have a learning rate above 0, the peak of the base schedule, got 0 in every "
                "parameter group; make it without a warm-up of its own"
            )
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._stepped = [p for p in model.parameters() if id(p) in stepped]
        self._start_batch = start.batch_size
        self._ratios = [_first_rate(group) / self.peak for group in optimizer.param_groups]
        self.alone = True
        """Whether nobody else may write the learning rate; an adapter whose scheduler asks us turns it off."""
        self.switches_matmul = False
        """Whether float32 and tf32 are told apart, by a setting of the whole process."""
        self._set: list[float] = []
        self._output_precision: str = start.precision
        self._hook: RemovableHandle | None = None
        self._matmul_precision = torch.get_float32_matmul_precision()

    @property
    def changes_batch(self) -> bool:
        """Whether the batch may change: what that does to other optimisers than Adam is not known."""
        return isinstance(self.optimizer, Adam)

    @property
    def sharded(self) -> bool:
        """Whether each process holds only its part of the weights."""
        return any(hasattr(p, "full_tensor") for p in self.parameters())

    @property
    def beta1(self) -> float:
        """Adam's first-moment decay."""
        return float(self.optimizer.param_groups[0].get("betas", (0.9,))[0])

    def apply(self, controls: Controls) -> None:
        """Bring batch and precision into force; learning rate and masks follow step by step."""
        before, self.controls = self.controls, controls
        if controls.batch_size != before.batch_size:
            adam.change_batch(self.optimizer, controls.batch_size / before.batch_size)

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the learning rate, that of the group with the highest; the others keep their ratio to it.

        Raises:
            ValueError: somebody else has written the learning rate since it was last set here.
        """
        now = [float(group["lr"]) for group in self.optimizer.param_groups]
        if len(now) != len(self._ratios):
            raise ValueError(
                f"optimizer must keep its {len(self._ratios)} parameter groups, got {len(now)}; add parameters before "
                "it is steered"
            )
        if self.alone and self._set and now != self._set:
            raise ValueError(
                f"learning rate was set to {self._set[0]:.4g} and is now {now[0]:.4g}: something else writes it too; "
                "remove the other learning-rate scheduler, as steering has the base schedule in it"
            )
        for group, ratio in zip(self.optimizer.param_groups, self._ratios, strict=True):
            _write_rate(group, float(learning_rate) * ratio)
        self._set = [float(group["lr"]) for group in self.optimizer.param_groups]

    def learning_rate(self) -> float:
        """Return the learning rate in force, read from the optimiser: the highest of its groups."""
        return max(float(group["lr"]) for group in self.optimizer.param_groups)

    def autocast(self, precision: Precision | None = None) -> AbstractContextManager[object]:
        """Return the context in which forward passes run in `precision`, by default the controls'.

        Unless tf32 is offered, float32 is whatever the user's own setting of matrix products makes of it.
        """
        wanted = precision or self.controls.precision
        if wanted == "fp32" and not self.switches_matmul:
            return torch.autocast(self.device.type, enabled=False)
        return number_format.autocast(wanted, self.device)

    def precision(self) -> str:
        """Return the number format of the last matrix product in training, read from its output."""
        return self._output_precision

    def prune_towards(self, start: float, end: float, progress: float) -> None:
        """Raise the masks to the cubic schedule's sparsity at `progress` of an interval that goes from start to end."""
        if self.masks is not None and end > start:
            self.masks.prune_to(cubic_sparsity(start, end, progress))

    def after_step(self) -> None:
        """Hold masked weights at zero; call it after every optimiser step."""
        if self.masks is not None:
            self.masks.apply()
            self.masks.observe()

    def sparsity(self) -> float:
        """Return the share of prunable weights that are zero, counted in the model."""
        return 0.0 if self.masks is None else self.masks.sparsity()

    def parameters(self) -> list[nn.Parameter]:
        """Return what the optimiser steps, in the model's order."""
        return [p for p in self._stepped if p.requires_grad]

    def state_dict(self) -> dict[str, Any]:
        """Return what neither the model's state nor the optimiser's holds."""
        return {
            "masks": None if self.masks is None else self.masks.state_dict(),
            "peak": self.peak,
            "ratios": list(self._ratios),
            "set": list(self._set),
            "output_precision": self._output_precision,
        }

    def load_state_dict(self, state: dict[str, Any], controls: Controls) -> None:
        """Go back to what `state_dict` returned, under the controls that were in force then."""
        if self.masks is not None:
            self.masks.load_state_dict(copy.deepcopy(state["masks"]))
        self.controls = controls
        self.peak, self._ratios, self._set = state["peak"], list(state["ratios"]), list(state["set"])
        self._output_precision = state["output_precision"]

    def snapshot(self) -> Snapshot:
        """Return a copy of what training changes: weights that are stepped, buffers, optimiser and masks."""
        return {
            "tensors": [tensor.detach().clone() for tensor in self._moving()],
            "optimizer": copied(self.optimizer.state_dict()),
            "levers": copy.deepcopy(self.state_dict()),
        }

    def _moving(self) -> list[torch.Tensor]:
        weights = self.parameters() if self.masks is None else list(self.model.parameters())
        return [*weights, *self.model.buffers()]

    def restore(self, snapshot: Snapshot, controls: Controls) -> None:
        """Go back to a snapshot, under the controls that were in force then."""
        with torch.no_grad():
            for tensor, before in zip(self._moving(), snapshot["tensors"], strict=True):
                tensor.copy_(before)
        self.optimizer.load_state_dict(copied(snapshot["optimizer"]))
        self.load_state_dict(snapshot["levers"], controls)

    def claim(self) -> None:
        """Keep other controllers from the optimiser, and see the model's number format, until `release`."""
        setattr(self.optimizer, _CLAIMED, weakref.ref(self))
        first = next((m for m in self.model.modules() if isinstance(m, nn.Linear)), None)
        if first is not None:
            self._hook = first.register_forward_hook(_Watcher(self))

    def release(self) -> None:
        """Give model and optimiser back: the batch's decay and the peak learning rate as they were at the start."""
        setattr(self.optimizer, _CLAIMED, None)
        self.apply(replace(self.controls, batch_size=self._start_batch))
        for group, ratio in zip(self.optimizer.param_groups, self._ratios, strict=False):  # some may have been added
            _write_rate(group, self.peak * ratio)
        if self.switches_matmul:
            torch.set_float32_matmul_precision(self._matmul_precision)
        if self._hook is not None:
            self._hook.remove()

    def remember(self, dtype: torch.dtype) -> None:
        """Keep the number format of a matrix product's output."""
        self._output_precision = number_format.name_of(dtype, self.device)


def offered(precisions: tuple[Precision, ...], device: torch.device) -> dict[Precision, str]:
    """Return the precisions that are not offered, each with the reason, where the user lists those that are."""
    reasons = number_format.lacking(device)
    reasons.setdefault("fp16", "needs a loss scaler, which is the loop's")
    for name in PRECISIONS:
        if name not in precisions:
            reasons.setdefault(name, "not among the precisions that were offered")
    return reasons


def _first_rate(group: dict[str, Any]) -> float:
    """Return the peak of a group's learning rate: a scheduler that has warm-up leaves it in `initial_lr`."""
    return float(group.get("initial_lr", group["lr"]))


def _write_rate(group: dict[str, Any], learning_rate: float) -> None:
    """Write the learning rate of a parameter group; some optimisers keep it in a tensor, which must stay the same."""
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(learning_rate)
    else:
        group["lr"] = learning_rate


def _device(model: nn.Module, optimizer: Optimizer) -> torch.device:
    stepped = [p for group in optimizer.param_groups for p in group["params"]]
    if not stepped:
        raise ValueError("optimizer must have parameters, got none; make it from model.parameters()")
    mine = {id(p) for p in model.parameters()}
    if strange := sum(id(p) not in mine for p in stepped):
        raise ValueError(
            f"optimizer must step parameters of the model, got {strange} of {len(stepped)} that are not; "
            "make it from model.parameters(), after anything that replaces them (PEFT, .to, fully_shard)"
        )
    device: torch.device = stepped[0].device
    return device


class _Watcher:
    """Has the model's first matrix product tell its output's number format.

    A model may be copied or pickled with it, and is then not watched.
    """

    def __init__(self, levers: Levers) -> None:
        self._levers: weakref.ref[Levers] | None = weakref.ref(levers)

    def __call__(self, module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
        levers = self._levers() if self._levers is not None else None
        if levers is not None and module.training:
            levers.remember(output.dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {"_levers": None}


class Readings:
    """The meters of a steered loop.

    The probe takes the update of the last step but one of an interval, and the beginning of the first micro-batch of
    its last step, before that is trained on: fresh text, without taking any from the loop.

    Args:
        levers: Model and optimiser.
        meter: Energy meter.
        clock: Returns seconds.
        ranks: The processes that train together.
        sequences: Budget of the run.
        sequence_length: Tokens of a sequence.
        gradient_clip: Largest norm of a gradient, or None for no limit.
        probe: Whether to probe the curvature.
    """

    def __init__(
        self,
        levers: Levers,
        meter: EnergyMeter,
        clock: Callable[[], float],
        ranks: Ranks,
        *,
        sequences: int,
        sequence_length: int,
        gradient_clip: float | None,
        probe: bool,
    ) -> None:
        self.levers, self.ranks = levers, ranks
        self.sequences, self.sequence_length = sequences, sequence_length
        self.gradient_clip, self.probing = gradient_clip, probe
        self.watch = Stopwatch(clock, meter)
        self.start_sequences = 0
        self.start_sparsity = 0.0
        self.mask_updates = 0
        self.switch_s = 0.0
        self.evaluation_s = 0.0
        self.probe_wanted = False
        self.probe_sequences = 1
        """Sequences that a probe is to look at, in this process."""
        self.micro_batches = 1
        self._taken = 0
        self._decision = 0
        self._before: list[tuple[nn.Parameter, torch.Tensor]] = []
        self._losses: list[tuple[torch.Tensor, float]] = []
        self._interval: Interval | None = None
        self._begun: tuple[float, EnergyReading] | None = None

    def clock(self) -> float:
        """Return the seconds of the run, without its pauses."""
        return self.watch.seconds()

    def pause(self) -> None:
        """Stop clock and meter: what comes now is no cost of the interval. Once is enough."""
        self.watch.pause()

    def go_on(self) -> None:
        """Let clock and meter go on; nothing happens where they do."""
        self.evaluation_s += self.watch.go_on()

    def begin_interval(self, sequences: int) -> None:
        """Forget the interval before; `sequences` have been trained on so far."""
        synchronise(self.levers.device)
        self.start_sequences, self._taken = sequences, 0
        self.start_sparsity, self.mask_updates, self.switch_s = self.levers.sparsity(), 0, 0.0
        self._interval = None
        self._begun = self.watch.read() if sequences else None  # what comes before a run is not its own

    def begin_anew(self, sequences: int, decision: int) -> None:
        """Begin the interval of a decision again, in the midst of it."""
        self.begin_interval(sequences)
        self._decision, self._before, self._begun = decision, [], None

    def begin_step(self, batch_size: int, *, last: bool) -> None:
        """Get ready for a step of so many sequences; the `last` of an interval may begin with a probe."""
        if self._interval is None:
            start, reading = self._begun or self.watch.read()
            controls = self.levers.controls
            self._interval = Interval(controls, start, reading, self.start_sequences, self.start_sparsity)
        self._losses = []
        self.probe_wanted = bool(last and self._before and self._interval.probe is None)
        if self.probe_wanted:
            self.probe_sequences = -(-int(sequences_probed(self._taken + batch_size)) // self.ranks.world_size)

    def keep_weights(self, *, next_is_last: bool) -> None:
        """Keep the weights where the next step may begin with a probe: what this step changes is the update."""
        if not self.probe_wanted:
            due = probe_due(self._decision, self.start_sequences / self.sequences)
            wanted = next_is_last and self.probing and bool(due)
            self._before = [(p, p.detach().clone()) for p in self.levers.parameters()] if wanted else []

    def note_loss(self, loss: torch.Tensor, share: float) -> None:
        """Take in the mean loss of a micro-batch and its share of the step."""
        self._losses.append((loss.detach().float(), share))
        self.micro_batches = len(self._losses)

    def probe(self, loss: Callable[[], torch.Tensor]) -> None:
        """Measure slope and curvature along the last update on what `loss` looks at."""
        interval = self._open()
        synchronise(self.levers.device)
        start = self.clock()
        updates = [(parameter, parameter.detach() - before) for parameter, before in self._before]
        self._before, self.probe_wanted = [], False
        with looking(self.levers.model), self.levers.autocast("fp32"):
            try:
                found = probe_curvature(updates, lambda: self._looked_at(loss))
                interval.probe = found if found.finite else None
            except torch.OutOfMemoryError:  # then the run goes without, but the others would wait for this one
                if self.ranks.world_size > 1:
                    raise
        interval.probe_s = self.clock() - start

    def _looked_at(self, loss: Callable[[], torch.Tensor]) -> torch.Tensor:
        device = self.levers.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):  # the same noise three times
            value = loss().detach().float()
        self.ranks.settle(self.levers.model)
        return value

    def end_step(self, gradient_norm: torch.Tensor, sequences: int) -> None:
        """Take in a step that has been made."""
        interval = self._open()
        if not self._losses:
            raise ValueError("a step must tell its loss; call note_loss, or step.backward, for every micro-batch")
        loss = torch.stack([value * share for value, share in self._losses]).sum()
        record = StepRecord(loss, self.ranks.whole(gradient_norm.detach()))
        interval.note_step(record, self.levers.optimizer)
        self._taken += sequences
        self._losses = []

    def drop_step(self) -> None:
        """Forget a step that was not made."""
        self._losses, self._before, self.probe_wanted = [], [], False

    def telemetry(self, *, decision: int, tokens: int, finished: bool, finishing: bool, budget_used: float,
                  validation_loss: float | None) -> Telemetry:  # fmt: skip
        """Return what the interval measured."""
        interval, levers = self._open(), self.levers
        self._decision = decision + 1
        interval.note_moment(levers.optimizer)
        interval.switch_s = self.switch_s
        cost = self._cost(interval)
        batch_size = self._taken / len(interval.steps)
        clip = self.gradient_clip
        learned = interval.losses_and_gradients(
            batch_size, gradient_clip=float("inf") if clip is None else clip, beta1=levers.beta1
        )
        evaluation_s, self.evaluation_s = self.evaluation_s, 0.0
        return Telemetry(
            **learned,
            **cost,
            decision=decision,
            budget_used=budget_used,
            tokens=tokens,
            interval_tokens=self._taken * self.sequence_length,
            steps=len(interval.steps),
            epochs_seen=0.0,
            validation_loss=validation_loss,
            requested=interval.controls,
            learning_rate=levers.learning_rate(),
            batch_size=batch_size,
            micro_batch_size=max(1, round(batch_size / self.ranks.world_size / self.micro_batches)),
            precision=levers.precision(),
            sparsity=levers.sparsity(),
            finishing=finishing,
            finished=finished,
            evaluation_time_s=evaluation_s,
            memory_share=memory_share(levers.device),
        )

    def _cost(self, interval: Interval) -> dict[str, Any]:
        """Return what the interval cost; of several processes, in all, whose mean losses and probe it has then."""
        synchronise(self.levers.device)
        cost = interval.cost(*self.watch.read())
        if self.ranks.world_size == 1:
            return cost
        losses = torch.stack([step.loss for step in interval.steps]).tolist()
        mine = Share(losses=losses, probe=interval.probe, time_s=cost["time_s"], energy_j=cost["energy_j"])
        share = self.ranks.together(mine, self.watch.meter)
        means = torch.tensor(share.losses, device=self.levers.device)
        interval.steps = [StepRecord(loss, s.gradient_norm) for loss, s in zip(means, interval.steps, strict=True)]
        interval.probe = share.probe
        known = share.energy_j is not None and share.time_s > 0
        power_w = share.energy_j / share.time_s if known else None  # type: ignore[operator]
        return cost | {"time_s": share.time_s, "energy_j": share.energy_j, "power_w": power_w}

    def _open(self) -> Interval:
        if self._interval is None:
            raise ValueError("a step must be begun before it ends; call begin_step, or use `with steering.step()`")
        return self._interval

    def let_go(self) -> None:
        """Drop the copy of the weights."""
        self._before = []

    def state_dict(self) -> dict[str, Any]:
        """Return what has been collected of the interval so far."""
        names = ("start_sequences", "start_sparsity", "mask_updates", "switch_s", "evaluation_s", "micro_batches")
        state: dict[str, Any] = {name: getattr(self, name) for name in names}
        state |= {"taken": self._taken, "decision": self._decision, "before": [b.clone() for _, b in self._before]}
        state["evaluation_s"] += self.watch.paused_s()
        now = self.watch.read()
        state["begun"] = None if self._begun is None else _since(self._begun, now)
        if (interval := self._interval) is not None:
            state["interval"] = {
                "losses": [float(step.loss) for step in interval.steps],
                "norms": [float(step.gradient_norm) for step in interval.steps],
                "moments": [float(norm) for norm in interval.moment_norms],
                "since": _since((interval.start_s, interval.reading), now),
                "probe": None if interval.probe is None else vars(interval.probe),
                "probe_s": interval.probe_s,
            }
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on in the midst of the interval; seconds and joules up to here are kept, the pause is left out."""
        for name in ("start_sequences", "start_sparsity", "mask_updates", "switch_s", "evaluation_s", "micro_batches"):
            setattr(self, name, state[name])
        device = self.levers.device
        self._taken, self._decision = state["taken"], state["decision"]
        before = [tensor.clone().to(device) for tensor in state["before"]]
        self._before = list(zip(self.levers.parameters(), before, strict=True)) if before else []
        self._interval, self._losses, self.probe_wanted = None, [], False
        now = self.watch.read()
        self._begun = None if state["begun"] is None else _before(state["begun"], now)
        if (kept := state.get("interval")) is None:
            return
        start, begun = _before(kept["since"], now)
        self._interval = Interval(self.levers.controls, start, begun, self.start_sequences, self.start_sparsity)
        pairs = zip(kept["losses"], kept["norms"], strict=True)
        self._interval.steps = [
            StepRecord(torch.tensor(a, device=device), torch.tensor(b, device=device)) for a, b in pairs
        ]
        self._interval.moment_norms = [torch.tensor(norm, device=device) for norm in kept["moments"]]
        self._interval.probe = None if kept["probe"] is None else ProbeResult(**kept["probe"])
        self._interval.probe_s = kept["probe_s"]


@contextmanager
def looking(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and each of its modules back into its own."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


Moment = tuple[float, EnergyReading]


def _since(then: Moment, now: Moment) -> tuple[float, float | None]:
    """Return the seconds and joules between two moments."""
    one, other = then[1].energy_j, now[1].energy_j
    return now[0] - then[0], None if one is None or other is None else other - one


def _before(since: tuple[float, float | None], now: Moment) -> Moment:
    """Return the moment so many seconds and joules ago."""
    time_s, energy_j = since
    known = energy_j is not None and now[1].energy_j is not None
    return now[0] - time_s, replace(now[1], energy_j=now[1].energy_j - energy_j if known else None)  # type: ignore[operator]


class Stateful(Protocol):
    """Anything that can say where it stands, and go back there: a data loader, a sampler."""

    def state_dict(self) -> Mapping[str, Any]:
        """Return where it stands."""

    def load_state_dict(self, state: Mapping[str, Any]) -> Any:
        """Go back there."""


class Snapshots:
    """One copy of a run: what training changes, where it stands, and where its data and random numbers do.

    Args:
        levers: Model and optimiser.
        progress: Where the run stands.
        data: The data's position; without it the data go on after a rollback.
    """

    def __init__(self, levers: Levers, progress: BudgetProgress, data: Stateful | None) -> None:
        self._levers, self._progress, self._data = levers, progress, data
        self._kept: dict[str, Any] | None = None
        self.spoilt: list[int] = []
        """Intervals that were taken back."""

    @property
    def there(self) -> bool:
        """Whether there is something to go back to."""
        return self._kept is not None

    def take(self) -> None:
        """Copy the run."""
        self._kept = None  # or there would be two of them at once
        kept = {"levers": self._levers.snapshot(), "controls": self._levers.controls}
        kept["course"] = self._progress.state_dict()
        if self._data is not None:
            device = self._levers.device
            cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
            kept |= {"data": self._data.state_dict(), "random": (torch.get_rng_state(), cuda)}
        self._kept = kept

    def go_back(self) -> None:
        """Put the run back to where it was copied.

        Where the same interval went wrong before, the data are to blame, and go on.
        """
        assert self._kept is not None, "guardrails only ask for it after a snapshot"
        kept, here = self._kept, self._progress.decision
        self._levers.restore(kept["levers"], kept["controls"])
        progress = kept["course"]
        if self._data is not None and here not in self.spoilt:
            self._data.load_state_dict(kept["data"])
            self._restore_random(*kept["random"])
        else:
            progress = {**self._progress.state_dict(), "cooldown": progress["cooldown"]}
        self._progress.load_state_dict(progress)
        self.spoilt.append(here)

    def _restore_random(self, cpu: torch.Tensor, cuda: torch.Tensor | None) -> None:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, self._levers.device)

    def drop(self) -> None:
        """Let go of the copy."""
        self._kept = None
