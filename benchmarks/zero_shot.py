"""Steer the test cases with a policy that has never met them, from right and wrong learning rates, without tuning.

    python benchmarks/zero_shot.py [--policy default] [--out runs/baselines] [--seeds 3] [--jobs 0]

Each run starts at a factor of the tuned static's learning rate, which the policy does not know. The tuned static comes
from the same folder as `baselines.py`, so that its search is not run again; the policy's own 408 runs take half an hour
or so on two cores. Killed at any moment, the same command goes on. The whole report is OUT/report.html.

Draw the zero-shot benchmark: what the steered runs are worth against the tuned static, by where they started.
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
from trainpilot.experiments.compare.results import TUNED, UNTUNED, Comparison, RunResult
from trainpilot.experiments.costs.table import CostTable

TITLES = {
    "tokens": ("in tokens", "asked for quality alone"),
    "time_s": ("in modelled seconds", "asked for quality and time"),
    "energy_j": ("in modelled joules", "asked for quality and energy"),
}
POINT, LINE, SOFT = "#5b8fc7", "#0a3d7a", "#62676f"
SPREAD = 0.5
"""Width over which the cases of one start are spread, in steps between two starts."""
LEAST, MOST = 0.2, 4.0
"""The axis never goes further; what lies beyond stands at its edge."""
TICKS = (0.2, 0.3, 0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0, 3.0, 4.0)

Told = Mapping[str, Any]
"""An estimate as the result file holds it."""


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


def _default(told: Told | None) -> str:
    known = told is not None and told["value"] is not None
    return f"; untuned default {told['bound']}{told['value']:.2f}" if told is not None and known else ""


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


def _points(panel: Axes, starts: Sequence[Mapping[str, Told]], limits: tuple[float, float]) -> None:
    """Draw a point per case, cases always in the same order; a triangle where only a bound is known."""
    for place, cases in enumerate(starts):
        for index, told in enumerate(cases.values()):
            if told["value"] is None:
                continue
            x = place + SPREAD * ((index + 0.5) / len(cases) - 0.5)
            style: dict[str, Any] = {
                "color": POINT,
                "alpha": 0.8,
                "markersize": 4.2,
                "markeredgewidth": 0,
                "clip_on": False,
            }
            mark = _mark(told, limits)
            panel.plot([x], [_inside(told["value"], limits)], mark, linestyle="", **style)


def _medians(panel: Axes, starts: Sequence[Told], limits: tuple[float, float]) -> None:
    known = [(x, told) for x, told in enumerate(starts) if told["value"] is not None]
    for x, told in known:
        if told["low"] is not None:
            ends = [_inside(told["low"], limits), _inside(told["high"] or limits[1], limits)]
            panel.plot([x, x], ends, color=LINE, linewidth=1.4, solid_capstyle="butt", zorder=3)
    heights = [_inside(told["value"], limits) for _, told in known]
    label = "median over cases, 95 % interval"
    panel.plot([x for x, _ in known], heights, "o-", color=LINE, linewidth=1.8, markersize=6, zorder=4, label=label)


def _limits(axes: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    starts = [figures for found in axes for figures in found["starts"].values()]
    told = [one for figures in starts for one in (*figures["tuned_by_case"].values(), figures["tuned"])]
    values = [float(one["value"]) for one in told if one["value"] is not None and one["value"] > 0]
    return max(min([0.7, *values]) / 1.1, LEAST), min(max([1.2, *values]) * 1.1, MOST)


def _inside(value: float, limits: tuple[float, float]) -> float:
    return min(max(value, limits[0]), limits[1])


def _mark(told: Told, limits: tuple[float, float]) -> str:
    if told["bound"] == "<" or told["value"] < limits[0]:
        return "v"
    return "^" if told["bound"] == ">" or told["value"] > limits[1] else "o"


STARTS = ("0.1", "0.333", "1", "3", "10")
"""Starting learning rates over the tuned static's."""
SPARING = "quality=0.4+energy=0.3+time=0.3"
PREFERENCES = {"tokens": "quality=1", "time_s": SPARING, "energy_j": SPARING}
"""What the policy is asked for, by the axis that it is judged on. On a CPU joules follow seconds: one run serves both.

A multiplier in seconds is highest where quality over time is, which a weighted sum only finds with less weight on
quality than on what it costs. Policies are trained with at least a half, so that this one extrapolates."""
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
"""In words, baseline, which starts, at least so much, and whether it is a target or a goal beyond."""
NEAR = 0.85
"""With the sweep paid for, a run that stops at once is worth most. So that goal needs a loss near the tuned static's:
at least this multiplier without the sweep."""
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
    """Return the method that is judged on an axis, begun at a factor of the tuned learning rate."""
    return f"policy:{policy}@{PREFERENCES[axis]}@start={start}"


