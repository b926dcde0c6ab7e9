"""Weight layouts by name, for plans that are read from disk."""

from __future__ import annotations

from fxcompress.backends.cpu.codebook import codebook_layout
from fxcompress.backends.cpu.experts import experts_layout
from fxcompress.backends.cpu.isa import machine_isa
from fxcompress.backends.cpu.layouts import INT4_BLOCKED, INT8_ROWS, Layout
from fxcompress.backends.cpu.tiled import gated_layout, tiled_layout

__all__ = ["layout_named"]


def layout_named(name: str) -> Layout | None:
    """The layout object of this machine with a name, or None.

    Example:
        >>> layout_named("int8-rows").name
        'int8-rows'
    """
    isa = machine_isa()
    known: tuple[Layout, ...] = (
        *(tiled_layout(isa), gated_layout(isa, False), gated_layout(isa, True)),
        *(codebook_layout(isa), INT8_ROWS, INT4_BLOCKED),
    )
    stacked = tuple(experts_layout(layout) for layout in known)
    return next((layout for layout in (*known, *stacked) if layout.name == name), None)
