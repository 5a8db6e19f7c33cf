"""Attack every promise of the documentation, and count what is held: `python -m tests.attack`, or `make attack`.

The tests are not collected from here, as an attack takes many minutes; `tests/test_attack.py` makes one attempt of each
kind.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Before torch is imported: a forked process is safe with one thread alone, and nothing may ask the network.
for _name, _value in {
    "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "MPLBACKEND": "Agg"
}.items():  # fmt: skip
    os.environ.setdefault(_name, _value)

for _folder in (ROOT / "tests" / "helpers", ROOT / "benchmarks"):
    if str(_folder) not in sys.path:
        sys.path.insert(0, str(_folder))
