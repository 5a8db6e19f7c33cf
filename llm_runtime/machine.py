"""Say what this machine has and what pays on it, by short measurements on a small model."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from trainpilot.llm_runtime.config import PRECISIONS, Precision, RunConfig
from trainpilot.llm_runtime.live_run import Trainer, resolve_device
from trainpilot.llm_runtime.models import load_model
from trainpilot.llm_runtime.precision import lacking, synchronise

MAX_ROUNDS = 7
LARGER_BATCH = 4
"""Factor between the two batches that are timed."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """Something that torch can compute on."""

    name: str
    kind: str
    """As torch names it: `cpu`, `cuda:0`."""
    memory_bytes: int | None
    compute_capability: str | None
    """Of an NVIDIA GPU, as in 9.0."""


def devices() -> list[Device]:
    """Return the devices that torch sees, the host last."""
    found = [_gpu(index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return [*found, _host()]


def _gpu(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    return Device(
        name=properties.name,
        kind=f"cuda:{index}",
        memory_bytes=properties.total_memory,
        compute_capability=f"{properties.major}.{properties.minor}",
    )


def _host() -> Device:
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        memory = None  # not a POSIX system
    capability = torch.backends.cpu.get_cpu_capability()
    return Device(name=f"host processor ({capability})", kind="cpu", memory_bytes=memory, compute_capability=None)


def default_device() -> str:
    """Return the device that `auto` means here: `cuda` or `cpu`."""
    return resolve_device("auto").type


def lacking_precisions() -> Mapping[Precision, str]:
    """Return the precisions that the default device cannot do, each with the reason."""
    return lacking(resolve_device("auto"))


@dataclass(frozen=True, kw_only=True)
class Payoff:
    """What the controls save in time, measured; below 1 pays."""

    model: str
    batch_size: int
    """Sequences per pass, of the settings that do not change the batch."""
    rounds: int
    """Timed passes per setting; the fastest counts, as other programs can only make a pass slower."""
    precision: Mapping[Precision, float]
    """Time of a pass over that in fp32, for each precision that the device has."""
    batch: float
    """Time per token with four times the batch, over that with the batch."""
    width: float
    """Time of a pass with half of the feed-forward channels removed, over that with all."""
    spread: float
    """Slowest over fastest pass of the same kind: well above 1 on a machine that is busy with something else."""


def measure_payoff(model: str = "llama-micro", batch_size: int = 4, limit_s: float = 3.0) -> Payoff:
    """Time forward and backward passes of a preset on random tokens, on the default device, in alternating order.

    Args:
        model: A preset.
        batch_size: Sequences per pass.
        limit_s: No further round begins after so many seconds; there are three at least.
    """
    device = resolve_device("auto")
    config = RunConfig(model=model, batch_size=batch_size)
    full, narrow = _trainer(config, device), _trainer(replace(config, pruning="width"), device)
    narrow.apply(replace(config.start(), sparsity=0.5))
    batch, large = _random_tokens(config, 1), _random_tokens(config, LARGER_BATCH)
    missing = lacking(device)
    passes: dict[str, Callable[[], None]] = {
        name: partial(full.rehearse, batch, name) for name in PRECISIONS if name not in missing
    }
    passes["large"] = lambda: full.rehearse(large, "fp32")
    passes["narrow"] = lambda: narrow.rehearse(batch, "fp32")
    times = _alternate(passes, device, limit_s)
    over_fp32 = {name: min(values) / min(times["fp32"]) for name, values in times.items()}
    return Payoff(
        model=model,
        batch_size=batch_size,
        rounds=len(times["fp32"]),
        precision={name: over_fp32[name] for name in PRECISIONS if name in over_fp32},
        batch=over_fp32["large"] / LARGER_BATCH,
        width=over_fp32["narrow"],
        spread=max(times["fp32"]) / min(times["fp32"]),
    )


def _trainer(config: RunConfig, device: torch.device) -> Trainer:
    return Trainer(load_model(config.model, config.seed).model, config, device)


def _random_tokens(config: RunConfig, factor: int) -> np.ndarray:
    shape = (factor * config.batch_size, config.sequence_length + 1)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.int64)


def _alternate(
    passes: Mapping[str, Callable[[], None]], device: torch.device, limit_s: float
) -> dict[str, list[float]]:
    """Return seconds of every timed pass, after one round of warm-up; what is timed side by side shares its noise."""
    times: dict[str, list[float]] = {name: [] for name in passes}
    end = time.perf_counter() + limit_s
    for index in range(1 + MAX_ROUNDS):
        for name, run in passes.items():
            synchronise(device)
            start = time.perf_counter()
            run()
            synchronise(device)
            if index:
                times[name].append(time.perf_counter() - start)
        if index >= 3 and time.perf_counter() > end:
            break
    return times
