"""Train one run under a policy, resumably, record every decision, and summarise the run against its reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import pairwise
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from trainpilot.agents.bundle import PolicyBundle, policy_digest, policy_path
from trainpilot.agents.controller import Controller, DecisionRecord, keep
from trainpilot.agents.logging.run_log import RunWriter
from trainpilot.agents.steering.advice import AdvisingController
from trainpilot.agents.steering.guarded_controller import GuardedController, RollbackController
from trainpilot.agents.steering.guardrails import UNGUARDED, Guardrails, GuardrailSettings
from trainpilot.envs.decision import Preference
from trainpilot.envs.reference import device_label, live_reference
from trainpilot.envs.reward import Reference, RewardMeter
from trainpilot.experiments import stopping
from trainpilot.experiments.carbon import (
    DEFAULT_GRID_INTENSITY_G_PER_KWH,
    DEFAULT_GRID_INTENSITY_SOURCE,
    device_hours,
    grams_co2e,
)
from trainpilot.experiments.options import ReplayOptions
from trainpilot.experiments.progress import progress_bar
from trainpilot.experiments.run_store import RunFolder, versions
from trainpilot.llm_runtime.busy import BusyWatch
from trainpilot.llm_runtime.config import RunConfig
from trainpilot.llm_runtime.data.text_sources import content_digest
from trainpilot.llm_runtime.drive import DrivenInterval, drive
from trainpilot.llm_runtime.energy.meter import sum_known
from trainpilot.llm_runtime.files import resuming, whole_folder
from trainpilot.llm_runtime.live_run import LiveRun
from trainpilot.llm_runtime.process import use_threads
from trainpilot.llm_runtime.telemetry import Telemetry


def summarise(
    run: LiveRun,
    records: Sequence[DecisionRecord],
    initial_loss: float,
    reference: Reference | None,
    options: ReplayOptions,
) -> dict[str, Any]:
    """Return the run's summary as JSON values; losses are in nats/token."""
    intervals = [record.telemetry for record in records]
    last = intervals[-1]
    test_loss = None if last.diverged else run.test()
    summary: dict[str, Any] = {
        "policy": options.policy,
        "mode": options.mode,
        "preference": str(Preference.parse(options.preference)),
        "model": options.model,
        "pretrained": run.loaded.pretrained,
        "n_parameters": run.loaded.n_parameters,
        **_teacher(run),
        "text": list(options.text),
        "vocabulary": run.corpus.vocabulary,
        "bytes_per_token": run.corpus.bytes_per_token,
        "device": device_label(run.config),
        "tokens": last.tokens,
        "budget": run.config.budget,
        "budget_spent": run.spent,
        "initial_validation_loss": initial_loss,
        "final_validation_loss": None if last.diverged else run.validation_loss,
        "final_test_loss": test_loss,
        "final_test_bits_per_byte": None if test_loss is None else run.corpus.test_bits_per_byte(test_loss),
        "n_decisions": len(intervals),
        "n_changes": sum(before.requested != after.requested for before, after in pairwise(intervals)),
        "diverged": last.diverged,
        "final_controls": asdict(last.requested),
        "final_effective": {"precision": last.precision, "sparsity": last.sparsity, "batch_size": last.batch_size},
        "versions": versions(),
    }
    summary |= _cost(run, records, options)
    if reference is not None:
        summary["reference"] = _against(reference, summary)
    return summary


def _teacher(run: LiveRun) -> dict[str, Any]:
    """Return what the run learned from beside its text."""
    teacher = run.trainer.teacher
    if teacher is None:
        return {}
    n_parameters = sum(p.numel() for p in teacher.model.parameters())
    return {
        "teacher": run.config.teacher,
        "teacher_digest": teacher.digest,
        "teacher_parameters": n_parameters,
        "distillation_weight": teacher.weight,
        "distillation_temperature": teacher.temperature,
    }


def _cost(run: LiveRun, records: Sequence[DecisionRecord], options: ReplayOptions) -> dict[str, Any]:
    """Return time, energy and the figures derived from them; evaluation is listed separately."""
    intervals = [record.telemetry for record in records]
    time_s = sum(t.time_s for t in intervals)
    energy_j = sum_known(t.energy_j for t in intervals)
    default = options.grid_intensity == DEFAULT_GRID_INTENSITY_G_PER_KWH
    return {
        "time_s": time_s,
        "probe_time_s": sum(t.probe_time_s for t in intervals),
        "switch_time_s": sum(t.switch_time_s for t in intervals),
        "evaluation_time_s": sum(t.evaluation_time_s for t in intervals),
        "tokens_per_s": intervals[-1].tokens / time_s,
        "energy_j": energy_j,
        "energy_source": intervals[-1].energy_source,
        "energy_meter": run.meter.description,
        "device_hours": device_hours(time_s),
        "co2e_g": grams_co2e(energy_j, options.grid_intensity),
        "grid_intensity_g_per_kwh": options.grid_intensity,
        "grid_intensity_source": DEFAULT_GRID_INTENSITY_SOURCE if default else "given with --grid-intensity",
    }


