"""Write and read snapshots: whole files, and nothing in them that could run code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from trainpilot.llm_runtime.files import whole_file


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write tensors, numbers, text and containers of these. Raises `OSError` where the disk is full."""
    with whole_file(path) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:  # torch's own writer hides the system's error
            raise OSError(f"cannot write {path.name}: {str(error).splitlines()[0]}") from error


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """Return what `save_checkpoint` wrote, or `None` where there is no file.

    Raises:
        ValueError: the file is damaged or holds something else.
    """
    if not path.is_file():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged or foreign file
        raise ValueError(f"out: {path} cannot be resumed ({type(error).__name__}); remove it to start anew") from error
    if not isinstance(content, dict):
        raise ValueError(f"out: {path} cannot be resumed (no checkpoint of a run); remove it to start anew")
    return content
