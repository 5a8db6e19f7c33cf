"""Measure a policy zero-shot on the live test cases, started from good and bad learning rates.

    python benchmarks/zero_shot.py [--policy default] [--out runs/baselines] [--seeds 3] [--jobs 0]

Each run starts at a factor of the tuned static's learning rate, which the policy does not know. The tuned static is
read from the folder of `baselines.py`, so that its search is not run again; the policy's own 408 runs take about half
an hour on two cores. If the command is interrupted, the same command resumes it. The full report is OUT/report.html.
The picture shows the compute multiplier against the tuned static by starting learning rate.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
import torch
from _common import write_result
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from trainpilot.agents.bundle import policy_digest, policy_path
from trainpilot.experiments.analysis.figures import BASELINES, Estimate
from trainpilot.experiments.analysis.method_figures import MethodOnCase, method_on_case
from trainpilot.experiments.analysis.modelled_cost import Runs
from trainpilot.experiments.analysis.multiplier import case_baselines
from trainpilot.experiments.analysis.statistics import Bounded, over_cases, over_seeds
from trainpilot.experiments.costs.table import CostTable
from trainpilot.experiments.results import TUNED, UNTUNED, Comparison, RunResult

TITLES = {
    "tokens": ("in tokens", "asked for quality alone"),
    "time_s": ("in modelled seconds", "asked for quality and time"),
    "energy_j": ("in modelled joules", "asked for quality and energy"),
}
POINT, LINE, SOFT = "#5b8fc7", "#0a3d7a", "#62676f"
SPREAD = 0.5
"""Horizontal spread of the cases of one start, as a share of the distance between two starts."""
LEAST, MOST = 0.2, 4.0
"""Limits of the axis; values outside are drawn at its edge."""
TICKS = (0.2, 0.3, 0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0, 3.0, 4.0)

EstimateRecord = Mapping[str, Any]
"""An estimate as stored in the result file."""


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Write the picture of a result of `zero_shot`."""
    axes = {axis: found for axis, found in result["axes"].items() if found["starts"]}
    figure = Figure(figsize=(3.5 * max(len(axes), 1) + 0.7, 3.9), layout="constrained")
    panels = figure.subplots(1, max(len(axes), 1), sharey=True, squeeze=False)[0]
    limits = _limits(list(axes.values()))
    for panel, (axis, found) in zip(panels, axes.items(), strict=False):
        _panel(panel, found, limits)
        title, asked = TITLES[axis]
        panel.set_title(f"{title}\n", loc="left", fontsize=11, fontweight="bold")
        panel.text(
            0, 1.03, asked + _default(found["untuned_default"]), transform=panel.transAxes, fontsize=9.5, color=SOFT
        )
        panel.set_xlabel("start over the tuned learning rate", fontsize=9.5)
    panels[0].set_ylabel("compute multiplier against the tuned static", fontsize=9.5)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "trainpilot"}):
        figure.savefig(path, dpi=160, metadata={"Software": None})


def _default(estimate: EstimateRecord | None) -> str:
    known = estimate is not None and estimate["value"] is not None
    return f"; untuned default {estimate['bound']}{estimate['value']:.2f}" if estimate is not None and known else ""


def _panel(panel: Axes, found: Mapping[str, Any], limits: tuple[float, float]) -> None:
    starts = list(found["starts"].items())
    panel.set_yscale("log")
    panel.set_ylim(limits)
    panel.set_xlim(-0.6, len(starts) - 0.4)
    ticks = [tick for tick in TICKS if limits[0] <= tick <= limits[1]]
    panel.yaxis.set_major_locator(FixedLocator(ticks))
    panel.yaxis.set_major_formatter(FixedFormatter([f"{tick:g}" for tick in ticks]))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.set_xticks(range(len(starts)), [f"\N{MULTIPLICATION SIGN} {start}" for start, _ in starts])
    panel.grid(axis="y", color="#e3e0d9", linewidth=0.7)
    panel.set_axisbelow(True)
    panel.tick_params(length=0, labelsize=9)
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)
    panel.axhline(1, color="#1d1f23", linewidth=1, label="tuned static")
    panel.plot([], [], "o", color=POINT, markersize=4.2, markeredgewidth=0, label="one case, median of its seeds")
    _points(panel, [figures["tuned_by_case"] for _, figures in starts], limits)
    _medians(panel, [figures["tuned"] for _, figures in starts], limits)


