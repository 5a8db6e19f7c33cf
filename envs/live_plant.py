"""Make live runs for whoever steers them, and find their references. The only file of this folder that needs torch."""

from __future__ import annotations

import os

from trainpilot.envs.reference import PlantFactory, Progress, reference_for
from trainpilot.envs.reward import Reference
from trainpilot.llm_runtime.config import RunConfig
from trainpilot.llm_runtime.energy.meter import EnergyMeter, select_meter
from trainpilot.llm_runtime.telemetry import Plant


def live_plant() -> PlantFactory:
    """Return what makes a real run of a case, in this process, with one energy meter for all runs."""
    meters: dict[str, EnergyMeter] = {}

    def make(config: RunConfig) -> Plant:
        from trainpilot.llm_runtime.live_run import LiveRun, resolve_device

        device = str(resolve_device(config.device))
        if device not in meters:
            meters[device] = select_meter(device)
        return LiveRun(config, meter=meters[device])

    return make


def live_reference(
    config: RunConfig, make_plant: PlantFactory | None = None, progress: Progress | None = None
) -> Reference:
    """Return the reference of a live run: from the cache where text, model files, device and threads are the same."""
    from trainpilot.llm_runtime.data.text_sources import content_digest

    setting = f"{device_label(config)}, content {content_digest(config)}"
    return reference_for(config, make_plant or live_plant(), setting=setting, progress=progress)


def device_label(config: RunConfig) -> str:
    """Return the device that a case runs on and the threads it has there."""
    from trainpilot.llm_runtime.live_run import resolve_device
    from trainpilot.llm_runtime.precision import device_name
    from trainpilot.llm_runtime.process import threads_in_use

    device = device_name(resolve_device(config.device))
    return f"{device}, {os.cpu_count()} cores, {threads_in_use()} threads"
