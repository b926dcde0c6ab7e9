"""The system's C++ compiler, and the shared objects it made, kept on disk by content.

A cached object is found by the hash of its source, flags and compiler version, so that nothing stale is ever
loaded. Objects are compiled aside and renamed, so that processes may share the directory.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fxcompress.errors import BackendError

logger = logging.getLogger("fxcompress.backends")

CACHE_VARIABLE = "FXCOMPRESS_CACHE_DIR"
COMPILER_VARIABLE = "CXX"
BASE_FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-shared", "-fvisibility=hidden"),
    # Neither changes a result: they let the compiler vectorize code that rounds and divides.
    *("-fno-math-errno", "-fno-trapping-math"),
)
_TIMEOUT = 300  # seconds for one compilation; a kernel takes a few


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler that was found and asked for its version.

    Args:
        command: Program and leading arguments.
        version: First line of ``--version``.
        openmp: Flags that turn OpenMP on; empty when it does not have it.
        tuning: Flags of this compiler that make the kernels faster. GCC otherwise reorders the integer sums
            of a tile, for which it then has too few registers.
    """

    command: tuple[str, ...]
    version: str
    openmp: tuple[str, ...]
    tuning: tuple[str, ...] = ()


def find_compiler(environment: Mapping[str, str] = os.environ) -> Compiler:
    """The compiler named by ``CXX``, else the first of ``c++``, ``g++`` and ``clang++``.

    Raises:
        BackendError: none is installed, or it does not answer.
    """
    named = environment.get(COMPILER_VARIABLE)
    candidates = [tuple(shlex.split(named))] if named else [("c++",), ("g++",), ("clang++",)]
    for command in candidates:
        if command and shutil.which(command[0], path=environment.get("PATH")):
            return _asked(command)
    looked = f"{COMPILER_VARIABLE}={named!r}" if named else "c++, g++ and clang++"
    raise BackendError(
        f"no C++ compiler: {looked} not found.",
        fix=f"install g++ or clang++, or set {COMPILER_VARIABLE} to one.",
    )


@functools.lru_cache(maxsize=8)
def _asked(command: tuple[str, ...]) -> Compiler:
    try:
        answer = subprocess.run(
            [*command, "--version"], capture_output=True, text=True, timeout=30, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise BackendError(
            f"C++ compiler {shlex.join(command)!r} does not answer --version: {error}.",
            fix=f"set {COMPILER_VARIABLE} to a working compiler.",
        ) from error
    version = answer.splitlines()[0] if answer else "unknown"
    openmp = () if "Apple" in version else ("-fopenmp",)  # Apple's clang has no OpenMP runtime
    tuning = () if "clang" in version else ("-fno-tree-reassoc", "-fno-tree-pre")
    return Compiler(command, version, openmp, tuning)


def cache_directory(environment: Mapping[str, str] = os.environ) -> Path:
    """Where compiled kernels are kept: ``FXCOMPRESS_CACHE_DIR``, else ``fxcompress`` in the user's cache."""
    named = environment.get(CACHE_VARIABLE)
    if named:
        return Path(named).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "fxcompress"
    if sys.platform == "win32":
        return Path(environment.get("LOCALAPPDATA", str(Path.home()))) / "fxcompress" / "cache"
    return Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fxcompress"


def compiled(
    stem: str,
    source: str,
    flags: Sequence[str],
    *,
    compiler: Compiler | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Path:
    """The shared object of ``source``, compiled unless the cache has it.

    Args:
        stem: Start of the file name, for people.
        source: C++.
        flags: Beside :data:`BASE_FLAGS` and OpenMP; part of the key.
        compiler: Default: :func:`find_compiler`.
        environment: Names the compiler and the cache directory.

    Returns:
        Path of the shared object. If the cache directory cannot be written, it lies in a temporary directory
        of this process and one line is logged.

    Raises:
        BackendError: no compiler, or it refuses the source; the message has its own.
    """
    chosen = compiler if compiler is not None else find_compiler(environment)
    arguments = [*BASE_FLAGS, *chosen.tuning, *chosen.openmp, *flags]
    key = hashlib.sha256(
        "\0".join([source, *arguments, *chosen.command, chosen.version, sys.platform]).encode()
    ).hexdigest()
    name = f"{stem}-{key[:32]}.so"
    directory = cache_directory(environment)
    target = directory / name
    if target.is_file():
        return target
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        return _compile_into(directory, name, source, arguments, chosen)
    except OSError as error:
        other = _temporary_directory()
        logger.warning(
            "kernel cache %s cannot be written (%s): kernels of this process go to %s",
            *(directory, error, other),
        )
        if (other / name).is_file():
            return other / name
        return _compile_into(other, name, source, arguments, chosen)


def _compile_into(
    directory: Path, name: str, source: str, arguments: Sequence[str], compiler: Compiler
) -> Path:
    """Compile aside, then rename both files: whoever looks meanwhile sees all or nothing."""
    with tempfile.TemporaryDirectory(prefix=".compiling-", dir=directory) as aside:
        written = Path(aside) / name
        text = written.with_suffix(".cpp")
        text.write_text(source, encoding="utf-8")
        libraries = [
            argument for argument in arguments if argument.startswith("-l")
        ]  # these follow the source
        options = [argument for argument in arguments if argument not in libraries]
        command = [*compiler.command, *options, str(text), "-o", str(written), *libraries]
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
        except (subprocess.TimeoutExpired, FileNotFoundError, PermissionError) as error:
            raise BackendError(
                f"{name}: the C++ compiler {shlex.join(compiler.command)!r} did not finish: {error}."
            ) from error
        if result.returncode:
            if "No space left" in result.stderr:
                raise OSError(result.stderr.strip().splitlines()[-1])
            called = f"{shlex.join(compiler.command)} ({compiler.version})"
            raise BackendError(
                f"{name}: {called} failed:\n{result.stderr.strip()}",
                fix=f"set {COMPILER_VARIABLE} to another compiler; without one, torch's kernels are used.",
            )
        text.replace(directory / text.name)
        written.replace(directory / name)
    return directory / name


@functools.cache
def _temporary_directory() -> Path:
    holder = tempfile.TemporaryDirectory(prefix="fxcompress-kernels-")
    _KEPT.append(holder)
    return Path(holder.name)


_KEPT: list[tempfile.TemporaryDirectory[str]] = []  # removed when the process ends
