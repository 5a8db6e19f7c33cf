"""The page about runs: offline, escaped, with losses, controls, reasons, costs, refusals and rollbacks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from decision_records import decision_record, decision_records, reference_run, write_run
from explained_runs import NOISE_BY_DECISION, planted, seen, steered
from html_pages import seen as read_page
from rich.console import Console

from trainpilot.agents.controller import DecisionRecord
from trainpilot.envs.action import KEEP
from trainpilot.envs.decision import Advice
from trainpilot.experiments.options import ReportOptions
from trainpilot.experiments.report.run_charts import (
    control_panels,
    looks_of,
    refused_controls,
    validation_course,
)
from trainpilot.experiments.report.run_page import build, render, report
from trainpilot.experiments.stored_run import cost_parts, read_run, read_runs
from trainpilot.llm_runtime.config import Controls

DOUBLE, HOTTER = (3, 2, 0, 0, 0), (6, 1, 0, 0, 0)
NASTY = '<script>alert("x")</script> & $\\frac{ \x1b[31m'


def stored(folder: Path, records: Sequence[DecisionRecord], **summary: Any) -> Path:
    write_run(folder, list(records))
    if summary:
        (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder


def taken_back() -> list[DecisionRecord]:
    """Return a run of four decisions: the second and the third go wrong and are made again."""
    wrong = [
        decision_record(1, requested=HOTTER, allowed=HOTTER, learning_rate=4e-3, train_loss=7.0),
        decision_record(2, train_loss=float("nan"), diverged=True, learning_rate=4e-3),
    ]
    again = decision_record(1, refusals=("taken back: the loss is not finite",))
    refused = decision_record(
        2, requested=DOUBLE, allowed=KEEP, refusals=("batch_size double: 16 sequences outside [4, 8]",)
    )
    return [decision_record(0), *wrong, again, refused, decision_record(3)]


def test_what_was_taken_back_does_not_stand(tmp_path: Path) -> None:
    run = read_run(stored(tmp_path / "a", taken_back()))

    assert run.standing == (0, 3, 4, 5)
    assert [(back.intervals, back.reason) for back in run.rollbacks] == [((1, 2), "the loss is not finite")]
    assert (run.n_changes, run.n_refusals) == (1, 1)
    assert refused_controls(run, 4) == [False, True, False, False, False]
    assert [run.began_at(place) for place in run.standing] == [0.0, 0.25, 0.5, 0.75]
    assert run.time_s == 12.0, "six intervals of 2 s: what was taken back was paid for"
    # Of each interval's 2 s and 10 J: 1.25 s training, 0.5 s probe, 0.25 s switching; 1 s of evaluation beside it.
    assert cost_parts(run)["curvature probe"] == (3.0, 15.0)
    assert cost_parts(run)["evaluation"] == (6.0, None)


def test_lines_that_a_resumed_run_wrote_again_are_no_rollback(tmp_path: Path) -> None:
    records = [decision_record(0), decision_record(1), decision_record(1), decision_record(2)]
    run = read_run(stored(tmp_path / "a", records))

    assert run.standing == (0, 2, 3)
    assert run.rollbacks == ()


def test_a_validation_loss_stands_where_it_was_measured(tmp_path: Path) -> None:
    records = [decision_record(d, validation_loss=loss) for d, loss in enumerate((5.5, 5.5, 4.0, 4.0))]
    run = read_run(stored(tmp_path / "a", records, final_validation_loss=3.5))

    # Measured before the run, at the end of the second interval (it stands in the third), and at the end.
    assert validation_course(run) == [(0.0, 5.5), (2000.0, 4.0), (4000.0, 3.5)]


def offline(html: str) -> None:
    page = read_page(html)
    assert page.sources == []
    assert all(target.startswith("#") for target in page.targets)
    assert {target[1:] for target in page.targets} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert not page.tags & {"script", "link", "img", "iframe", "object"}
    assert not re.search(r"https?:|@import|url\((?!#)", html)


def test_one_run_beside_its_reference(tmp_path: Path) -> None:
    folder = stored(tmp_path / "steered", taken_back(), policy="default", final_validation_loss=2.5, co2e_g=0.5)
    reference_run().write(folder / "reference.json")
    html = render([read_run(folder)])

    offline(html)
    text = read_page(html).text
    assert "steered has a validation loss of 2.5000, 0.5000 below the reference run" in text
    assert "the policy changed something in 1 of 6 decisions" in text
    assert "1 choice refused and 1 rollback. It took 12.0 s and 60.0 J (measured_counter)" in text
    assert "1.50 times the seconds and 0.75 times the joules of the reference run" in text
    assert "25 % to 75 %" in text
    assert "2 intervals from decision 1 on the loss is not finite" in text
    assert "batch_size double: 16 sequences outside [4, 8]" in text
    assert "no reference run" not in text


def test_runs_are_compared_with_a_run_that_is_given(tmp_path: Path) -> None:
    settings = ({"text": ["a"], "seed": 0}, {"text": ["b"], "seed": 1})
    for name, loss, config in zip("ab", (2.5, 2.75), settings, strict=True):
        folder = stored(tmp_path / name, decision_records(), policy="none", final_validation_loss=loss)
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    base = stored(tmp_path / "base", decision_records(), policy="none", final_validation_loss=3.0)
    out = tmp_path / "page.html"
    options = ReportOptions(path=(tmp_path / "a", tmp_path / "b", base), out=out, reference=base)

    report(options, Console(quiet=True))

    offline(out.read_text(encoding="utf-8"))
    text = read_page(out.read_text(encoding="utf-8")).text
    assert "a has the lowest validation loss of 2 runs, 2.5000, 0.5000 below base" in text
    assert "The runs differ in text: their losses cannot be compared." in text
    assert "seed 0 1" in text


@pytest.mark.parametrize(
    ("policies", "says"),
    [
        (("none", "default"), "No run is the reference of the others: to compare them with a, give it as --reference."),
        (("default",), "There is no reference run: what the same training reaches without steering is not shown."),
        (("none",), None),
    ],
)
def test_what_a_page_without_reference_lacks_is_said(
    tmp_path: Path, policies: tuple[str, ...], says: str | None
) -> None:
    folders = [stored(tmp_path / n, decision_records(), policy=p) for n, p in zip("ab", policies, strict=False)]
    text = read_page(render([read_run(folder) for folder in folders])).text

    assert (says in text) if says else ("reference" not in text)


def test_seconds_of_a_busy_machine_are_doubted(tmp_path: Path) -> None:
    folder = stored(tmp_path / "a", decision_records(), policy="none", busy_machine="the machine was busy (a test)")

    assert "a: the machine was busy (a test)." in read_page(render([read_run(folder)])).text


def test_everything_from_files_is_escaped(tmp_path: Path) -> None:
    folder = tmp_path / 'x<b>"$\\frac{'
    refusals = (f"batch_size {NASTY}", f"taken back: {NASTY}")
    records = [decision_record(0), decision_record(1), decision_record(1, refusals=refusals)]
    summary = {"policy": NASTY, "model": NASTY, "fallen_back": NASTY, "domain_warnings": [NASTY], NASTY: NASTY}
    stored(folder, records, **summary)
    (folder / "config.json").write_text(json.dumps({NASTY: NASTY, "policy": NASTY}), encoding="utf-8")
    html = render([read_run(folder)])

    offline(html)
    assert "<script" not in html
    assert "<b>&#34;" not in html
    assert "&lt;script&gt;alert(&#34;x&#34;)" in html
    assert "\\frac{" in html, "a dollar sign begins no formula"


def test_the_reasons_are_sentences_with_numbers_in_the_charts(tmp_path: Path) -> None:
    bundle = planted()
    bundle.save(tmp_path / "policy.safetensors")
    records = steered([seen(d, noise_scale=n, curvature=0.1) for d, n in enumerate(NOISE_BY_DECISION)], bundle)
    folder = stored(tmp_path / "run", records)
    (folder / "config.json").write_text(json.dumps({"policy": str(tmp_path / "policy.safetensors")}), encoding="utf-8")
    html = render([read_run(folder)])

    offline(html)
    text = read_page(html).text
    assert "50 %: batch size double rather than keep. For it: noise scale 2.75 (high, +1.5)." in text
    assert "What these fields mean" in text
    numbers = re.findall(r"<text[^>]*>(\d)</text>", html)
    assert {"1", "2"} <= set(numbers)

    (tmp_path / "policy.safetensors").unlink()
    assert "The decisions cannot be explained: policy: no file" in read_page(render([read_run(folder)])).text


def test_advice_is_drawn_beside_what_was_done(tmp_path: Path) -> None:
    advice = Advice(action=DOUBLE, controls=Controls(batch_size=16, learning_rate_scale=2.0, precision="bf16"))
    run = read_run(stored(tmp_path / "a", [decision_record(d, requested=DOUBLE, advice=advice) for d in range(4)]))
    page = build([run])

    assert "In a the policy only advised" in " ".join(page.cautions)
    assert run.n_changes == 4
    panels, _ = control_panels(looks_of([run], None))
    batch = next(panel for panel in panels if panel.title == "batch")
    levels = {float(y) for line in batch.axes.lines for y in np.asarray(line.get_ydata())}
    assert levels >= {8.0, 16.0}


@pytest.mark.parametrize(
    "change",
    [
        lambda r: replace(r, telemetry=replace(r.telemetry, energy_j=None, energy_source=None, validation_loss=None)),
        lambda r: replace(r, telemetry=replace(r.telemetry, train_loss=float("nan"), diverged=True)),
        lambda r: replace(r, telemetry=replace(r.telemetry, learning_rate=0.0, batch_size=float("nan"), time_s=0.0)),
        lambda r: replace(r, telemetry=replace(r.telemetry, precision="fp16", sparsity=0.5, budget_used=0.0)),
    ],
)
@pytest.mark.parametrize("n", [1, 4])
def test_any_run_makes_a_page(tmp_path: Path, change: Callable[[DecisionRecord], DecisionRecord], n: int) -> None:
    folder = stored(tmp_path / "a", [change(record) for record in decision_records()[:n]])
    (folder / "summary.json").write_text("{", encoding="utf-8")

    offline(render([read_run(folder)]))


def test_seven_runs_of_one_name_are_in_the_tables(tmp_path: Path) -> None:
    folders = [stored(tmp_path / str(index) / "run", decision_records()) for index in range(7)]
    page = build(read_runs(folders))

    assert [line.name for line in page.glance.groups[0][1]] == [str(folder) for folder in folders]
    assert page.not_drawn == "The last 1 run stand in the tables only."


@pytest.mark.parametrize(
    ("paths", "out", "message"),
    [
        ((), "page.html", "path must name at least one run's folder"),
        (("nowhere",), "page.html", "path must hold a run's telemetry.jsonl, got nowhere"),
        (("a",), "page", "out must be the page to write, such as report.html, got page"),
    ],
)
def test_what_cannot_be_shown(paths: tuple[str, ...], out: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        report(ReportOptions(path=tuple(map(Path, paths)), out=Path(out)), Console(quiet=True))
