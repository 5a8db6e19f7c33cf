"""What cannot be written is one system error that names the path asked for, and leaves nothing behind."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors import SafetensorError

from trainpilot.llm_runtime import files
from trainpilot.llm_runtime.files import (
    check_writable,
    load_checkpoint,
    save_checkpoint,
    system_errors,
    whole_file,
    whole_folder,
    write_json,
)


class Usage(NamedTuple):
    """Bytes of a disk, as `shutil.disk_usage` returns them."""

    free: int


@pytest.mark.parametrize(
    ("filename", "named"), [(None, "file"), ("temporary", "file"), ("another", "another")], ids=str
)
def test_an_error_names_the_file_that_was_asked_for(tmp_path: Path, filename: str | None, named: str) -> None:
    def write() -> None:
        with whole_file(tmp_path / "file") as temporary:
            temporary.write_text("half")
            paths = {None: None, "temporary": str(temporary), "another": str(tmp_path / "another")}
            raise OSError(errno.ENOSPC, "No space left", paths[filename])

    with pytest.raises(OSError, match="No space left") as error:
        write()
    assert error.value.filename == str(tmp_path / named)
    assert list(tmp_path.iterdir()) == []


def test_an_error_names_the_folder_that_was_asked_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as error, whole_folder(tmp_path / "folder") as temporary:
        (temporary / "nowhere" / "file").touch()
    assert error.value.filename == str(tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


def test_safetensors_tells_the_systems_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Permission denied") as error, system_errors(tmp_path / "a", SafetensorError):
        raise SafetensorError("Error while serializing: I/O error: Permission denied (os error 13)")
    assert (error.value.errno, error.value.filename) == (errno.EACCES, str(tmp_path / "a"))
    with pytest.raises(RuntimeError, match="another"), system_errors(tmp_path / "a", SafetensorError):
        raise RuntimeError("another")


@pytest.mark.parametrize(("free", "number"), [(4096, errno.ENOSPC), (2**30, errno.EIO)])
def test_torchs_error_is_a_full_disk_if_the_disk_is_full(
    tmp_path: Path, free: int, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0\nmore")

    save_checkpoint(tmp_path / "checkpoint.pt", {"at": torch.ones(2)})
    monkeypatch.setattr(torch, "save", fail)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(free))
    with pytest.raises(OSError, match=os.strerror(number)) as error:
        save_checkpoint(tmp_path / "checkpoint.pt", {"at": torch.zeros(2)})
    assert error.value.errno == number
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    kept = load_checkpoint(tmp_path / "checkpoint.pt")
    assert kept is not None
    assert torch.equal(kept["at"], torch.ones(2)), "the earlier one stays"


# Temporary files whose writer has died --------------------------------------------------------------------------------

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="other systems do not say which process lives")
KILLED_IN_WRITING = """
import sys, time
from pathlib import Path
from trainpilot.llm_runtime.files import whole_file, whole_folder

with whole_folder(Path(sys.argv[1]) / "folder") as folder, whole_file(folder / "inner") as file:
    with whole_file(Path(sys.argv[1]) / ("a long name " * 10)):
        file.write_text("half")
        print("writing", flush=True)
        time.sleep(600)
"""


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@on_linux
@pytest.mark.parametrize(
    "write", [lambda place: write_json(place / "other", 1), check_writable], ids=["write", "check"]
)
def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path: Path, write: Callable[[Path], None]) -> None:
    command = [sys.executable, "-c", KILLED_IN_WRITING, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        left = names(tmp_path)
        assert len(left) == 2
        write(tmp_path)
        assert left <= names(tmp_path), "it still writes"
        process.send_signal(signal.SIGKILL)
    write(tmp_path)
    assert names(tmp_path) <= {"other"}


def test_only_what_is_abandoned_for_certain_is_removed(tmp_path: Path) -> None:
    here, elsewhere, gone = files._machine() or "0" * 16, "f" * 16, 999_999_999
    kept = [
        f".a.{here}-{os.getpid()}.abcd1234", f".b.{here}-1.abcd1234", f".c.{elsewhere}-{gone}.abcd1234",
        ".d.abcd1234", ".config.settings", f"e.{here}-{gone}.abcd1234",
    ]  # fmt: skip
    old = [f".f.{elsewhere}-{gone}.abcd1234", f".g.{elsewhere}-{gone}.abcd1234"]
    for name in (*kept, *old[:1]):
        (tmp_path / name).touch()
    (tmp_path / old[1]).mkdir()
    (tmp_path / old[1] / "part").touch()
    for name in (old[0], f"{old[1]}/part", old[1], kept[3], kept[4]):
        os.utime(tmp_path / name, (0, 0))
    (tmp_path / f".h.{elsewhere}-{gone}.abcd1234").mkdir()
    (tmp_path / f".h.{elsewhere}-{gone}.abcd1234" / "part").touch()  # somebody writes into an old folder
    os.utime(tmp_path / f".h.{elsewhere}-{gone}.abcd1234", (0, 0))

    files.remove_abandoned(tmp_path)

    assert names(tmp_path) == {*kept, f".h.{elsewhere}-{gone}.abcd1234"}


def test_a_name_as_long_as_the_system_allows_can_be_written(tmp_path: Path) -> None:
    write_json(tmp_path / ("n" * 255), [1])
    assert names(tmp_path) == {"n" * 255}
