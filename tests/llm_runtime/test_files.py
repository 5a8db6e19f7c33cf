"""What cannot be written is one system error that names the path asked for, and leaves nothing behind."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors import SafetensorError

from trainpilot.llm_runtime.files import load_checkpoint, save_checkpoint, system_errors, whole_file, whole_folder


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
