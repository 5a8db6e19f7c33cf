"""What pip installs: `trainpilot` and nothing else, and all of it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("llm_runtime", "envs", "agents", "experiments")


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build from a copy: a build leaves folders in its source, and there may be old ones in ours."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    outcome = subprocess.run([*pip, "--wheel-dir", out, source], capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def contents(wheel: Path) -> set[str]:
    with ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_listed_packages_are_the_folders_with_an_init() -> None:
    tops = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    inits = [path.parent.relative_to(ROOT) for folder in FOLDERS for path in ROOT.glob(f"{folder}/**/__init__.py")]
    found = {".".join(("trainpilot", *folder.parts)) for folder in inits}

    assert set(pyproject()["tool"]["setuptools"]["packages"]) == found
    assert tops == set(FOLDERS)


def test_the_root_and_the_tests_are_no_packages() -> None:
    assert not (ROOT / "__init__.py").exists()
    assert not (ROOT / "tests" / "__init__.py").exists()


@pytest.mark.parametrize("folder", FOLDERS)
def test_each_package_says_that_it_is_typed(folder: str) -> None:
    assert (ROOT / folder / "py.typed").is_file()


def test_the_wheel_brings_one_name_into_site_packages(wheel: Path, contents: set[str]) -> None:
    version = pyproject()["project"]["version"]
    info = f"trainpilot-{version}.dist-info"

    assert {name.partition("/")[0] for name in contents} == {"trainpilot", info}
    with ZipFile(wheel) as archive:
        assert archive.read(f"{info}/top_level.txt").decode().split() == ["trainpilot"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_wheel_holds_every_file_of_the_folder(folder: str, contents: set[str]) -> None:
    files = [path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file()]
    shipped = {
        f"trainpilot/{path.as_posix()}"
        for path in files
        if "__pycache__" not in path.parts and not path.name.startswith(".")
    }

    assert shipped, f"{folder} is empty"
    assert shipped <= contents, f"not in the wheel: {sorted(shipped - contents)}"


def test_the_wheel_carries_the_licence(contents: set[str]) -> None:
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in contents)
