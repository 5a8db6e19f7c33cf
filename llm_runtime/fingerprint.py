"""Tell whether two runs of one configuration see the same text and start from the same model files."""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path

from trainpilot.llm_runtime.run_config import RunConfig
from trainpilot.llm_runtime.text_sources import read_documents


def content_digest(config: RunConfig) -> str:
    """Return a digest of the run's text, and of name, size and date of its model's local files.

    Raises:
        ValueError: the text cannot be read.
    """
    digest = blake2b(digest_size=8)
    for document in read_documents(config.text):
        digest.update(document.encode("utf-8"))
        digest.update(b"\0")
    for file in _model_files(Path(config.model)):
        stat = file.stat()
        digest.update(f"{file.name}|{stat.st_size}|{stat.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def _model_files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.is_file())
    return [path] if path.is_file() else []
