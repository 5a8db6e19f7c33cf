"""Read the documents of a corpus from files, folders, globs, Python's own library and docs, or the Hugging Face Hub.

`corpus.py` turns them into token ids. `content_digest` identifies the text and the model files of a run.
"""

from __future__ import annotations

import glob
import importlib
import os
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from hashlib import blake2b
from pathlib import Path
from typing import Any

from trainpilot.llm_runtime.config import RunConfig
from trainpilot.llm_runtime.hub import asked_once
from trainpilot.llm_runtime.model_folder import holds_tokenizer, holds_weights, teacher_folder, weights_digest

DOCUMENT_END = "\0"
"""Separates two documents; a file that contains it is not accepted as text, so no document does."""

NOT_TEXT_TO_LEARN = {
    *("site-packages", "dist-packages", "__pycache__", "test", "tests"),
    *("idle_test", "idlelib", "lib2to3", "turtledemo"),
}
"""Folders left out of the `stdlib` source, at any depth."""
STDLIB, PYTHON_DOCS = "stdlib", "python-docs"

HUB_SOURCE = re.compile(r"hub:(?P<name>[^/:\s]+/[^/:\s]+)(?:/(?P<configuration>[^/:\s]+))?(?::(?P<split>\S+))?")
TEXT_COLUMNS = ("text", "content")


def read_documents(sources: Sequence[str]) -> list[str]:
    """Read every source in the order given; each distinct document counts once, empty ones are left out.

    Args:
        sources: each of them `stdlib` (the running interpreter's library sources), `stdlib:PATTERN[,PATTERN...]`
            (its top-level packages and modules of these names: `stdlib:asyncio,json`; `stdlib:*.py` for all
            single-file modules), `python-docs` (the interpreter's documentation topics: prose), a file, a folder
            (recursively), a glob (`**` for any depth), or `hub:OWNER/NAME[/CONFIGURATION][:SPLIT]`, where
            SPLIT is `train` if not given.

    Raises:
        ValueError: a source does not exist, cannot be read, is not UTF-8 text or holds no text.
    """
    documents = [document for source in sources for document in _read_source(source)]
    texts = list(dict.fromkeys(document for document in documents if document.strip()))
    if not texts:
        raise ValueError(
            f"text must not be empty, got {', '.join(sources) or 'no source'}; add another source with --text"
        )
    return texts


def _read_source(source: str) -> list[str]:
    if source == STDLIB:
        return _read_many(source, _standard_library())
    if source.startswith(f"{STDLIB}:"):
        return _read_many(source, _part_of_standard_library(source))
    if source == PYTHON_DOCS:
        return _python_docs()
    return [_read_hub(source)] if source.startswith("hub:") else _read_paths(source)


def _read_paths(source: str) -> list[str]:
    path = os.path.expanduser(source)
    if os.path.isfile(path):
        return [_read_file(Path(path))]
    if os.path.isdir(path):
        return _read_many(source, _files_below(Path(path), lambda name: not name.startswith(".")))
    if glob.has_magic(path):
        return _read_many(source, map(Path, sorted(glob.glob(path, recursive=True), key=os.fsencode)))
    raise ValueError(
        f"text must be an existing file, folder or glob, 'stdlib', 'python-docs' or 'hub:OWNER/NAME', got {source!r}; "
        "check the path, or use --text stdlib"
    )


# Files ------------------------------------------------------------------------------------------------------


def _read_file(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"text must be UTF-8, got '{path}' with another byte at position {error.start}; "
            "convert it, for example with: iconv -t utf-8"
        ) from error
    except OSError as error:
        raise ValueError(
            f"text must be readable, got '{path}' ({error.strerror or error}); check its permissions"
        ) from error
    if DOCUMENT_END in text:
        raise ValueError(f"text must be UTF-8 text, got '{path}' with NUL bytes; convert it, or leave it out")
    return text


def _read_many(source: str, paths: Iterable[Path]) -> list[str]:
    """Read those of `paths` that are readable UTF-8 text; a warning gives the number of the others."""
    files = [path for path in paths if path.is_file()]
    documents: list[str] = []
    for path in files:
        try:
            documents.append(_read_file(path))
        except ValueError:
            continue
    skipped = len(files) - len(documents)
    if not documents:
        found = f"{skipped} files, none of them UTF-8 text" if skipped else "no file"
        raise ValueError(
            f"text must hold at least one UTF-8 file, got {source!r} ({found}); check the path, or use --text stdlib"
        )
    if skipped:
        warnings.warn(f"text {source!r}: left out {skipped} of {len(files)} files, not UTF-8 text", stacklevel=2)
    return documents


def _files_below(root: Path, wanted: Callable[[str], bool]) -> list[Path]:
    """List the files below `root` with `wanted` names at every level, sorted by relative path."""
    found: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = filter(wanted, subfolders)
        found += [Path(folder, name) for name in filter(wanted, names)]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


