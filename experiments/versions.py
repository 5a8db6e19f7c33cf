"""Name the versions that a result was made with."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("trainpilot", "torch", "transformers", "gymnasium", "stable-baselines3", "sb3-contrib", "numpy")


def versions() -> dict[str, str]:
    """Return Python's and the main packages' versions."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
