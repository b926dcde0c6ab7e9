"""What is built, and what is installed, is the whole project and can be imported."""

from __future__ import annotations

import configparser
import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
FOLDERS = {"fxcompress": "fxcompress", "passes": "fxcompress/passes", "backends": "fxcompress/backends"}
"""Folder of the repository -> the place of its files in the wheel."""
DATA_SUFFIXES = {".py", ".typed", ".j2"}


def sources() -> dict[str, Path]:
    """Every file that must reach a user: its name in the wheel -> its path here."""
    return {
        f"{target}/{path.relative_to(ROOT / folder).as_posix()}": path
        for folder, target in FOLDERS.items()
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in DATA_SUFFIXES
    }


def run_python(*args: str, cwd: Path, pythonpath: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a fresh interpreter that sees only what is installed, or also ``pythonpath``."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    env["PYTHONSAFEPATH"] = "1"
    if pythonpath is not None:
        env["PYTHONPATH"] = str(pythonpath)
    return subprocess.run(
        [sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built offline from a copy of the sources, so that no earlier build can leak into it."""
    base = tmp_path_factory.mktemp("wheel")
    copy = base / "source"
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, copy / name)
    options = ["--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", str(base)]
    done = run_python("-m", "pip", "wheel", *options, str(copy), cwd=base)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = base.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the installed wheel and nothing else."""
    target = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def test_package_list_matches_the_folders() -> None:
    found = {
        Path(name).parent.as_posix().replace("/", ".")
        for name in sources()
        if Path(name).name == "__init__.py"
    }
    assert sorted(SETUPTOOLS["packages"]) == sorted(found)


def test_every_source_folder_is_a_package() -> None:
    missing = {str(p.parent.relative_to(ROOT)) for p in sources().values() if p.suffix == ".py"} - {
        str(p.parent.relative_to(ROOT)) for p in sources().values() if p.name == "__init__.py"
    }
    assert not missing, f"folders with modules but without __init__.py: {sorted(missing)}"


def test_wheel_holds_every_source_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name for name in archive.namelist() if ".dist-info/" not in name}
        contents = {name: archive.read(name) for name in shipped}
    assert shipped == set(sources())
    assert contents == {name: path.read_bytes() for name, path in sources().items()}
    assert "fxcompress/passes/__init__.py" in shipped
    assert "fxcompress/backends/__init__.py" in shipped


def test_wheel_declares_the_entry_points(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/entry_points.txt"))
        parser = configparser.ConfigParser()
        parser.read_string(archive.read(name).decode())
    declared = {section: dict(parser[section]) for section in parser.sections()}
    project = PYPROJECT["project"]
    assert declared == {"console_scripts": project["scripts"], **project["entry-points"]}


def test_installed_wheel_imports_from_its_own_files(unpacked: Path, tmp_path: Path) -> None:
    code = (
        "import importlib, json, sys;"
        "print(json.dumps([importlib.import_module(name).__file__ for name in sys.argv[1:]]))"
    )
    done = run_python("-c", code, *SETUPTOOLS["packages"], cwd=tmp_path, pythonpath=unpacked)
    assert done.returncode == 0, done.stderr
    expected = [str(unpacked / name.replace(".", "/") / "__init__.py") for name in SETUPTOOLS["packages"]]
    assert json.loads(done.stdout) == expected


def test_entry_points_of_the_installed_wheel_load(unpacked: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from importlib.metadata import distributions;"
        "(found,) = distributions(name='fxcompress', path=[sys.argv[1]]);"
        "print(sorted(point.name for point in found.entry_points if callable(point.load())))"
    )
    done = run_python("-c", code, str(unpacked), cwd=tmp_path, pythonpath=unpacked)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['fxcompress', 'fxcompress']"


@pytest.mark.parametrize("folder", ["passes", "backends"])
def test_editable_install_maps_the_folder(folder: str, tmp_path: Path) -> None:
    code = f"import fxcompress.{folder} as package; print(package.__file__)"
    done = run_python("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == ROOT / folder / "__init__.py"


@pytest.mark.parametrize("folder", ["passes", "backends"])
def test_wrong_name_is_refused(folder: str, tmp_path: Path) -> None:
    done = run_python("-c", f"import {folder}", cwd=tmp_path, pythonpath=ROOT)
    assert done.returncode != 0
    assert f"ImportError: these modules are the package 'fxcompress.{folder}'" in done.stderr


def test_version_is_stated_once(unpacked: Path, tmp_path: Path) -> None:
    code = "import fxcompress; print(fxcompress.__version__)"
    done = run_python("-c", code, cwd=tmp_path, pythonpath=unpacked)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == PYPROJECT["project"]["version"]
