"""Attack every promise of the documentation, and count what is held: `python -m tests.attack`, or `make attack`.

The tests are not collected from here, as an attack takes many minutes; `tests/test_attack.py` makes one attempt of each
kind.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Before torch is imported: forked processes are safe with one thread alone, and nothing may ask the network.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"

for _folder in (ROOT / "tests" / "helpers", ROOT / "benchmarks"):
    if str(_folder) not in sys.path:
        sys.path.insert(0, str(_folder))
