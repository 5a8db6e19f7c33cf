"""Measure the cost table of every model in a comparison once, and keep it beside the runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path

from trainpilot.experiments.compare.comparison import Case
from trainpilot.experiments.compare.records import cost_key
from trainpilot.llm_runtime.config import PRECISIONS, OptimizerName, Precision, Pruning, RunConfig
from trainpilot.llm_runtime.cost_measuring import measure_cost_table
from trainpilot.llm_runtime.cost_table import CostTable
from trainpilot.llm_runtime.files import write_json
from trainpilot.llm_runtime.live_run import LiveRun

BATCH_FACTORS = (0.125, 0.25, 0.5, 1, 2, 4, 8)
"""Batches that are timed, as factors on the case's own."""
OPTIMIZERS: tuple[OptimizerName, ...] = ("schedule-free", "prodigy")
PRUNINGS: tuple[Pruning, ...] = ("magnitude",)


def cost_tables(
    configs: Mapping[str, Sequence[RunConfig]],
    precisions: Mapping[str, Sequence[Precision]],
    folder: Path,
    progress: Callable[[str], None],
) -> dict[str, CostTable]:
    """Return the tables by `cost_key`, from `folder` where they have been measured before.

    Args:
        configs: Runs by case: the case's own, and others on its text whose models have another size.
        precisions: Precisions that are tried, by case.
        folder: Where the tables are kept, a file each.
        progress: Called with a line of text before each measurement.
    """
    tried: dict[str, dict[Precision, None]] = {}
    for name, sizes in configs.items():
        for config in sizes:
            tried.setdefault(cost_key(config), {}).update(dict.fromkeys(precisions[name]))
    tables: dict[str, CostTable] = {}
    for name, sizes in configs.items():
        for number, config in enumerate(sizes, start=1):
            key = cost_key(config)
            if key not in tables:
                progress(f"cost table of {name}" + (f", size {number} of {len(sizes)}" if len(sizes) > 1 else ""))
                tables[key] = _measured_table(config, tuple(tried[key]), folder)
    return tables


def _measured_table(config: RunConfig, precisions: Sequence[Precision], folder: Path) -> CostTable:
    path = folder / f"{blake2b(cost_key(config).encode(), digest_size=8).hexdigest()}.json"
    try:
        table = CostTable.from_json(json.loads(path.read_text(encoding="utf-8")))
        if _holds(table, config, precisions):
            return table
    except (OSError, ValueError, KeyError, TypeError):
        pass  # never measured here, or a damaged file: measure it
    sizes = sorted({max(1, round(config.batch_size * factor)) for factor in BATCH_FACTORS})
    table = measure_cost_table(
        config,
        batch_sizes=sizes,
        precisions=precisions,
        optimizers=OPTIMIZERS,
        prunings=tuple(dict.fromkeys((*PRUNINGS, config.pruning))),
    )
    write_json(path, table.to_json())
    return table


def _holds(table: CostTable, config: RunConfig, precisions: Sequence[Precision]) -> bool:
    """Return whether a table was measured with all that runs on `config` may use."""
    steps = {row.precision for row in table.rows if row.kind == "step"}
    narrowed = any(row.removed for row in table.rows)
    prunes = narrowed if config.pruning == "width" else config.pruning in ("none", *table.extras)
    return steps >= set(precisions) and prunes


def precisions_that_pay(case: Case) -> tuple[Precision, ...]:
    """Return the case's own precision and those that were measured to be faster here than float32."""
    masked = LiveRun(case.config, probe=False).limits().masked_precisions
    return tuple(p for p in PRECISIONS if p == case.config.precision or p not in masked)
