"""Say what a model's folder holds: weights, a tokenizer, or neither."""

from __future__ import annotations

from hashlib import file_digest
from pathlib import Path

from trainpilot.llm_runtime.files import digest
from trainpilot.llm_runtime.plain_values import shown

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


def teacher_folder(name: str) -> Path:
    """Return the model folder of a teacher, which may be given as the folder of a run that left a model.

    Raises:
        ValueError: it is no folder with weights.
    """
    folder = Path(name)
    if (folder / "model" / "config.json").is_file():
        folder = folder / "model"
    if not name.strip() or not folder.is_dir() or not holds_weights(folder):
        raise ValueError(
            f"teacher must be a model folder with weights or the folder of a finished run, got {shown(name)}"
        )
    return folder


def weights_digest(folder: Path) -> str:
    """Return a digest of a model's config and weights by their content, which is the same wherever they lie."""
    files = sorted(file for kind in ("config.json", "*.safetensors", "*.bin") for file in folder.glob(kind))
    found = {}
    for file in files:
        with file.open("rb") as stream:
            found[file.name] = file_digest(stream, "blake2b").hexdigest()
    return digest(found)
