"""Steer one run with a policy, resumably, and write down what happened."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from rich.console import Console

from trainpilot.agents.bundle import PolicyBundle, policy_digest, policy_path
from trainpilot.agents.controller import Controller, DecisionRecord, keep
from trainpilot.agents.logging.run_log import RunWriter
from trainpilot.agents.steering.guarded_controller import GuardedController
from trainpilot.agents.steering.guardrails import UNGUARDED, Guardrails, GuardrailSettings
from trainpilot.envs.decision import Preference
from trainpilot.envs.reference import live_reference
from trainpilot.envs.reward import Reference, RewardMeter, current_loss
from trainpilot.experiments.options import ReplayOptions
from trainpilot.experiments.progress import progress_bar
from trainpilot.experiments.run_folder import RunFolder
from trainpilot.experiments.summary import print_summary, summarise
from trainpilot.llm_runtime.config import Controls, RunConfig
from trainpilot.llm_runtime.data.text_sources import content_digest
from trainpilot.llm_runtime.files import whole_folder
from trainpilot.llm_runtime.live_run import LiveRun
from trainpilot.llm_runtime.process import use_threads
from trainpilot.llm_runtime.telemetry import Snapshot, Telemetry


def replay(options: ReplayOptions, console: Console) -> dict[str, Any]:
    """Run, or go on with, the run that `options` describe, and return its summary.

    Raises:
        ValueError: an option cannot be used; nothing has been written then.
    """
    path = None if options.policy == "none" else policy_path(options.policy)
    bundle = PolicyBundle.load(path) if path is not None else None
    preference = Preference.parse(options.preference)
    if not (math.isfinite(options.grid_intensity) and options.grid_intensity >= 0):
        raise ValueError(f"grid_intensity must be a number >= 0, got {options.grid_intensity}")
    config = _config(options, bundle)
    use_threads(options.threads)
    run = LiveRun(config, probe=options.probe)
    used = {"policy_digest": policy_digest(path)} if path is not None else {}
    chosen = {"policy": options.policy, **used, "preference": str(preference), "probe": options.probe}
    folder = RunFolder(options.out, {**asdict(config), **chosen, "text_and_model_digest": content_digest(config)})
    if (summary := folder.summary()) is not None:
        console.print(f"[dim]{options.out} is already finished[/dim]", soft_wrap=True)
        print_summary(summary, console)
        return summary
    limits = run.limits() if bundle is not None else run.base_limits()
    policy, bounds = (bundle.act, GuardrailSettings()) if bundle is not None else (keep, UNGUARDED)
    controller = GuardedController(Controller(policy, limits, preference), Guardrails(bounds))
    reference = _reference(config, console) if options.reference else None
    steered = SteeredRun(run, controller, folder, reference)
    steered.train(console)
    summary = summarise(run, steered.records, steered.initial_loss, reference, options) | used | controller.summary()
    steered.finish(summary)
    print_summary(summary, console)
    return summary


def _config(options: ReplayOptions, bundle: PolicyBundle | None) -> RunConfig:
    """Return the run; the policy brings its number of decisions and its base schedule, which options override."""
    return options.run_config(50) if bundle is None else options.run_config(bundle.decisions, bundle.base_schedule)


def _reference(config: RunConfig, console: Console) -> Reference:
    with console.status("reference run") as status:
        return live_reference(config, progress=status.update)


class SteeredRun:
    """A live run, its controller, and the folder that everything is written to. Takes up an interrupted run."""

    def __init__(
        self, run: LiveRun, controller: GuardedController, folder: RunFolder, reference: Reference | None = None
    ) -> None:
        self.run = run
        self.controller = controller
        self.folder = folder
        self.meter = RewardMeter(reference) if reference is not None else None
        self.records: list[DecisionRecord] = []
        self.telemetry: Telemetry | None = None
        self._kept: Snapshot | None = None
        self._resume()
        purge_step = self.telemetry.tokens if self.telemetry is not None else None
        self.writer = RunWriter(folder.path / "tb", purge_step=purge_step, earlier=self.records)
        if reference is not None:
            self.writer.write_reference(reference)

    def _resume(self) -> None:
        kept = self.folder.resume()
        if kept is None:
            self.initial_loss = self.run.evaluate()
            return
        checkpoint, self.records = kept
        self.run.restore(checkpoint["snapshot"])
        self.initial_loss = float(checkpoint["initial_loss"])
        self.controller.load_state_dict(checkpoint["controller"])
        if self.controller.snapshotted_here():
            self._kept = checkpoint["snapshot"]
        self.telemetry = self.records[-1].telemetry if self.records else None
        if self.meter is not None:
            for record in self.records:
                self.meter.weigh(record.telemetry, record.telemetry.train_loss)

    def train(self, console: Console) -> None:
        """Decide, train an interval, write it down; until the run has finished or diverged."""
        with progress_bar(console, self.run.config.model, 1.0) as advance:
            while not self._over():
                self.telemetry = self._interval(self.telemetry)
                advance(self.telemetry.budget_used, _line(self.telemetry))
                if not self.telemetry.diverged and self.folder.checkpoint_due():
                    content = {"snapshot": self.run.snapshot(), "initial_loss": self.initial_loss}
                    content["controller"] = self.controller.state_dict()
                    self.folder.write_checkpoint(content, self.records)

    def _over(self) -> bool:
        """Return whether the run has ended: a run that diverged is taken back first, as often as may be."""
        last = self.telemetry
        if last is None:
            return False
        return not self.controller.can_roll_back if last.diverged else last.finished

    def _controls(self, last: Telemetry | None) -> Controls:
        """Return what holds next, after taking the run back where it must be."""
        decision = self.controller.decide(last)
        if decision.roll_back and self._kept is not None:
            self.run.restore(self._kept)
            return self.controller.rolled_back()
        if decision.snapshot:
            self._kept = self.run.snapshot()
            self.controller.snapshotted()
        return decision.controls

    def _interval(self, last: Telemetry | None) -> Telemetry:
        telemetry = self.run.advance(self._controls(last), 1 / self.run.config.decisions)
        loss = current_loss(self.run, telemetry)
        reward = self.meter.weigh(telemetry, loss) if self.meter is not None else None
        record = self.controller.record(telemetry, reward)
        self.records.append(record)
        self.folder.append(record)
        self.writer.write(record)
        return telemetry

    def finish(self, summary: dict[str, Any]) -> None:
        """Write model and TensorBoard summary first and summary.json last: it says that the run is complete."""
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
