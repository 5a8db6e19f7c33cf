"""Measure what trained models cost where they are used, apart from training, and all of a case in turn.

The measurement is that of `trainpilot export`: one request in transformers, of which a prompt's share is taken off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from trainpilot.experiments.costs.use import UseCost, Used, use_key
from trainpilot.experiments.progress import quiet
from trainpilot.llm_runtime.config import BYTES, RunConfig
from trainpilot.llm_runtime.energy import select_meter
from trainpilot.llm_runtime.export.formats import FORMATS, RoundedModel, rounded_model
from trainpilot.llm_runtime.export.inference import RequestCost, Transformers, measure_turn_about
from trainpilot.llm_runtime.files import digest
from trainpilot.llm_runtime.live_run import resolve_device
from trainpilot.llm_runtime.models import context_length, load_model_of
from trainpilot.llm_runtime.precision import device_name

REQUEST_TOKENS = 32
"""Tokens of the prompt of the request that is measured, and as many new ones; fewer where the context is too short."""
LIMIT_S = 4.0
"""No further round of measurements begins after so many seconds; there are four at least."""


def use_costs(
    used: Mapping[str, Iterable[Used]], folder: Path, progress: Callable[[str], None], *, measure: bool = True
) -> dict[str, UseCost]:
    """Return the costs by `use_key`; those stored in `folder` are not measured again.

    Args:
        used: Models and formats, by case. Those of a case are measured in turn.
        folder: Folder in which each cost is stored as a file.
        progress: Called with a line of text before each measurement.
        measure: Whether to measure what is not stored.
    """
    found: dict[str, UseCost] = {}
    for case, models in used.items():
        wanted = {use_key(*each): each for each in models}
        paths = {key: folder / f"use-{digest(key)}.json" for key in wanted}
        kept = {key: cost for key, path in paths.items() if (cost := UseCost.read(path)) is not None}
        missing = [each for key, each in wanted.items() if key not in kept]
        if missing and measure:
            progress(f"{case}: {len(missing)} models in use")
            measured = _measured(missing)
            for key, cost in measured.items():
                cost.write(paths[key])
            kept |= measured
        found |= kept
    return found


def _measured(models: Sequence[Used]) -> dict[str, UseCost]:
    """Return the costs of several models, measured in turn; they have new weights, on which no cost depends."""
    device = resolve_device(models[0][0].device)
    with quiet():
        loaded = {use_key(config, name): _rounded(config, name) for config, name in models}
    runs = [use_key(*each) for each in models if each[1] is None or FORMATS[each[1]].kind != "grid"]
    contexts = [length for key in runs if (length := context_length(loaded[key].model.config))]
    tokens = max(min([2 * REQUEST_TOKENS + 2, *contexts]) // 2 - 1, 1)
    prompt = np.random.default_rng(0).integers(0, BYTES, tokens, dtype=np.int64)
    runtimes = {key: Transformers(loaded[key].model.to(device), prompt, tokens) for key in runs}  # type: ignore[arg-type]
    meter = select_meter(str(device))
    try:
        costs = measure_turn_about(
            runtimes, meter, str(device), prompt_tokens=tokens, new_tokens=tokens, limit_s=LIMIT_S
        )
    finally:
        meter.close()
    return {key: _cost(each, costs.get(key), device_name(device)) for key, each in loaded.items()}


def _rounded(config: RunConfig, model_format: str | None) -> RoundedModel:
    return rounded_model(model_format, load_model_of(config))


def _cost(model: RoundedModel, request: RequestCost | None, device: str) -> UseCost:
    speed = None if request is None else request.decode_tokens_per_s
    return UseCost(
        n_parameters=model.n_parameters,
        weight_bytes=model.weight_bytes,
        bits_per_weight=model.bits_per_weight,
        latency_s=None if speed is None else 1 / speed,
        energy_j=None if request is None else request.decode_j_per_token,
        energy_source=None if request is None else request.energy_source,
        device=device,
    )
