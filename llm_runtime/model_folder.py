"""Say what a model's folder holds: weights, a tokenizer, or neither."""

from __future__ import annotations

from pathlib import Path

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
)
"""A folder with one of these holds a tokenizer."""


def holds_weights(folder: Path) -> bool:
    """Return whether a model in the folder is fine-tuned; without weights it is trained from scratch."""
    return any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))


def holds_tokenizer(folder: Path) -> bool:
    """Return whether the folder's model comes with its tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)
