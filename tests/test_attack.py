"""The suite of attacks runs, one attempt of each kind, and its page says what its result holds."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.attack import ROOT
from tests.attack.page import PAGE, RESULT, page
from tests.attack.runner import KINDS, kind_of


def test_the_page_is_written_from_the_result() -> None:
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    assert PAGE.read_text(encoding="utf-8") == page(result), "run: python -m tests.attack --page"


def test_the_result_adds_up() -> None:
    kinds = json.loads(RESULT.read_text(encoding="utf-8"))["kinds"]
    assert set(kinds) == set(KINDS)
    for name, kind in kinds.items():
        assert set(kind["promises"]) == set(kind_of(name).PROMISES)
        failed = {each["number"] for found in kind["promises"].values() for each in found["failures"]}
        assert kind["held"] == kind["tried"] - len(failed)
        for found in kind["promises"].values():
            assert found["held"] == found["tried"] - len(found["failures"])


@pytest.mark.slow
def test_one_attempt_of_each_kind_is_made_and_held() -> None:
    command = [sys.executable, "-m", "tests.attack", "--example"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    failures = {name: found[0] if isinstance(found, list) else found for name, found in json.loads(done.stdout).items()}
    assert failures == {name: {} for name in KINDS}
