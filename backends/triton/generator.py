"""From a form to the Triton source of its kernel, and to the kernel.

Triton reads the source of a kernel from its file, so sources are kept on disk, by content, where they can be
read by people too.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from fxcompress.backends.cpu.toolchain import CACHE_VARIABLE
from fxcompress.errors import BackendError

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["AnyForm", "Argument", "interpreted", "load_kernel", "missing_triton", "render"]


class Argument(NamedTuple):
    """A run-time argument of a kernel."""

    name: str
    kind: str
    """Triton's name of its type, e.g. ``"*fp16"`` or ``"i32"``."""
    note: str
    """Shape and meaning, for the reader of the source."""


class AnyForm(Protocol):
    """What generating and compiling a kernel takes."""

    @property
    def title(self) -> str:
        """A short name, unique per form; also the stem of file names."""
        ...

    @property
    def family(self) -> str:
        """The template's stem."""
        ...

    @property
    def entry(self) -> str:
        """Name of the kernel in the source."""
        ...

    def arguments(self) -> Sequence[Argument]:
        """Run-time arguments, in order."""
        ...

    def context(self) -> dict[str, Any]:
        """What the template reads besides ``form`` and its arguments."""
        ...


def render(form: AnyForm) -> str:
    """The kernel's source: a complete module, formatted to be read.

    Example:
        >>> from fxcompress.backends.triton.linear_form import LinearForm
        >>> form = LinearForm("int", 4, True, "group", 128, "bfloat16", "float16")
        >>> 'tl.dot' in render(form)
        True
    """
    template = _environment().get_template(f"{form.family}.py.j2")
    text = template.render(form=form, form_arguments=form.arguments(), **form.context())
    lines = [line.rstrip() for line in text.splitlines()]
    return "\n".join(lines).strip() + "\n"


def missing_triton() -> str | None:
    """Why kernels cannot be compiled here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (it comes with CUDA builds of torch; else: pip install triton)"
    return None


def interpreted() -> bool:
    """Whether triton's interpreter runs kernels, on CPU tensors (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


def load_kernel(form: AnyForm, entry: str | None = None) -> Any:
    """A kernel of a form, compiled when it is first started.

    Args:
        form: The form.
        entry: Its name in the source, where that is not the form's own.

    Raises:
        BackendError: triton is not installed.
    """
    return getattr(_load_module(form), entry or form.entry)  # type: ignore[arg-type]  # forms are frozen


@functools.cache
def _load_module(form: AnyForm) -> Any:
    problem = missing_triton()
    if problem is not None:
        raise BackendError(f"{form.title}: {problem}.")
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # 3.9 warns where it is left to the default
    source = render(form)
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    path = _source_file(f"{form.title.replace('-', '_')}_{digest}", source)
    name = f"fxcompress_triton_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def source_folder() -> Path:
    """Where generated sources are kept."""
    named = os.environ.get(CACHE_VARIABLE)
    base = (
        Path(named)
        if named
        else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fxcompress"
    )
    return base / "triton"


def _source_file(stem: str, source: str) -> Path:
    """The file with this content; written aside and renamed, so that processes may share the folder."""
    folder = source_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return _written(folder, stem, source)
    except OSError:
        return _written(_temporary_folder(), stem, source)


def _written(folder: Path, stem: str, source: str) -> Path:
    path = folder / f"{stem}.py"
    if not path.exists() or path.read_text(encoding="utf-8") != source:
        handle, aside = tempfile.mkstemp(dir=folder, suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(source)
        os.replace(aside, path)
    return path


@functools.cache
def _temporary_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="fxcompress-triton-"))


@functools.cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("fxcompress.backends.triton", "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
