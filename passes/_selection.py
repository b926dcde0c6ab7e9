"""Which weights a pass takes: patterns, the first use of a shared weight, embeddings and output heads.

Nothing here looks at a module's class or at what a parameter is called, except through the user's own
patterns.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import fx

from fxcompress.analysis.site_types import Site, SiteKind
from fxcompress.analysis.sites import find_sites, sites_by_parameter
from fxcompress.capture.program import Program
from fxcompress.errors import FormatError, RecipeError
from fxcompress.formats import CodebookFormat, FloatFormat, IntFormat
from fxcompress.formats.floating import FLOAT_DTYPES
from fxcompress.pass_base import BlockContext, Pass


class Role(enum.Enum):
    """What a weight is for in the whole model."""

    MATRIX = "matrix"
    EMBEDDING = "embedding"  # looked up somewhere, even if it is also multiplied with (a tied output head)
    HEAD = "output head"  # see find_heads


@dataclass(frozen=True, eq=False)
class Candidate:
    """A weight that a block is responsible for.

    Args:
        name: Canonical parameter name.
        role: Its role in the whole model.
        primary: The use that decides the layout: the first in graph order that is not ``OTHER``, or the
            first.
        uses: All uses in the whole model, in graph order.
        here: Those in this block.
    """

    name: str
    role: Role
    primary: Site
    uses: tuple[Site, ...]
    here: tuple[Site, ...]


@dataclass(frozen=True)
class SelectivePass(Pass):
    """A pass that can be limited to some weights.

    Args:
        include: Patterns (``fnmatch``, case-sensitive) of parameter names to take; empty takes all. Default
            ``()``.
        exclude: Patterns of names to leave alone; stronger than ``include``. Default ``()``.

    Raises:
        RecipeError: a pattern is no string, or (when the pass runs) matches no parameter of the model.
    """

    include: tuple[str, ...] = field(default=(), kw_only=True)
    exclude: tuple[str, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        for option in ("include", "exclude"):
            object.__setattr__(self, option, _patterns(self.name, option, getattr(self, option)))

    def unselected(self, program: Program, name: str) -> str | None:
        """Why the patterns leave ``name`` out, or None when they take it."""
        names = [name, *(alias for alias, canonical in program.aliases.items() if canonical == name)]
        hit = _first_match(self.exclude, names)
        if hit is not None:
            return f"excluded by {hit!r}"
        if self.include and _first_match(self.include, names) is None:
            return "matches none of the include patterns"
        return None

    def check_patterns(self, program: Program) -> None:
        """Refuse patterns that match nothing: a misspelt one would otherwise do nothing in silence."""
        names = [*program.parameters, *program.aliases]
        for option in ("include", "exclude"):
            for pattern in getattr(self, option):
                if not any(fnmatchcase(name, pattern) for name in names):
                    raise RecipeError(
                        f"{self.name}: {option} pattern {pattern!r} matches no parameter of the model.",
                        fix=f"parameters are named like {min(names, default='(none)')!r}.",
                    )


def candidates(block: BlockContext) -> list[Candidate]:
    """Weights whose deciding use lies in this block, in graph order; a weight belongs to one block."""
    sites = find_sites(block.program)
    inside = {site.node for site in block.sites}
    found = []
    heads: frozenset[str] | None = None
    for name, uses in sites_by_parameter(sites).items():
        primary = next((site for site in uses if site.kind is not SiteKind.OTHER), uses[0])
        if primary.node not in inside:
            continue
        if heads is None:
            heads = find_heads(block.program, sites)
        role = Role.HEAD if name in heads else Role.MATRIX
        if any(site.kind is SiteKind.EMBEDDING for site in uses):
            role = Role.EMBEDDING
        here = tuple(site for site in uses if site.node in inside)
        found.append(Candidate(name, role, primary, tuple(uses), here))
    return found


def find_heads(program: Program, sites: Sequence[Site]) -> frozenset[str]:
    """Names of output heads: expanding linear layers whose results go to the model's output only.

    A site is a head when it has more outputs than inputs, and everything computed from its result is computed
    from no other site's result, contains no further site, and ends in the graph output (so slices, casts,
    scaling and soft caps may follow, but not a residual sum, and a key or value that is also returned as
    cache is none).
    """
    order = {node: index for index, node in enumerate(program.graph.nodes)}
    nodes = list(program.graph.nodes)
    products = {site.node for site in sites}
    derived: set[fx.Node] = set()  # everything that depends on a site's result
    for node in nodes:
        if any(source in products or source in derived for source in node.all_input_nodes):
            derived.add(node)

    def is_head(site: Site) -> bool:
        _, rows, columns = site.layout.matrix_shape
        if site.kind is not SiteKind.LINEAR or rows <= columns:
            return False
        return _leads_only_out(site.node, nodes[order[site.node] + 1 :], products, derived)

    return frozenset(name for name, uses in sites_by_parameter(sites).items() if all(map(is_head, uses)))


def _leads_only_out(
    start: fx.Node, later: Iterable[fx.Node], products: Collection[fx.Node], derived: Collection[fx.Node]
) -> bool:
    path = {start}
    reached = False
    for node in later:
        sources = node.all_input_nodes
        if not any(source in path for source in sources):
            continue
        if node.op == "output":
            reached = True
            continue
        if node in products:
            return False
        if any(source not in path and (source in products or source in derived) for source in sources):
            return False
        path.add(node)
    return reached


FLOAT_FORMATS = tuple(f"fp8-{kind}" for kind in FLOAT_DTYPES)
"""Values of a pass's ``format`` option besides ``"int"``."""


