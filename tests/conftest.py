"""Keep the tests off the network, off the screen, off the user's cache, and on as many threads as OMP_NUM_THREADS says.

That is one unless it is set from outside; processes that a test starts inherit it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

# Libraries read these when they are imported, which test modules do before any fixture runs.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRAINPILOT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    # Before each test: commands and tutorials set the number for the whole process. A torch that is imported
    # later takes it from OMP_NUM_THREADS itself.
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
