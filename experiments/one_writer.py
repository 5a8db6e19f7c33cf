"""Let one process at a time write into a folder, by a lock that the system releases when the process dies.

The lock is a file in the folder while a command runs. It moves no other file, is removed at the end, and one that a
killed process has left behind is free. Reading needs no lock. Whoever takes it first removes the temporary files that
killed processes have left in the folder and in the cache.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from trainpilot.llm_runtime.files import cache_dir, real_path, remove_abandoned, remove_leftovers

NAME = ".trainpilot.lock"
_ELSEWHERE = 1 << 30
"""Offset of the byte that is locked on Windows, where a locked byte cannot be read."""


@contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder in a `with` block; make the folder, and remove it again if nothing was written.

    Raises:
        ValueError: the path is a file, or another process holds the lock.
        OSError: the folder cannot be made, or its disk is full.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out must be a folder, got the file {folder}; choose another --out")
    made = _make(folder)
    try:
        path = lock_file(folder)
        handle = _take(path, folder)
        if handle is None:
            yield
            return
        try:
            _sign(handle)
            remove_leftovers(folder)
            remove_abandoned(cache_dir(), "*/.*")  # others may fill it now
            yield
        finally:
            _release(handle, path)
    finally:
        for each in made:
            with suppress(OSError):  # something was written into it
                each.rmdir()


def lock_file(folder: Path) -> Path:
    """Return the file that is locked: in the folder, or on Windows, which cannot replace a folder then, beside it."""
    if sys.platform != "win32":
        return folder / NAME
    folder = real_path(folder)
    return folder.with_name(f"{NAME}-{folder.name}")


def _make(folder: Path) -> list[Path]:
    """Make a folder, and return those that were missing, the innermost first."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _take(path: Path, folder: Path) -> int | None:
    """Return the handle of the locked file; `None` where nothing can be written, or nothing be locked."""
    while (handle := _open(path)) is not None:
        try:
            free = _lock(handle)
        except OSError as error:
            _release(handle, path)
            reason = f"{folder} cannot be locked ({error.strerror}); see to it that no second process writes there"
            warnings.warn(reason, stacklevel=4)
            return None
        if not free:
            holder = _holder(handle)
            os.close(handle)
            raise ValueError(f"out: {holder} is writing into {folder}; wait for its end, or choose another --out")
        if _same(handle, path):
            break
        os.close(handle)  # its last owner has removed the file in between
    return handle


def _open(path: Path) -> int | None:
    """Open or make the file; `None` in a folder that cannot be written: what cannot be written needs no lock."""
    for flags in (os.O_RDWR | os.O_CREAT, os.O_RDONLY):  # another user's file can be locked, though not be written
        try:
            return os.open(path, flags, 0o666)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT):
                raise
    return None


def _same(handle: int, path: Path) -> bool:
    """Return whether an open file still is the one at `path`."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _sign(handle: int) -> None:
    """Write down who holds the lock. Where that cannot be written it is held all the same."""
    with suppress(OSError):
        os.ftruncate(handle, 0)
        os.lseek(handle, 0, os.SEEK_SET)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())


def _holder(handle: int) -> str:
    os.lseek(handle, 0, os.SEEK_SET)
    text = os.read(handle, 200).decode(errors="replace")
    return "".join(letter for letter in text if letter.isprintable()) or "another process"


def _release(handle: int, path: Path) -> None:
    ours = _same(handle, path)  # not where the folder has been replaced
    if sys.platform == "win32":
        os.close(handle)  # an open file cannot be removed there
    if ours:
        with suppress(OSError):
            path.unlink()
    if sys.platform != "win32":
        os.close(handle)


if sys.platform == "win32":
    import msvcrt

    def _lock(handle: int) -> bool:
        os.lseek(handle, _ELSEWHERE, os.SEEK_SET)
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EDEADLK):
                return False
            raise
        return True

else:
    import fcntl

    def _lock(handle: int) -> bool:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