def _points(panel: Axes, starts: Sequence[Mapping[str, EstimateRecord]], limits: tuple[float, float]) -> None:
    """Draw one point per case, in a fixed order of the cases; a triangle if only a bound is known."""
    for place, cases in enumerate(starts):
        for index, estimate in enumerate(cases.values()):
            if estimate["value"] is None:
                continue
            x = place + SPREAD * ((index + 0.5) / len(cases) - 0.5)
            style: dict[str, Any] = {
                "color": POINT,
                "alpha": 0.8,
                "markersize": 4.2,
                "markeredgewidth": 0,
                "clip_on": False,
            }
            mark = _mark(estimate, limits)
            panel.plot([x], [_inside(estimate["value"], limits)], mark, linestyle="", **style)


def _medians(panel: Axes, starts: Sequence[EstimateRecord], limits: tuple[float, float]) -> None:
    known = [(x, estimate) for x, estimate in enumerate(starts) if estimate["value"] is not None]
    for x, estimate in known:
        if estimate["low"] is not None:
            ends = [_inside(estimate["low"], limits), _inside(estimate["high"] or limits[1], limits)]
            panel.plot([x, x], ends, color=LINE, linewidth=1.4, solid_capstyle="butt", zorder=3)
    heights = [_inside(estimate["value"], limits) for _, estimate in known]
    label = "median over cases, 95 % interval"
    panel.plot([x for x, _ in known], heights, "o-", color=LINE, linewidth=1.8, markersize=6, zorder=4, label=label)