def float_kind(pass_name: str, option: object, bits: int) -> str | None:
    """The kind of :class:`FloatFormat` that a pass's ``format`` option names; None for integers.

    Raises:
        RecipeError: an unknown format, or bits that do not go with it.
    """
    if option == "int":
        return None
    if option not in FLOAT_FORMATS:
        raise RecipeError(
            f"{pass_name}: format={option!r}, expected {', '.join(map(repr, ('int', *FLOAT_FORMATS)))}."
        )
    if bits != 8:
        raise RecipeError(
            f"{pass_name}: format={option!r} has 8 bits, but bits={bits!r}.", fix="leave bits out."
        )
    return str(option).removeprefix("fp8-")


def fitting_format(fmt: IntFormat, columns: int) -> tuple[IntFormat, str]:
    """``fmt``, or one scale per row (and a note saying so) where a group would be longer than the row."""
    if fmt.group_size <= columns:
        return fmt, ""
    row = IntFormat(bits=fmt.bits, symmetric=fmt.symmetric, group_size=0)
    return row, f" (group {fmt.group_size} is longer than its {columns} inputs)"


def check_group_size(pass_name: str, program: Program, group_size: int) -> None:
    """Refuse a group size that is larger than the number of inputs of every weight.

    Raises:
        FormatError: no weight has that many inputs.
    """
    columns = [site.layout.matrix_shape[2] for site in find_sites(program) if site.kind is not SiteKind.OTHER]
    if columns and group_size > max(columns):
        raise FormatError(
            f"{pass_name}: group_size={group_size} is larger than the inputs of every weight (at most"
            f" {max(columns)}).",
            fix=f"use a group size up to {max(columns)}, or 0 for one scale per row.",
        )


def not_smaller(fmt: IntFormat | FloatFormat | CodebookFormat, site: Site, dtype: torch.dtype) -> str | None:
    """A reason not to quantize when codes and scales would take as much room as the weight, else None."""
    _, rows, columns = site.layout.matrix_shape
    bits = fmt.bits_per_weight(rows, columns)
    have = torch.finfo(dtype).bits
    if bits < have:
        return None
    return f"{describe(fmt)} would take {bits:.4g} bits per weight, {dtype} takes {have}"


def describe(fmt: IntFormat | FloatFormat | CodebookFormat) -> str:
    """E.g. ``"int4 asymmetric, group 64"``."""
    if not isinstance(fmt, IntFormat):
        return fmt.describe()
    kind = "symmetric" if fmt.symmetric else "asymmetric"
    span = {0: "per row", -1: "per matrix"}.get(fmt.group_size, f"group {fmt.group_size}")
    return f"int{fmt.bits} {kind}, {span}"


def _patterns(pass_name: str, option: str, value: object) -> tuple[str, ...]:
    given = (value,) if isinstance(value, str) else value
    if not isinstance(given, list | tuple) or not all(isinstance(pattern, str) for pattern in given):
        raise RecipeError(
            f"{pass_name}: {option}={value!r}, expected a list of name patterns.",
            fix=f'{option}=("*.mlp.*",)',
        )
    return tuple(given)


def _first_match(patterns: Sequence[str], names: Sequence[str]) -> str | None:
    return next((p for p in patterns if any(fnmatchcase(name, p) for name in names)), None)
