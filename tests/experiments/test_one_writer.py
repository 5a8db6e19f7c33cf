"""A folder has one writer at a time; its lock goes with its process, and leaves nothing behind."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from trainpilot.experiments import cli, one_writer
from trainpilot.experiments.export.source import check_out
from trainpilot.experiments.one_writer import NAME, lock_file
from trainpilot.llm_runtime import files


def refused(folder: Path) -> str:
    with pytest.raises(ValueError, match="is writing into") as error, one_writer.one_writer(folder):
        pass
    return str(error.value)


def test_a_second_writer_is_told_who_writes_and_what_to_do(tmp_path: Path) -> None:
    with one_writer.one_writer(tmp_path):
        message = refused(tmp_path)
    assert message == (
        f"out: process {os.getpid()} on {socket.gethostname()} is writing into {tmp_path}; wait for its end, or choose "
        "another --out"
    )
    with one_writer.one_writer(tmp_path):
        assert lock_file(tmp_path).exists()


def test_only_what_was_written_stays(tmp_path: Path) -> None:
    with one_writer.one_writer(tmp_path / "runs" / "empty"):
        assert (tmp_path / "runs" / "empty").is_dir()
    assert list(tmp_path.iterdir()) == []

    with one_writer.one_writer(tmp_path / "runs" / "full"):
        (tmp_path / "runs" / "full" / "a").touch()
    assert [path.name for path in (tmp_path / "runs" / "full").iterdir()] == ["a"]


def test_a_killed_process_leaves_the_folder_free(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom trainpilot.experiments.one_writer import one_writer\n"
        "with one_writer(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(600)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        assert f"process {process.pid} on" in refused(tmp_path)
        process.send_signal(signal.SIGKILL)

    assert (tmp_path / NAME).exists()
    with one_writer.one_writer(tmp_path):
        assert f"process {os.getpid()} on" in refused(tmp_path)
    assert not (tmp_path / NAME).exists()


def test_the_lock_of_a_folder_that_took_its_place_stays(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with one_writer.one_writer(folder):
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / NAME).write_text("another's")
    assert (folder / NAME).read_text() == "another's"


def test_an_export_takes_a_locked_folder_for_empty(tmp_path: Path) -> None:
    with one_writer.one_writer(tmp_path / "out"):
        check_out(tmp_path / "out", tmp_path / "model")
        (tmp_path / "out" / "mine").touch()
        with pytest.raises(ValueError, match="out must be new, empty or an earlier export"):
            check_out(tmp_path / "out", tmp_path / "model")


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(ValueError, match="out must be a folder, got the file"),
        one_writer.one_writer(tmp_path / "file"),
    ):
        pass


def test_without_locks_there_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lock(_: int) -> bool:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(one_writer, "_lock", lock)
    said = "cannot be locked .No locks available.; see to it that no second process"
    with pytest.warns(UserWarning, match=said), one_writer.one_writer(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_what_cannot_be_written_needs_no_lock(tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def no(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", no)
    with one_writer.one_writer(tmp_path):
        assert list(tmp_path.iterdir()) == []


def test_a_holders_name_cannot_drive_the_terminal(tmp_path: Path) -> None:
    with one_writer.one_writer(tmp_path):
        (tmp_path / NAME).write_text("\x1b[2Jprocess 1\n")
        assert refused(tmp_path).startswith("out: [2Jprocess 1 is writing")


WRITERS = {
    "demo": (),
    "train-agent": ("--recipe", "tiny"),
    "replay": (),
    "compare": (),
    "calibrate": (),
    "fit-sweep": ("sweep.csv",),
    "cut": ("model",),
    "export": ("model",),
}


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_a_command_that_writes_holds_the_lock(
    tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (str(tmp_path), "--out", str(tmp_path / "page.html"))  # one file, written whole
    arguments = {**WRITERS, "doctor": (), "inspect": (str(tmp_path),), "report": page}[command]
    out = ("--out", str(tmp_path)) if command in WRITERS else ()
    monkeypatch.setattr(sys, "argv", ["trainpilot", command, *arguments, *out])
    ran: list[object] = []
    monkeypatch.setattr(cli, "_run", ran.append)
    cli.main()
    with one_writer.one_writer(tmp_path):
        if command not in WRITERS:
            cli.main()
            return
        with pytest.raises(SystemExit) as stop:
            cli.main()
    assert stop.value.code == 2
    assert len(ran) == 1
    said = capsys.readouterr().err
    assert said.startswith("trainpilot: out: process")
    assert said.count("\n") == 1


def test_a_report_is_written_while_others_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["trainpilot", "compare", "--report-only", "--out", str(tmp_path)])
    monkeypatch.setattr(cli, "_run", lambda _: None)
    with one_writer.one_writer(tmp_path):
        cli.main()


def test_what_a_killed_writer_left_behind_is_removed(tmp_path: Path) -> None:
    left = [".summary.json.ab12_xyz", "runs/.a.json.0a1b2c3d", ".model.dexo648v/weights"]
    kept = ["summary.json", ".hidden", "runs/.gitignore", "model/weights"]
    for name in (*left, *kept):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")

    with one_writer.one_writer(tmp_path):
        found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}

    assert found == {*kept, one_writer.NAME}


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not say which process lives")
def test_what_a_killed_writer_left_in_the_cache_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINPILOT_CACHE", str(tmp_path / "cache"))
    with subprocess.Popen([sys.executable, "-S", "-c", ""]) as process:
        pass
    left, live = (f".entry.{files._machine()}-{number}.abcd1234" for number in (process.pid, os.getpid()))
    for name in (f"tokens/{left}/train.ids", f"step_cost/{left}", f"step_cost/{live}", "prices/entry.json"):
        (tmp_path / "cache" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cache" / name).touch()

    with one_writer.one_writer(tmp_path / "out"):
        found = {str(path.relative_to(tmp_path / "cache")) for path in (tmp_path / "cache").glob("*/*")}

    assert found == {f"step_cost/{live}", "prices/entry.json"}
