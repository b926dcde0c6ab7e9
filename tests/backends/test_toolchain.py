"""The compiler and the cache of compiled kernels: sharing, read-only places, broken compilers."""

from __future__ import annotations

import logging
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fxcompress.backends.cpu import toolchain
from fxcompress.backends.cpu.toolchain import cache_directory, compiled, find_compiler
from fxcompress.errors import BackendError

SOURCE = 'extern "C" __attribute__((visibility("default"))) int answer() { return 42; }\n'


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {**os.environ, "FXCOMPRESS_CACHE_DIR": str(tmp_path / "cache")}


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_compiles_once_and_keeps_the_source_beside(environment: dict[str, str]) -> None:
    first = compiled("stem", SOURCE, (), environment=environment)
    changed = first.stat().st_mtime_ns
    assert first.name.startswith("stem-")
    assert first.with_suffix(".cpp").read_text() == SOURCE
    assert compiled("stem", SOURCE, (), environment=environment) == first
    assert first.stat().st_mtime_ns == changed
    assert sorted(path.suffix for path in first.parent.iterdir()) == [".cpp", ".so"]


def test_every_part_of_the_key_counts(environment: dict[str, str], tmp_path: Path) -> None:
    one = compiled("stem", SOURCE, (), environment=environment)
    assert compiled("stem", SOURCE + "//", (), environment=environment) != one
    assert compiled("stem", SOURCE, ("-DX",), environment=environment) != one
    real = find_compiler(environment).command[0]
    other = script(tmp_path / "c++", f'[ "$1" = --version ] && echo other 1.0 && exit; exec {real} "$@"')
    assert compiled("stem", SOURCE, (), environment={**environment, "CXX": str(other)}) != one


def test_processes_share_the_directory(environment: dict[str, str]) -> None:
    program = (
        "import sys, ctypes; from fxcompress.backends.cpu.toolchain import compiled;"
        f"path = compiled('stem', {SOURCE!r}, ());"
        "print(path, ctypes.CDLL(str(path)).answer())"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    answers = {process.communicate(timeout=120)[0] for process in processes}
    assert len(answers) == 1
    assert answers.pop().split()[1] == "42"
    assert sorted(path.suffix for path in cache_directory(environment).iterdir()) == [".cpp", ".so"]


def test_a_place_that_cannot_be_written(
    environment: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "below", tmp_path / "file"):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "fxcompress.backends"):
            path = compiled(
                "stem", SOURCE, (), environment={**environment, "FXCOMPRESS_CACHE_DIR": str(place)}
            )
        assert path.is_file()
        assert tmp_path not in path.parents
        assert len(caplog.records) == 1
        assert str(place) in caplog.text


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_read_only_directory(environment: dict[str, str], tmp_path: Path) -> None:
    place = tmp_path / "cache"
    place.mkdir(mode=0o500)
    assert place not in compiled("stem", SOURCE, (), environment=environment).parents


def test_a_filled_read_only_directory_is_used(environment: dict[str, str]) -> None:
    path = compiled("stem", SOURCE, (), environment=environment)
    path.parent.chmod(0o500)
    try:
        assert compiled("stem", SOURCE, (), environment=environment) == path
    finally:
        path.parent.chmod(0o700)


def test_a_full_disk(environment: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = '[ "$1" = --version ] && echo full 1.0 && exit; echo "fatal: No space left on device" >&2; exit 1'
    broken = script(tmp_path / "c++", text)
    with (
        caplog.at_level(logging.WARNING, "fxcompress.backends"),
        pytest.raises((OSError, BackendError), match="No space left"),
    ):
        compiled("stem", SOURCE, (), environment={**environment, "CXX": str(broken)})
    assert "cannot be written" in caplog.text


def test_a_compiler_that_fails_says_why(environment: dict[str, str]) -> None:
    with pytest.raises(BackendError, match="nonsense") as caught:
        compiled("stem", "nonsense here;", (), environment=environment)
    assert "CXX" in str(caught.value)
    assert list(cache_directory(environment).iterdir()) == []


@pytest.mark.parametrize("named", ["/nowhere/c++", "no-such-compiler -m64"])
def test_a_missing_compiler(named: str) -> None:
    with pytest.raises(BackendError, match="no C\\+\\+ compiler: CXX="):
        find_compiler({**os.environ, "CXX": named})
    with pytest.raises(BackendError, match="install"):
        find_compiler({"PATH": "/nowhere"})


def test_a_compiler_that_does_not_answer(tmp_path: Path) -> None:
    broken = script(tmp_path / "c++", "exit 3")
    with pytest.raises(BackendError, match="--version"):
        find_compiler({**os.environ, "CXX": str(broken)})


def test_the_compiler_may_have_arguments() -> None:
    plain = find_compiler({**os.environ, "CXX": ""})
    assert find_compiler({**os.environ, "CXX": f"{plain.command[0]} -pipe"}).command == (
        plain.command[0],
        "-pipe",
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"FXCOMPRESS_CACHE_DIR": "/a/b"}, "/a/b"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/fxcompress"),
        ({}, str(Path.home() / ".cache" / "fxcompress")),
    ],
)
def test_cache_directory(given: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain.sys, "platform", "linux")
    assert str(cache_directory(given)) == expected
