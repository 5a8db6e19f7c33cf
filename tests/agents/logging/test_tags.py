from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from decision_records import decision_record, reference_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainpilot.agents.logging.run_log import RunWriter
from trainpilot.agents.logging.tags import GROUPS, TAGS, choice_tag, markdown, multiline, tags_of
from trainpilot.envs.action import ACTION_FIELDS, KEEP
from trainpilot.envs.decision import Advice
from trainpilot.envs.observation import OBSERVATION_FIELDS
from trainpilot.llm_runtime.config import Controls

PAGE = Path(__file__).resolve().parents[3] / "docs" / "metrics.md"
FINAL = {tag.name.removeprefix("final/"): 1.0 for tag in TAGS.values() if tag.name.startswith("final/")}


def written_tags(folder: Path) -> set[str]:
    events = EventAccumulator(str(folder))
    events.Reload()
    tags = events.Tags()
    texts = {tag.removesuffix("/text_summary") for tag in tags["tensors"] if tag.endswith("/text_summary")}
    return set(tags["scalars"]) | texts


def test_a_steered_run_writes_every_tag_of_the_table_and_no_other(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path)
    writer.write(decision_record(0))
    writer.write(decision_record(1, refusals=("batch_size double: 32 sequences outside [4, 16]",)))
    advice = Advice(action=KEEP, controls=Controls(batch_size=8))
    writer.write(decision_record(2, advice=advice))
    writer.write_summary({"tokens": 2000})
    writer.write_hparams({"seed": 0}, FINAL)
    writer.close()

    assert written_tags(tmp_path / "run") == {tag.name for tag in tags_of("run")}


def test_the_reference_writes_tags_of_the_steered_run(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path)
    writer.write_reference(reference_run())
    writer.close()

    written = written_tags(tmp_path / "reference")
    assert written <= {tag.name for tag in tags_of("run")}
    without = {"decision", "advice", "reward", "observation", "masks", "final"}
    assert {tag.partition("/")[0] for tag in TAGS if TAGS[tag] in tags_of("run")} - without == {
        tag.partition("/")[0] for tag in written
    }


def test_names_are_unique_and_every_tag_has_unit_and_meaning() -> None:
    names = Counter(tag.name for group in GROUPS for tag in group.tags)

    assert max(names.values()) == 1
    assert all(tag.unit and tag.meaning and not tag.meaning.endswith(".") for tag in TAGS.values())
    assert all(tag.name.startswith(f"{group.prefix}/") for group in GROUPS for tag in group.tags)


def test_every_observation_field_and_every_choice_has_a_tag() -> None:
    assert {f"observation/{field.name}" for field in OBSERVATION_FIELDS} <= set(TAGS)
    assert [choice_tag(ACTION_FIELDS[1], choice) for choice in range(3)] == [
        "action/batch_size/half",
        "action/batch_size/keep",
        "action/batch_size/double",
    ]
    assert choice_tag(ACTION_FIELDS[3], 1) == "action/pruning/plus_5_percent"
    assert choice_tag(ACTION_FIELDS[4], 0) == "action/finish/go_on"


def test_a_chart_matches_its_tags_and_not_longer_ones() -> None:
    assert multiline("loss/train", "action/learning_rate/x0.5") == [
        "Multiline",
        ["^loss/train$", r"^action/learning_rate/x0\.5$"],
    ]
    with pytest.raises(KeyError):
        multiline("loss/unknown")


def test_the_page_is_in_step_with_the_table() -> None:
    assert PAGE.read_text(encoding="utf-8") == markdown().rstrip() + "\n", "run: make docs"


def test_the_page_has_one_row_of_three_cells_per_tag() -> None:
    rows = [line for line in markdown().splitlines() if line.startswith("| `")]

    assert len(rows) == len(TAGS)
    assert all(row.count("|") == 4 for row in rows)


def test_the_module_prints_the_page() -> None:
    outcome = subprocess.run(
        [sys.executable, "-m", "trainpilot.agents.logging.tags"],
        capture_output=True,
        text=True,
        check=True,
        encoding="utf-8",
    )

    assert outcome.stdout == PAGE.read_text(encoding="utf-8")