def _against(reference: Reference, summary: dict[str, Any]) -> dict[str, Any]:
    """Return the reference run's figures, and the ratios of this run's to them."""
    loss, energy_j = summary["final_validation_loss"], summary["energy_j"]
    known = energy_j is not None and reference.energy_j
    return {
        "final_validation_loss": reference.losses[-1],
        "time_s": reference.time_s,
        "energy_j": reference.energy_j,
        "energy_source": reference.energy_source,
        "loss_difference": None if loss is None else loss - reference.losses[-1],
        "quality": None if loss is None else reference.quality(loss),
        "time_ratio": summary["time_s"] / reference.time_s,
        "energy_ratio": energy_j / reference.energy_j if known else None,
    }


def print_summary(summary: dict[str, Any], console: Console) -> None:
    """Print a run's key figures beside those of its reference, if there is one."""
    reference = summary.get("reference")
    policy = "no policy: the base schedule" if summary["policy"] == "none" else f"policy {summary['policy']}"
    if summary.get("mode") == "advise":  # version 0.2 did not write it
        policy += ", which only advised: nothing was changed"
    title = f"{summary['model']}, {summary['n_parameters']:,} parameters\n{policy}"
    table = Table(title=escape(title), title_style="bold")
    table.add_column("")
    table.add_column("this run", justify="right")
    if reference:
        table.add_column("base schedule", justify="right")
    for label, show in _rows(summary):
        table.add_row(escape(label), show(summary), *([show(reference)] if reference else []))
    console.print(table)
    if advice := summary.get("advice"):
        times = ", ".join(f"{change} {count}x" for change, count in advice.items())
        console.print(f"advice in {summary['n_decisions']} decisions: {escape(times)}", highlight=False)
    if summary["diverged"]:
        console.print("[red]the run diverged: its loss is not finite; lower --base-learning-rate[/red]")
    if remark := summary.get("busy_machine"):
        console.print(f"[dim]{escape(str(remark))}[/dim]", highlight=False)


def _rows(summary: dict[str, Any]) -> list[tuple[str, Callable[[dict[str, Any]], str]]]:
    rows = [
        ("validation loss, nats/token", _shown("final_validation_loss", "{:.4f}")),
        ("test loss, nats/token", _shown("final_test_loss", "{:.4f}")),
        ("test loss, bits/byte", _shown("final_test_bits_per_byte", "{:.4f}")),
        ("tokens", _shown("tokens", "{:,}")),
        ("time, s", _shown("time_s", "{:.1f}")),
        (f"energy, J ({summary['energy_source'] or 'no meter'})", _shown("energy_j", "{:.1f}")),
        (f"CO2e, g at {summary['grid_intensity_g_per_kwh']:g} g/kWh", _shown("co2e_g", "{:.3f}")),
    ]
    if summary.get("budget") is not None:  # version 0.1 did not write it
        rows.insert(3, (f"used of the budget of {summary['budget']}", _shown("budget_spent", "{:.2f}")))
    return rows


def _shown(name: str, form: str) -> Callable[[dict[str, Any]], str]:
    return lambda figures: "-" if figures.get(name) is None else form.format(figures[name])


def replay(options: ReplayOptions, console: Console) -> dict[str, Any]:
    """Train the run that `options` describe, or resume it, and return its summary.

    Raises:
        ValueError: an option cannot be used; nothing has been written then.
    """
    path = None if options.policy == "none" else policy_path(options.policy)
    bundle = PolicyBundle.load(path) if path is not None else None
    preference = Preference.parse(options.preference)
    config = _config(options, bundle)
    use_threads(options.threads)
    run = LiveRun(config, probe=options.probe)
    used = {"policy_digest": policy_digest(path)} if path is not None else {}
    chosen = {"policy": options.policy, **used, "preference": str(preference), "probe": options.probe}
    if options.mode != ReplayOptions.mode:
        chosen["mode"] = options.mode  # folders of earlier versions do not have it
    if bundle is not None and options.throughput_floor != ReplayOptions.throughput_floor:
        chosen["throughput_floor"] = options.throughput_floor
    folder = RunFolder(options.out, {**config.settings(), **chosen, "text_and_model_digest": content_digest(config)})
    if (summary := folder.summary()) is not None:
        console.print(f"[dim]{options.out} is already finished[/dim]", soft_wrap=True)
        print_summary(summary, console)
        return summary
    kind = AdvisingController if options.mode == "advise" else GuardedController
    if bundle is not None:
        bounds = GuardrailSettings(throughput_floor=options.throughput_floor)
        controller = kind.of_bundle(bundle, run.limits(), preference, bounds)
    else:
        controller = kind(Controller(keep, run.base_limits(), preference), Guardrails(UNGUARDED))
    reference = _reference(config, console) if options.reference else None
    if reference is not None:
        reference.write(folder.path / "reference.json")
    steered = SteeredRun(run, controller, folder, reference)
    busy = BusyWatch()
    steered.train(console)
    remark = busy.remark(on_cpu=run.device.type == "cpu")
    with steered.kept_on_failure():
        summary = summarise(run, steered.records, steered.initial_loss, reference, options)
        summary |= used | controller.summary()
        if remark is not None:
            summary["busy_machine"] = remark
        steered.finish(summary)
    print_summary(summary, console)
    return summary


