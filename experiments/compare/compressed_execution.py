"""One run of a comparison that makes its model smaller on the way, or rounds it to another format at its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from trainpilot.experiments.compare.execution import Evaluation, Execution, finite, make_controller
from trainpilot.experiments.progress import quiet
from trainpilot.experiments.results import Compression, IntervalResult, RunResult, RunSpec, ranking_sequences
from trainpilot.llm_runtime.config import Controls, RunConfig
from trainpilot.llm_runtime.cuts import cut_in_training
from trainpilot.llm_runtime.data.batches import fixed_batch
from trainpilot.llm_runtime.distillation import Teacher
from trainpilot.llm_runtime.drive import DrivenInterval
from trainpilot.llm_runtime.energy.meter import EnergyMeter, energy_between, sum_known
from trainpilot.llm_runtime.export.formats import RoundedModel, rounded_model
from trainpilot.llm_runtime.export.inference import mean_loss
from trainpilot.llm_runtime.live_run import LiveRun
from trainpilot.llm_runtime.optimizer import averaged_weights
from trainpilot.llm_runtime.precision import synchronise
from trainpilot.llm_runtime.telemetry import Telemetry
from trainpilot.llm_runtime.timing import Cost


class CompressedExecution(Execution):
    """A run that cuts its model, or trains a small one under its teaching, or rounds it at its end.

    What that costs besides training counts as switching: to the first interval after a cut, or to the last one.
    """

    def __init__(self, spec: RunSpec, key: str, energy_shared: bool, meter: EnergyMeter | None) -> None:
        assert spec.compression is not None
        self.compression: Compression = spec.compression
        self.pending: Cost | None = None
        """Cost of a cut, for the next interval."""
        super().__init__(spec, key, energy_shared, meter)

    def new_run(self, config: RunConfig) -> LiveRun:
        """Return a run that has not begun; every part of it is evaluated on the windows of the whole budget."""
        run = super().new_run(config)
        run.tokens = self.spec.config.tokens
        return run

    def result(self) -> RunResult:
        """Train to the end, and return what came out."""
        found = super().result()
        rounded = self.compression.format is not None and not found.diverged
        return replace(found, unquantised_validation_loss=self.run.validation_loss) if rounded else found

    def train(self, last: Telemetry | None = None) -> Iterator[DrivenInterval]:
        """Train the model, and after it a new small one where there is to be one, and yield each interval."""
        yield from super().train(last)
        whole = self.run
        if not self.compression.new or self.last is None or self.last.diverged or not finite(whole.validation_loss):
            return
        self.run = self.new_run(self.spec.phases()[1].config)
        self.run.stream.load_state_dict(whole.stream.state_dict())  # it goes on in the text where its teacher ended
        if self.compression.taught:
            self.run.trainer.teacher = Teacher.copy_of(whole.loaded.model)
        self.controller = make_controller(self.spec.steering, self.run)
        self.standing = []
        yield from super().train()

    def decide(self, telemetry: Telemetry | None) -> Controls | None:
        """Cut the model where that is due, and return the controls of the next interval."""
        if len(self.intervals) == self.spec.decisions_before_cut < self.spec.config.decisions:
            self.pending = self._cost_of(self._cut)
        return super().decide(telemetry)

    def _cut(self) -> None:
        """Cut every part to its size, by what does least on the training text that comes next."""
        run, model = self.run, self.run.loaded.model
        if self.compression.taught:
            run.trainer.teacher = Teacher.copy_of(model)
        windows = run.stream.peek(ranking_sequences(run.config))
        cut_in_training(model, run.trainer.optimizer, self.compression.sizes, windows)  # type: ignore[arg-type]

    def losses(self) -> tuple[float | None, float | None]:
        """Return the final validation loss and the test loss, in the format in which the model is used."""
        if self.compression.format is None:
            return super().losses()
        run, found = self.run, list[RoundedModel]()
        with quiet(), averaged_weights(run.trainer.optimizer):
            cost = self._cost_of(lambda: found.append(rounded_model(self.compression.format, run.loaded)))
        self.intervals[-1] = _with_cost(self.intervals[-1], cost)
        model = found[0].model.to(run.device)  # type: ignore[arg-type]
        length, count = run.config.sequence_length, run.evaluation_sequences
        windows = [fixed_batch(tokens, length, count) for tokens in (run.corpus.validation, run.corpus.test)]
        return mean_loss(model, windows[0]), mean_loss(model, windows[1])

    def interval_result(self, telemetry: Telemetry, evaluation: Evaluation | None) -> IntervalResult:
        """Return what is kept of an interval, with the cost of a cut before it."""
        found, cost = super().interval_result(telemetry, evaluation), self.pending
        self.pending = None
        return found if cost is None else _with_cost(found, cost)

    def _cost_of(self, action: Callable[[], object]) -> Cost:
        """Carry something out and return what it cost."""
        run = self.run
        before, start = run.meter.read(), run.clock()
        action()
        synchronise(run.device)
        time_s, after = run.clock() - start, run.meter.read()
        return Cost(time_s=time_s, energy_j=energy_between(before, after)[0])


def _with_cost(interval: IntervalResult, cost: Cost) -> IntervalResult:
    """Return an interval that switching cost more."""
    return replace(
        interval,
        time_s=interval.time_s + cost.time_s,
        switch_time_s=interval.switch_time_s + cost.time_s,
        energy_j=sum_known([interval.energy_j, cost.energy_j]),
    )
