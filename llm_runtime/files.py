"""Write files, folders, JSON and checkpoints atomically: to a temporary name first, then renamed.

A crash therefore leaves no half-written file. What it leaves under a temporary name, the next write into the same
folder removes. Checkpoints are read with `weights_only`, so that they run no code.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

from trainpilot.llm_runtime.plain_values import one_line


def cache_dir() -> Path:
    """Return the cache folder, `$TRAINPILOT_CACHE` or the user's; all of its contents can be computed again."""
    if chosen := os.environ.get("TRAINPILOT_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trainpilot"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder, which replaces `path` if the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path.parent)
    handle, name = tempfile.mkstemp(prefix=_prefix(path.name), dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        _name(error, temporary, path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`, which replaces `path` if the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path.parent)
    temporary = Path(tempfile.mkdtemp(prefix=_prefix(path.name), dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
    except OSError as error:
        _name(error, temporary, path)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# Temporary files whose writer has died --------------------------------------------------------------------------------

_TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}")
"""How `tempfile` names the temporary files and folders above, and those of version 0.1."""
_SIGNED = re.compile(r"\..+\.([0-9a-f]{16})-([0-9]{1,9})\.[a-z0-9_]{8}")
"""The same with machine and process of the writer, which version 0.1 did not write."""
NAME_LENGTH = 40
"""Characters of a file's name in its temporary one, which must not become too long for the system."""
ABANDONED_S = 7 * 86_400.0
"""Seconds without a change after which a temporary file is given up where nobody knows whether its writer lives."""


def _prefix(name: str) -> str:
    """Return how the temporary name of a file begins: it says which process writes it, and on which machine."""
    return f".{name[:NAME_LENGTH]}.{_machine() or '0' * 16}-{os.getpid()}."


def _machine() -> str | None:
    """Return a digest of host, start of the system and container, in which a process is known by its number.

    `None` where the system does not say so: all but Linux.
    """
    try:
        if os.readlink("/proc/self") != str(os.getpid()):
            return None  # what is seen here are the processes of another container
        started = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        return digest([socket.gethostname(), started, os.readlink("/proc/self/ns/pid")])
    except OSError:
        return None


def remove_abandoned(folder: Path, pattern: str = ".*") -> None:
    """Remove the temporary files and folders whose writers have died; others may write into the folder meanwhile.

    The writer is known to have died if it was a process of this machine, or container, which the system no longer
    has. Others may live: on another machine that shares the folder, or in another container. Theirs are removed once
    nothing in them has changed for a week. An error is ignored, as nothing depends on it.

    Args:
        folder: The folder.
        pattern: Which paths in it are looked at, as in `Path.glob`.
    """
    with suppress(OSError):
        for path in list(folder.glob(pattern)):
            if (found := _SIGNED.fullmatch(path.name)) and _is_abandoned(path, found[1], int(found[2])):
                _remove(path)


def _is_abandoned(path: Path, machine: str, process: int) -> bool:
    """Return whether nobody writes a temporary file any more."""
    if machine == _machine():
        try:
            os.kill(process, 0)
        except OSError as error:
            return error.errno == errno.ESRCH
        return False
    try:
        changed = [each.lstat().st_mtime for each in (path, *path.rglob("*"))]
    except OSError:  # somebody is at work there
        return False
    return time.time() - max(changed) > ABANDONED_S


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files and folders that a process which was killed has left; nobody else may write there."""
    for path in list(folder.rglob(".*")):
        if _TEMPORARY.fullmatch(path.name):
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def real_path(path: Path) -> Path:
    """Return a path without links in it. Unlike `Path.resolve`, it passes over a link that leads to itself."""
    return Path(os.path.realpath(path))


def check_writable(folder: Path) -> None:
    """Raise `OSError` where no file can be written into a folder, which need not be there yet; nothing is left."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    if place.is_dir():  # another kind of error is for whoever looks at the folder itself
        remove_abandoned(place)
        with tempfile.TemporaryDirectory(prefix=_prefix("trainpilot"), dir=place):
            pass


def _name(error: OSError, temporary: Path, path: Path) -> None:
    """Let an error tell of the path that was to be written, and not of the temporary one, or of none."""
    if error.filename is None or Path(error.filename).is_relative_to(temporary):
        error.filename = str(path)


ALMOST_FULL = 2**20
"""Bytes; with fewer left, a failed write is put down to a full disk."""


@contextmanager
def system_errors(path: Path, hiding: type[Exception]) -> Iterator[None]:
    """Raise the system's `OSError` in place of the error behind which a library hides it.

    Args:
        path: What is being written.
        hiding: Type of the library's error: safetensors has its own, torch raises `RuntimeError`.
    """
    try:
        yield
    except hiding as error:
        number = errno.EIO
        if found := re.search(r"os error (\d+)", str(error)):
            number = int(found[1])
        elif shutil.disk_usage(path.parent).free < ALMOST_FULL:
            number = errno.ENOSPC
        raise OSError(number, os.strerror(number), str(path)) from error


def _umask() -> int:
    """Return the process's file mode mask, which can only be read by setting it; temporary files ignore it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def digest(content: Any, size: int = 8) -> str:
    """Return a hexadecimal digest of `size` bytes: of bytes, of text, or of plain JSON values whatever their order."""
    if not isinstance(content, bytes | memoryview | str):
        content = json.dumps(content, sort_keys=True)
    return blake2b(content.encode() if isinstance(content, str) else content, digest_size=size).hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, atomically. Raises `ValueError` for NaN and infinity, which JSON lacks."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write tensors, numbers, text and containers of these, atomically. Raises `OSError` if the disk is full."""
    import torch

    with whole_file(path) as temporary, system_errors(path, RuntimeError):
        torch.save(content, temporary)


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """Return the content that `save_checkpoint` wrote, or `None` if there is no file.

    Raises:
        ValueError: the file is damaged or holds something else.
    """
    if not path.is_file():
        return None
    import torch

    with resuming(path):
        _check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict):
            raise ValueError("no checkpoint of a run")
    return content


@contextmanager
def resuming(path: Path) -> Iterator[None]:
    """Turn whatever a damaged or foreign checkpoint raises in the block into one line that says what to do."""
    try:
        yield
    except Exception as error:  # torch raises many kinds
        why = type(error).__name__ if type(error) is not ValueError else one_line(error)
        raise ValueError(f"out: {path} cannot be resumed ({why}); remove it to start anew") from error


def _check_archive(path: Path) -> None:
    """Raise `ValueError` for a file that torch did not write so: what it holds is not compressed, and its sums fit."""
    with zipfile.ZipFile(path) as archive:
        size = sum(each.file_size for each in archive.infolist())
        if size > path.stat().st_size:
            raise ValueError("its content is larger than the file")
        if archive.testzip() is not None:
            raise ValueError("its content is not what was written")
