"""A fake of the parts of Zeus 0.16 that are used, which reports what the file that `FAKE_ZEUS` names says."""

import json
import os
from pathlib import Path
from typing import Any


def reported() -> dict[str, Any]:
    """Return what the test wants to be reported now."""
    found: dict[str, Any] = json.loads(Path(os.environ["FAKE_ZEUS"]).read_text(encoding="utf-8"))
    return found
