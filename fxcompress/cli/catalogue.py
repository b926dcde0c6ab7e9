"""``fxcompress list``."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from fxcompress.cli.common import DebugOption, JsonOption, command, emit
from fxcompress.errors import BackendError, RecipeError


@command
def list_all(json_output: JsonOption = False, debug: DebugOption = False) -> None:
    """List recipes, passes, backends and objectives of training."""
    import fxcompress

    data: dict[str, dict[str, str]] = {
        "recipes": fxcompress.recipes(),
        "passes": _passes(),
        "backends": _backends(),
        "objectives": _objectives(),
    }
    emit(data, json_output, *(_table(kind, entries) for kind, entries in data.items()))


def _passes() -> dict[str, str]:
    from fxcompress.registry import pass_class, pass_names

    found = {}
    for name in pass_names():
        try:
            found[name] = pass_class(name).summary
        except RecipeError as error:
            found[name] = f"cannot be loaded: {error}"
    return found


def _objectives() -> dict[str, str]:
    from fxcompress.training.catalogue import OBJECTIVES

    return {name: _summary(cls) for name, cls in OBJECTIVES.items()}


def _backends() -> dict[str, str]:
    from fxcompress.registry import backend_class, backend_names

    found = {}
    for name in backend_names():
        try:
            found[name] = _summary(backend_class(name))
        except BackendError as error:
            found[name] = f"cannot be loaded: {error}"
    return found


def _summary(backend: Any) -> str:
    return str(getattr(backend, "summary", "") or (backend.__doc__ or "").strip().split("\n")[0])


def _table(kind: str, entries: dict[str, str]) -> Table:
    table = Table(kind, "what it does", box=None, padding=(0, 2, 0, 0))
    for name, summary in entries.items():
        table.add_row(name, summary)
    return table
