"""Tell whether two runs of one configuration see the same text and start from the same model files."""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path

from trainpilot.llm_runtime.run_config import RunConfig
from trainpilot.llm_runtime.text_sources import read_documents


def content_digest(config: RunConfig) -> str:
    """Return a digest of the run's text and of its model's local files.

    A config JSON counts by its content, so that the digest is the same on every machine; the files of a folder, which
    may be large, count by name, size and date.

    Raises:
        ValueError: the text or the model's config cannot be read.
    """
    digest = blake2b(digest_size=8)
    for document in read_documents(config.text):
        digest.update(document.encode("utf-8"))
        digest.update(b"\0")
    digest.update(_model_content(Path(config.model)))
    return digest.hexdigest()


def _model_content(path: Path) -> bytes:
    if path.is_file():
        return _content(path) if path.suffix == ".json" else _label(path)
    return b"".join(_label(file) for file in sorted(path.iterdir()) if file.is_file()) if path.is_dir() else b""


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ValueError(f"model: {file} is not readable: {error.strerror or error}; check its permissions") from error


def _label(file: Path) -> bytes:
    stat = file.stat()
    return f"{file.name}|{stat.st_size}|{stat.st_mtime_ns}\0".encode()
