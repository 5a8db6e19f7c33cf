"""The page that describes the environment is in step with the code, and its example runs."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import TOY_CASE, ToyPlant

from docs.generate import environment as field_tables
from trainpilot.envs import environments as live_training
from trainpilot.envs.action import ACTION_FIELDS, KEEP
from trainpilot.envs.environments import LiveTraining
from trainpilot.envs.observation import OBSERVATION_FIELDS
from trainpilot.envs.reward import UTILITIES, ScalarReward
from trainpilot.llm_runtime.simulator.runs import default_pool

PAGE = Path(__file__).parents[2] / "docs" / "environment.md"


def test_the_page_is_in_step_with_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    field_tables.main()
    printed = capsys.readouterr().out

    assert PAGE.read_text(encoding="utf-8") == printed, (
        "docs/environment.md is old; write it anew: python -m docs.generate.environment > docs/environment.md"
    )


def test_a_table_is_markdown() -> None:
    assert field_tables.table(("a", "b"), [(1, "x"), (2, "y")]) == "| a | b |\n| --- | --- |\n| 1 | x |\n| 2 | y |"


def test_every_field_choice_and_utility_is_on_the_page() -> None:
    page = field_tables.markdown()

    assert [f"`{field.name}`" in page for field in OBSERVATION_FIELDS] == [True] * len(OBSERVATION_FIELDS)
    assert [", ".join(field.choices) in page for field in ACTION_FIELDS] == [True] * len(ACTION_FIELDS)
    assert [f"| `{name}` |" in page for name in UTILITIES] == [True] * len(UTILITIES)


def test_the_mask_slices_cover_the_flat_mask() -> None:
    slices = [tuple(map(int, found)) for found in re.findall(r"`\[(\d+):(\d+)\]`", field_tables.mask_table())]
    sizes = [len(field.choices) for field in ACTION_FIELDS]

    assert [end - start for start, end in slices] == sizes
    assert (slices[0][0], slices[-1][1]) == (0, sum(sizes))
    assert all(before[1] == after[0] for before, after in pairwise(slices))


def test_every_key_of_info_is_on_the_page() -> None:
    env = ScalarReward(LiveTraining([TOY_CASE], make_plant=ToyPlant))
    env.reset(seed=0)
    *_, info = env.step(np.array(KEEP))

    assert [key for key in info if f"`{key}`" not in field_tables.markdown()] == []


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    example, _ = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    monkeypatch.setenv("TRAINPILOT_CACHE", str(tmp_path))
    monkeypatch.setattr(live_training, "live_plant", lambda: ToyPlant)  # a real run of it takes some seconds
    exec(compile(example, str(PAGE), "exec"), {})

    assert re.fullmatch(r"loss \d\.\d\d nats/token, utility -?\d\.\d\d\n", capsys.readouterr().out)


def test_the_ways_to_make_it_run(monkeypatch: pytest.MonkeyPatch) -> None:
    few = default_pool(8)  # the usual pool takes seconds
    monkeypatch.setattr("trainpilot.envs.environments._pool", lambda: few)
    _, example = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    made: dict[str, Any] = {}
    exec(compile(example, str(PAGE), "exec"), made)

    assert made["picture"].shape == (480, 480, 3)
    assert made["observations"].shape[0] == 64
