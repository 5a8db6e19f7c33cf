"""The tutorials run as they stand, and print what they say, but for what depends on the machine."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from trainpilot.llm_runtime.interval import IntervalRecorder

FOLDER = Path(__file__).parents[2] / "docs" / "tutorials"
NEEDS = {"hugging_face": "accelerate", "lightning": "lightning"}
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", flags=re.M | re.S)
FIXED = ("148,880 parameters", "51,200 tokens", "50 decisions logged", "same weights: True", "contract held: True")
"""What no machine prints otherwise, where a tutorial shows it."""


def blocks(name: str) -> list[tuple[str, str]]:
    """Return language and content of each block of a tutorial."""
    return BLOCK.findall((FOLDER / f"{name}.md").read_text(encoding="utf-8"))


def shape(text: str) -> list[str]:
    """Return the lines of an output without what depends on the machine: fractions, meters, the policy's choices."""
    text = re.sub(r"^(refusals|rollbacks|fallen_back) .*$", r"\1 *", text, flags=re.M)
    text = re.sub(r"estimated|measured_counter|measured_power", "*", text)
    text = re.sub(r"\d+\.\d+(e[-+]\d+)?", "*", text)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith("{")]  # a Trainer's own


def check(shown: str, printed: str) -> None:
    assert shape(shown) == shape(printed)
    assert [words for words in FIXED if words in shown] == [words for words in FIXED if words in printed]


@pytest.fixture
def _steady_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every interval cost the same: the policy sees seconds and watts, and might decide differently by them."""
    measured = IntervalRecorder._cost

    def cost(self: IntervalRecorder) -> dict[str, Any]:
        return measured(self) | {"time_s": 1.0, "energy_j": 5.0, "power_w": 5.0}

    monkeypatch.setattr(IntervalRecorder, "_cost", cost)


@pytest.mark.slow
@pytest.mark.usefixtures("_steady_clock")
@pytest.mark.filterwarnings("ignore", "error:policy outside")
@pytest.mark.parametrize("name", ["plain_loop", "hugging_face", "lightning"])
def test_a_tutorial_s_blocks_run_one_after_the_other(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    monkeypatch.chdir(tmp_path)
    known: dict[str, Any] = {"__name__": "tutorial"}
    printed = ""
    for language, content in blocks(name):
        if language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(compile(content, f"{name}.md", "exec"), known)
            printed = output.getvalue()
        elif language == "text":
            check(content, printed)


@pytest.mark.slow
def test_the_script_of_two_processes_runs_under_torchrun(tmp_path: Path) -> None:
    by_language = dict(blocks("torchrun"))
    assert [language for language, _ in blocks("torchrun")].count("python") == 1
    (tmp_path / "together.py").write_text(by_language["python"], encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", *by_language["sh"].split()[1:]]
    done = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    check(by_language["text"], done.stdout)


@pytest.mark.parametrize("name", ["plain_loop", "hugging_face", "lightning", "torchrun"])
def test_a_tutorial_can_be_read(name: str) -> None:
    text = (FOLDER / f"{name}.md").read_text(encoding="utf-8")
    prose = BLOCK.sub("", text)
    assert max(len(line) for line in text.splitlines()) <= 120
    assert "!" not in prose
    for link in re.findall(r"\]\(([^)#]+)\)", prose):
        assert (FOLDER / link).exists(), link
    project = tomllib.loads((FOLDER.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(re.findall(r"trainpilot\[(\w+)\]", text)) <= set(project["optional-dependencies"])