# What the interpreter brings ---------------------------------------------------------------------------------


def _standard_library() -> list[Path]:
    files = _files_below(Path(sysconfig.get_path("stdlib")), lambda name: name not in NOT_TEXT_TO_LEARN)
    return [path for path in files if path.suffix == ".py"]


def _part_of_standard_library(source: str) -> list[Path]:
    """Return the files of the top-level packages and modules that match `stdlib:PATTERN[,PATTERN...]`."""
    parts = _packages_and_modules()
    wanted: set[str] = set()
    for pattern in source.removeprefix(f"{STDLIB}:").split(","):
        found = {name for name in parts if _is_called(name, pattern.strip())}
        if not found:
            raise ValueError(
                f"text {source!r} must name packages or modules of the standard library, got {pattern.strip()!r}, "
                "which is none; for example --text stdlib:asyncio,json, or stdlib:*.py for all single-file modules"
            )
        wanted |= found
    return [file for name in sorted(wanted) for file in parts[name]]


def _is_called(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name.removesuffix(".py"), pattern)


def _packages_and_modules() -> dict[str, list[Path]]:
    """Return the files of each top-level package and module of the standard library, without those of `python-docs`."""
    parts: dict[str, list[Path]] = {}
    root = Path(sysconfig.get_path("stdlib"))
    for file in _standard_library():
        parts.setdefault(file.relative_to(root).parts[0], []).append(file)
    return {name: files for name, files in parts.items() if name != "pydoc_data"}


def _python_docs() -> list[str]:
    """Read the topics of `help()`, one document each, sorted by name."""
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"text {PYTHON_DOCS!r} needs the interpreter's module pydoc_data.topics, got none; "
            "install Python's full standard library, or use --text stdlib"
        ) from error
    return [topics[name].replace(DOCUMENT_END, " ") for name in sorted(topics)]


# The Hub ----------------------------------------------------------------------------------------------------


def _read_hub(source: str) -> str:
    """Read the text column of a data set; its rows are documents, and equal rows are kept."""
    parts = HUB_SOURCE.fullmatch(source)
    if parts is None:
        raise ValueError(
            f"text from the Hub must read hub:OWNER/NAME[/CONFIGURATION][:SPLIT], got {source!r}; "
            "for example --text hub:Salesforce/wikitext/wikitext-2-raw-v1:train"
        )
    rows = _load_rows(source, parts)
    column = next((name for name in TEXT_COLUMNS if name in rows.column_names), None)
    if column is None:
        raise ValueError(
            f"text {source!r} must have a column {' or '.join(TEXT_COLUMNS)}, "
            f"got {', '.join(rows.column_names)}; save the column you want as a text file and use --text FILE"
        )
    return DOCUMENT_END.join(text.replace(DOCUMENT_END, " ") for text in rows[column] if text)


def _load_rows(source: str, parts: re.Match[str]) -> Any:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise ValueError(
            f"text {source!r} needs the package datasets, got no such package; "
            'run: pip install "trainpilot[hub]", or use --text FILE'
        ) from error
    try:
        with asked_once(parts["name"], "dataset"):
            return datasets.load_dataset(parts["name"], parts["configuration"], split=parts["split"] or "train")
    except Exception as error:  # `datasets` lets the errors of its network, file and parser packages through
        reason = next(iter(str(error).splitlines()), "")
        raise ValueError(
            f"text {source!r} is not reachable: {type(error).__name__}: {reason}; "
            "check name, configuration, split, access and network, or use --text FILE"
        ) from error


def content_digest(config: RunConfig) -> str:
    """Return a digest of the run's text, of its model's local files, and of its teacher if it has one.

    A config JSON counts by its content, so that the digest is the same on every machine, and so does a teacher; the
    files of a model's folder, which may be large, count by name, size and date.

    Raises:
        ValueError: the text, the model's config or the teacher cannot be read.
    """
    digest = blake2b(digest_size=8)
    for document in read_documents(config.text):
        digest.update(document.encode("utf-8"))
        digest.update(b"\0")
    digest.update(_model_content(Path(config.model)))
    if config.teacher is not None and config.distillation_weight:
        digest.update(weights_digest(teacher_folder(config.teacher)).encode())
    return digest.hexdigest()


def _model_content(path: Path) -> bytes:
    if path.is_file():
        return _content(path) if path.suffix == ".json" else _label(path)
    if not path.is_dir():
        return b""
    # Up to version 0.2 a tokenizer without weights was not used: results of then are not those of now.
    mark = b"with its tokenizer" if holds_tokenizer(path) and not holds_weights(path) else b""
    return b"".join(_label(file) for file in sorted(path.iterdir()) if file.is_file()) + mark


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ValueError(f"model: {file} is not readable: {error.strerror or error}; check its permissions") from error


def _label(file: Path) -> bytes:
    stat = file.stat()
    return f"{file.name}|{stat.st_size}|{stat.st_mtime_ns}\0".encode()