def _config(options: ReplayOptions, bundle: PolicyBundle | None) -> RunConfig:
    """Return the run, with the policy's number of decisions and base schedule where the options leave them open."""
    return options.run_config(50) if bundle is None else options.run_config(bundle.decisions, bundle.base_schedule)


def _reference(config: RunConfig, console: Console) -> Reference:
    with console.status("reference run") as status:
        return live_reference(config, progress=status.update)


class SteeredRun:
    """A live run under a guarded controller, recorded in a folder; resumed if its checkpoint is there."""

    def __init__(
        self, run: LiveRun, controller: GuardedController, folder: RunFolder, reference: Reference | None = None
    ) -> None:
        self.run = run
        self.controller = controller
        self.folder = folder
        self.meter = RewardMeter(reference) if reference is not None else None
        self.records: list[DecisionRecord] = []
        self.telemetry: Telemetry | None = None
        """Telemetry of the last interval; `None` before the first."""
        self._recovering = RollbackController(controller, run)
        self._resume()
        purge_step = self.telemetry.tokens if self.telemetry is not None else None
        self.writer = RunWriter(folder.path / "tb", purge_step=purge_step, earlier=self.records)
        if reference is not None:
            self.writer.write_reference(reference)

    def _resume(self) -> None:
        interrupted = self.folder.resume()
        if interrupted is None:
            self.initial_loss = self.run.evaluate()
            return
        checkpoint, self.records = interrupted
        with resuming(self.folder.path / "checkpoint.pt"):
            self.run.check_snapshot(checkpoint["snapshot"])
            if len(self.records) < (decision := checkpoint["snapshot"]["decision"]):
                raise ValueError(f"records must be of {decision} decisions, got {len(self.records)}")
            self.run.restore(checkpoint["snapshot"])
            self.initial_loss = float(checkpoint["initial_loss"])
            self.controller.load_state_dict(checkpoint["controller"])
        if self.controller.snapshotted_here():
            self._recovering.snapshot = checkpoint["snapshot"]
        self.telemetry = self.records[-1].telemetry if self.records else None
        if self.meter is not None:
            for record in self.records:
                self.meter.weigh(record.telemetry, record.telemetry.train_loss)

    def train(self, console: Console) -> None:
        """Train the run to its end, and write down every interval."""
        intervals = drive(
            self.run,
            self._recovering.decide,
            self.run.config.decisions,
            last=self.telemetry,
            can_roll_back=lambda: self.controller.can_roll_back,
        )
        with progress_bar(console, self.run.config.model, 1.0) as advance, stopping.postponed():
            for interval in intervals:
                self._record(interval)
                telemetry = interval.telemetry
                advance(telemetry.budget_used, _line(telemetry))
                asked = stopping.asked()
                if not telemetry.diverged and (asked or self.folder.checkpoint_due()) and self.run.is_finite():
                    self.folder.write_checkpoint(self._state(), self.records)
                stopping.raise_if_asked()

    def _state(self) -> dict[str, Any]:
        return {
            "snapshot": self.run.snapshot(),
            "initial_loss": self.initial_loss,
            "controller": self.controller.state_dict(),
        }

    @contextmanager
    def kept_on_failure(self) -> Iterator[None]:
        """Write a checkpoint of the trained run if the `with` block fails, and say where in a note on the error."""
        try:
            yield
        except BaseException as error:
            if not self.records[-1].telemetry.diverged:
                error.add_note(self.folder.keep(self._state(), self.records))
            raise

    def _record(self, interval: DrivenInterval) -> None:
        self.telemetry = interval.telemetry
        reward = self.meter.weigh(interval.telemetry, interval.loss) if self.meter is not None else None
        record = self.controller.record(interval.telemetry, reward)
        self.records.append(record)
        self.folder.append(record)
        self.writer.write(record)

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the model, the TensorBoard summary, and last summary.json, which marks the run as complete."""
        if not summary["diverged"]:
            with whole_folder(self.folder.path / "model") as temporary:
                self.run.save(temporary)
        self.writer.write_summary(summary)
        names = ("final_validation_loss", "final_test_loss", "time_s", "energy_j")
        settings = asdict(self.run.config) | {"policy": summary["policy"], "preference": summary["preference"]}
        self.writer.write_hparams(settings, {name: summary[name] for name in names})
        self.writer.close()
        self.folder.write_summary(summary)


def _line(telemetry: Telemetry) -> str:
    return (
        f"loss {telemetry.train_loss:.3f}  lr {telemetry.learning_rate:.1e}  batch {telemetry.requested.batch_size}"
        f"  {telemetry.precision}  {telemetry.tokens_per_s:,.0f} tok/s"
    )
