"""What pip installs: `trainpilot` and nothing else, and all of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("trainpilot", "llm_runtime", "envs", "agents", "experiments")


def import_name(folder: Path) -> str:
    return ".".join(folder.parts if folder.parts[0] == "trainpilot" else ("trainpilot", *folder.parts))


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
    pip = [sys.executable, "-m", "pip", "wheel", "--verbose", "--no-deps", "--no-build-isolation", "--no-index"]
    outcome = subprocess.run([*pip, "--wheel-dir", out, source], capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert "Warning" not in outcome.stdout + outcome.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def contents(wheel: Path) -> set[str]:
    with ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_listed_packages_are_the_folders_of_code_and_of_data() -> None:
    tops = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    inits = [path.parent.relative_to(ROOT) for folder in FOLDERS for path in ROOT.glob(f"{folder}/**/__init__.py")]
    found = {import_name(folder) for folder in inits}
    setup = pyproject()["tool"]["setuptools"]
    patterns = [
        (package, Path(pattern).parent.parts) for package, of in setup["package-data"].items() for pattern in of
    ]
    of_data = {".".join((package, *parts)) for package, parts in patterns if parts}

    assert set(setup["packages"]) == found | of_data
    assert tops == set(FOLDERS)


def test_the_root_and_the_tests_are_no_packages() -> None:
    assert not (ROOT / "__init__.py").exists()
    assert not (ROOT / "tests" / "__init__.py").exists()


def test_the_citation_names_the_version() -> None:
    version = pyproject()["project"]["version"]

    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


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
        path.as_posix() if folder == "trainpilot" else f"trainpilot/{path.as_posix()}"
        for path in files
        if "__pycache__" not in path.parts and not path.name.startswith(".")
    }

    assert shipped, f"{folder} is empty"
    assert shipped <= contents, f"not in the wheel: {sorted(shipped - contents)}"


def test_the_wheel_carries_the_licence(contents: set[str]) -> None:
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in contents)


ASK = (
    "import trainpilot, trainpilot.envs as e; print(e.__file__, trainpilot.__version__, trainpilot.Steering.__module__)"
)


def test_the_installed_package_wins_over_a_folder_of_its_name(wheel: Path, tmp_path: Path) -> None:
    """A script or notebook beside a checkout must not import the checkout."""
    site, here = tmp_path / "site", tmp_path / "here"
    with ZipFile(wheel) as archive:
        archive.extractall(site)
    (here / "trainpilot" / "envs").mkdir(parents=True)
    (here / "trainpilot" / "envs" / "__init__.py").write_text("raise SystemExit('the checkout was imported')")
    environment = os.environ | {"PYTHONPATH": str(site)}

    outcome = subprocess.run(
        [sys.executable, "-c", ASK], cwd=here, env=environment, capture_output=True, text=True, check=False
    )

    assert outcome.returncode == 0, outcome.stderr
    file, version, module = outcome.stdout.split()
    assert Path(file) == site / "trainpilot" / "envs" / "__init__.py"
    assert version == pyproject()["project"]["version"]
    assert module.startswith("trainpilot.agents.")


def test_a_checkout_is_a_package_with_its_folders_below() -> None:
    outcome = subprocess.run([sys.executable, "-c", ASK], cwd=ROOT, capture_output=True, text=True, check=True)

    assert Path(outcome.stdout.split()[0]) == ROOT / "envs" / "__init__.py"