def load(folder: Path) -> Runs:
    """Return the runs of the comparison in `folder`, those that failed among them."""
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
    """One method, or one at several starts taken together, on every case."""

    cases: Mapping[str, Sequence[MethodOnCase]]

    def multiplier(self, baseline: str, axis: str) -> Estimate:
        """Return the median over cases, failures counting as worst."""
        return over_cases(list(self.by_case(baseline, axis).values()))

    def by_case(self, baseline: str, axis: str) -> dict[str, list[Bounded]]:
        """Return the multipliers of all runs by case."""
        parts = {case: [one.multipliers[baseline][axis] for one in found] for case, found in self.cases.items()}
        return {case: [value for part in found for value in part] for case, found in parts.items()}

    @property
    def counts(self) -> dict[str, int]:
        """How many runs there are, and how many of them came to nothing."""
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
            baseline: told(_together(list(starts.values())).multiplier(baseline, axis)) for baseline in BASELINES
        },
        "untuned_default": told(judged[UNTUNED].multiplier("tuned", axis)) if UNTUNED in judged else None,
    }


def _figures(found: OnCases, axis: str) -> dict[str, Any]:
    cases = {case: over_seeds(values) for case, values in found.by_case("tuned", axis).items()}
    known = {case: estimate for case, estimate in cases.items() if estimate.value is not None}
    worst = min(known, key=lambda case: (known[case].value, known[case].censored != "<"), default=None)
    return {
        **{baseline: told(found.multiplier(baseline, axis)) for baseline in BASELINES},
        "worst_case": None if worst is None else {"case": worst, "tuned": told(known[worst])},
        **found.counts,
        "tuned_by_case": {case: told(estimate) for case, estimate in cases.items()},
        "validation_losses": found.losses,
    }


def _all_axes(found: OnCases) -> dict[str, Any]:
    axes = {axis: {baseline: told(found.multiplier(baseline, axis)) for baseline in BASELINES} for axis in PREFERENCES}
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
        wanted = {"kind": kind, "axis": axis, "what": what, "at_least": at_least, "found": told(estimate)}
        counts = near or baseline != "tuned_with_sweep"
        found.append({**wanted, "reached": counts and reached(estimate, at_least)})
    lost = sum(one.counts["n_diverged"] + one.counts["n_failed"] for one in starts.values())
    none = {"kind": "target", "axis": axis, "what": "runs that diverged or failed", "at_most": 0, "found": lost}
    return [*found, {**none, "reached": lost == 0 and bool(starts)}]


def _rank(estimate: Estimate) -> float:
    return -1.0 if estimate.value is None else estimate.value


def reached(estimate: Estimate, at_least: float) -> bool:
    """Return whether the figure itself is at least so much; one that lies below a known bound is not."""
    return estimate.value is not None and estimate.censored != "<" and estimate.value >= at_least


def _closed_against_open(judged: Mapping[str, OnCases], policy: str) -> dict[str, Any]:
    """Return in how many cases the policy with its eyes open ended better than its own average schedule."""
    closed, blind = (judged.get(f"{kind}:{policy}") for kind in ("policy", "open-loop"))
    if closed is None or blind is None:
        return {}
    middles = [(_middle(closed, case), _middle(blind, case)) for case in closed.cases]
    return {
        "cases": len(middles),
        "closed_better": sum(one < other for one, other in middles),
        "open_better": sum(other < one for one, other in middles),
        "nats_saved_by_case": [_rounded(other - one) if max(one, other) < math.inf else None for one, other in middles],
        "tuned": {name: told(one.multiplier("tuned", "tokens")) for name, one in (("closed", closed), ("open", blind))},
    }


def _second_look(runs: Runs, policy: str) -> dict[str, Any]:
    """Return by how much the policy ends below the tuned static, on validation text and on text nobody looks at."""
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
    """Return the median of the final losses on a case; a run without one counts as worst."""
    runs = [run for one in found.cases.get(case, ()) for run in one.runs]
    return median([math.inf if run.loss is None else run.loss for run in runs]) if runs else math.inf


def told(estimate: Estimate) -> dict[str, Any]:
    """Return an estimate as it stands in the file; `bound` is `<` or `>` where only that is known."""
    ends = {"value": estimate.value, "low": estimate.low, "high": estimate.high}
    return {**{name: _rounded(value) for name, value in ends.items()}, "bound": estimate.censored}


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{DIGITS}g}")


if __name__ == "__main__":
    main()