def _limits(axes: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    starts = [figures for found in axes for figures in found["starts"].values()]
    records = [one for figures in starts for one in (*figures["tuned_by_case"].values(), figures["tuned"])]
    values = [float(one["value"]) for one in records if one["value"] is not None and one["value"] > 0]
    return max(min([0.7, *values]) / 1.1, LEAST), min(max([1.2, *values]) * 1.1, MOST)


def _inside(value: float, limits: tuple[float, float]) -> float:
    return min(max(value, limits[0]), limits[1])


def _mark(estimate: EstimateRecord, limits: tuple[float, float]) -> str:
    if estimate["bound"] == "<" or estimate["value"] < limits[0]:
        return "v"
    return "^" if estimate["bound"] == ">" or estimate["value"] > limits[1] else "o"


STARTS = ("0.1", "0.333", "1", "3", "10")
"""Starting learning rates relative to that of the tuned static."""
SPARING = "quality=0.4+energy=0.3+time=0.3"
PREFERENCES = {"tokens": "quality=1", "time_s": SPARING, "energy_j": SPARING}
"""Preference by the axis of the comparison. On a CPU energy is proportional to time, so one run serves both.

A multiplier in seconds is maximal if quality over time is, which a weighted sum expresses only with less weight on
quality than on costs. Policies are trained with a quality weight of at least a half, so this preference is an
extrapolation."""
WANTED = (
    ("median over all starts, against the untuned default", "untuned", "all", 1.3, "target"),
    ("median over all starts, against the tuned static", "tuned", "all", 0.97, "target"),
    ("median of the worst start, against the tuned static", "tuned", "worst", 0.85, "target"),
    ("median over all starts, against the tuned static", "tuned", "all", 1.05, "goal"),
    (
        "median over all starts, the sweep paid for, at a loss near the tuned static's",
        "tuned_with_sweep",
        "all",
        10.0,
        "goal",
    ),
)
"""Description, baseline, starts, least value, and whether it is a target or a more ambitious goal."""
NEAR = 0.85
"""Least multiplier without the cost of the sweep, for the goal that charges it. With the sweep charged, a run that
stops at once would have the highest multiplier; therefore that goal requires a loss near the tuned static's."""
IMAGE = Path(__file__).parent.parent / "docs" / "images" / "zero_shot.png"
DIGITS = 5


def main() -> None:
    """Run the comparison, and write `results/zero_shot.json` and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/baselines"))
    parser.add_argument("--policy", default="default", help="a bundle's file, or the name of one that is shipped")
    parser.add_argument("--cases", default="test")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=0)
    parser.add_argument("--methods-extra", default="", help="further methods, with commas between them")
    options = parser.parse_args()
    methods = ",".join([*names(options.policy), *filter(None, [options.methods_extra])])
    command = ["compare", "--cases", options.cases, "--methods", methods, "--out", str(options.out)]
    command += ["--seeds", str(options.seeds), "--jobs", str(options.jobs)]
    subprocess.run([sys.executable, "-m", "trainpilot.experiments.cli", *command], check=True)
    result = zero_shot(load(options.out), options.policy)
    result = {"policy": {"name": options.policy, "digest": policy_digest(policy_path(options.policy))}, **result}
    draw(result, IMAGE)
    print(write_result("zero_shot", result, torch.device("cuda" if torch.cuda.is_available() else "cpu")))
    for wanted in result["targets"]:
        print(f"{'yes' if wanted['reached'] else 'NO ':3}  {wanted['kind']}: {wanted['axis']}, {wanted['what']}")


def names(policy: str) -> list[str]:
    """Return the methods that are compared."""
    started = [started_name(policy, axis, start) for axis in PREFERENCES for start in STARTS]
    return list(dict.fromkeys([UNTUNED, TUNED, f"policy:{policy}", f"open-loop:{policy}", *started]))


def started_name(policy: str, axis: str, start: str) -> str:
    """Return the name of the method for an axis and a factor of the tuned learning rate to start at."""
    return f"policy:{policy}@{PREFERENCES[axis]}@start={start}"


def load(folder: Path) -> Runs:
    """Return the runs of the comparison in `folder`, including failed ones."""
    comparison = Comparison.from_json(_read(folder / "comparison.json"))
    files = {row.key: folder / "runs" / f"{row.key}.json" for row in comparison.rows}
    results = {key: RunResult.from_json(_read(path)) for key, path in files.items() if path.is_file()}
    tables = [CostTable.from_json(_read(path)) for path in sorted((folder / "costs").glob("*.json"))]
    return Runs(comparison, results, {f"{table.model}, {table.sequence_length} tokens": table for table in tables})


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def zero_shot(runs: Runs, policy: str) -> dict[str, Any]:
    """Return every figure of the benchmark."""
    judged = {method: _on_cases(runs, method) for method in runs.notes}
    axes = {axis: _axis(judged, policy, axis) for axis in PREFERENCES}
    known = {started_name(policy, axis, start) for axis in PREFERENCES for start in STARTS}
    return {
        "compare": {"cases": [case.name for case in runs.comparison.cases], "seeds": list(runs.comparison.seeds)},
        "targets": [one for axis in PREFERENCES for one in _targets(judged, policy, axis)],
        "axes": axes,
        "others": {name: _all_axes(found) for name, found in judged.items() if name not in known},
        "closed_against_open": _closed_against_open(judged, policy),
        "second_look": _second_look(runs, policy),
    }


# Methods, over their cases --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OnCases:
    """Results of one method on every case, from one start or pooled over several."""

    cases: Mapping[str, Sequence[MethodOnCase]]

    def multiplier(self, baseline: str, axis: str) -> Estimate:
        """Return the median over cases; failures count as the worst value."""
        return over_cases(list(self.by_case(baseline, axis).values()))

    def by_case(self, baseline: str, axis: str) -> dict[str, list[Bounded]]:
        """Return the multipliers of all runs by case."""
        parts = {case: [one.multipliers[baseline][axis] for one in found] for case, found in self.cases.items()}
        return {case: [value for part in found for value in part] for case, found in parts.items()}

    @property
    def counts(self) -> dict[str, int]:
        """Number of runs, of diverged runs and of failed runs."""
        runs = [run for found in self.cases.values() for one in found for run in one.runs]
        diverged = sum(run.result.diverged for run in runs)
        return {"n_runs": len(runs), "n_diverged": diverged, "n_failed": sum(r.loss is None for r in runs) - diverged}

    @property
    def losses(self) -> dict[str, list[float | None]]:
        """Final validation losses by case, in the order of the seeds."""
        return {case: [_rounded(r.loss) for one in found for r in one.runs] for case, found in self.cases.items()}


def _on_cases(runs: Runs, method: str) -> OnCases:
    baselines = {case.name: case_baselines(runs, case) for case in runs.comparison.cases}
    return OnCases({name: [method_on_case(runs, found, method)] for name, found in baselines.items()})


def _together(found: Sequence[OnCases]) -> OnCases:
    names = dict.fromkeys(case for one in found for case in one.cases)
    return OnCases({case: [part for one in found for part in one.cases.get(case, ())] for case in names})


def _starts(judged: Mapping[str, OnCases], policy: str, axis: str) -> dict[str, OnCases]:
    wanted = {start: started_name(policy, axis, start) for start in STARTS}
    return {start: judged[name] for start, name in wanted.items() if name in judged}


def _axis(judged: Mapping[str, OnCases], policy: str, axis: str) -> dict[str, Any]:
    starts = _starts(judged, policy, axis)
    return {
        "preference": PREFERENCES[axis],
        "starts": {start: _figures(found, axis) for start, found in starts.items()},
        "all_starts": {
            baseline: estimate_record(_together(list(starts.values())).multiplier(baseline, axis))
            for baseline in BASELINES
        },
        "untuned_default": estimate_record(judged[UNTUNED].multiplier("tuned", axis)) if UNTUNED in judged else None,
    }


def _figures(found: OnCases, axis: str) -> dict[str, Any]:
    cases = {case: over_seeds(values) for case, values in found.by_case("tuned", axis).items()}
    known = {case: estimate for case, estimate in cases.items() if estimate.value is not None}
    worst = min(known, key=lambda case: (known[case].value, known[case].censored != "<"), default=None)
    return {
        **{baseline: estimate_record(found.multiplier(baseline, axis)) for baseline in BASELINES},
        "worst_case": None if worst is None else {"case": worst, "tuned": estimate_record(known[worst])},
        **found.counts,
        "tuned_by_case": {case: estimate_record(estimate) for case, estimate in cases.items()},
        "validation_losses": found.losses,
    }


def _all_axes(found: OnCases) -> dict[str, Any]:
    axes = {
        axis: {baseline: estimate_record(found.multiplier(baseline, axis)) for baseline in BASELINES}
        for axis in PREFERENCES
    }
    return {**axes, **found.counts, "validation_losses": found.losses}


# Targets ----------------------------------------------------------------------------------------------------------


def _targets(judged: Mapping[str, OnCases], policy: str, axis: str) -> list[dict[str, Any]]:
    starts = _starts(judged, policy, axis)
    together = _together(list(starts.values()))
    near = reached(together.multiplier("tuned", axis), NEAR)
    found = []
    for what, baseline, which, at_least, kind in WANTED:
        estimate = together.multiplier(baseline, axis)
        if which == "worst":
            estimate = min((one.multiplier(baseline, axis) for one in starts.values()), key=_rank, default=estimate)
        wanted = {"kind": kind, "axis": axis, "what": what, "at_least": at_least, "found": estimate_record(estimate)}
        counts = near or baseline != "tuned_with_sweep"
        found.append({**wanted, "reached": counts and reached(estimate, at_least)})
    lost = sum(one.counts["n_diverged"] + one.counts["n_failed"] for one in starts.values())
    none = {"kind": "target", "axis": axis, "what": "runs that diverged or failed", "at_most": 0, "found": lost}
    return [*found, {**none, "reached": lost == 0 and bool(starts)}]


def _rank(estimate: Estimate) -> float:
    return -1.0 if estimate.value is None else estimate.value


def reached(estimate: Estimate, at_least: float) -> bool:
    """Return whether the estimate is at least `at_least`; an upper bound does not count as reached."""
    return estimate.value is not None and estimate.censored != "<" and estimate.value >= at_least


def _closed_against_open(judged: Mapping[str, OnCases], policy: str) -> dict[str, Any]:
    """Return in how many cases the policy ended with a lower loss than its own average schedule replayed blindly."""
    closed, blind = (judged.get(f"{kind}:{policy}") for kind in ("policy", "open-loop"))
    if closed is None or blind is None:
        return {}
    middles = [(_middle(closed, case), _middle(blind, case)) for case in closed.cases]
    return {
        "cases": len(middles),
        "closed_better": sum(one < other for one, other in middles),
        "open_better": sum(other < one for one, other in middles),
        "nats_saved_by_case": [_rounded(other - one) if max(one, other) < math.inf else None for one, other in middles],
        "tuned": {
            name: estimate_record(one.multiplier("tuned", "tokens"))
            for name, one in (("closed", closed), ("open", blind))
        },
    }


def _second_look(runs: Runs, policy: str) -> dict[str, Any]:
    """Return the loss difference between policy and tuned static on the validation and the test split."""
    gains: dict[str, list[float]] = {"final_validation_loss": [], "final_test_loss": []}
    for case in runs.comparison.cases:
        tuned = {run.seed: run.result for run in runs.of(case.name, TUNED) if run.row.budget == 1}
        for start in STARTS:
            for run in runs.of(case.name, started_name(policy, "tokens", start)):
                for split, found in gains.items():
                    mine, theirs = getattr(run.result, split), getattr(tuned[run.seed], split)
                    if mine is not None and theirs is not None:
                        found.append(theirs - mine)
    return {
        "axis": "tokens",
        "median_nats_below_tuned": {k: _rounded(median(v)) if v else None for k, v in gains.items()},
    }


def _middle(found: OnCases, case: str) -> float:
    """Return the median of the final losses on a case; a run without a loss counts as the worst."""
    runs = [run for one in found.cases.get(case, ()) for run in one.runs]
    return median([math.inf if run.loss is None else run.loss for run in runs]) if runs else math.inf


def estimate_record(estimate: Estimate) -> dict[str, Any]:
    """Convert an estimate for the result file; `bound` is `<` or `>` if the value is only a bound."""
    ends = {"value": estimate.value, "low": estimate.low, "high": estimate.high}
    return {**{name: _rounded(value) for name, value in ends.items()}, "bound": estimate.censored}


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{DIGITS}g}")


if __name__ == "__main__":
    main()
