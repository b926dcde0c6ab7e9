"""Compute linear layers that share an input as one product.

    linear(x, w1), linear(x, w2), linear(x, w3)  →  split(linear(x, cat(w1, w2, w3)))

Keeps: every result, exactly: rows of a product do not depend on each other. One product reads and quantizes
the input once and is one call instead of three, which is what a single token's step consists of.
Query/key/value and gate/up layers are found because they read the same value, whatever they are called. Of
low-rank weights the first factors, which read that value, are one product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fxcompress.analysis.site_types import SiteKind
from fxcompress.edits import Edit, FuseSites, Refuse
from fxcompress.forms import (
    ActivationQuantizer,
    CodebookWeight,
    LowRank,
    QuantizedWeight,
    SiteForm,
    WeightTerm,
)
from fxcompress.pass_base import BlockContext
from fxcompress.passes._selection import Candidate, SelectivePass, candidates

_CODES = QuantizedWeight | CodebookWeight


@dataclass(frozen=True)
class FuseSiblings(SelectivePass):
    """Fuse linear layers that share their input and their number format.

    Put it last: it looks at the forms that the passes before it have chosen.

    Args:
        include, exclude: Name patterns, see :class:`SelectivePass`.

    Example:
        >>> FuseSiblings(exclude=("*.router.*",)).preserves_function
        True
    """

    name: ClassVar[str] = "fuse-siblings"
    summary: ClassVar[str] = "Compute linear layers that share an input as one product."
    source: ClassVar[str] = "common practice in inference engines; no paper"
    requires: ClassVar[frozenset[str]] = frozenset({"quantized-weights"})
    provides: ClassVar[frozenset[str]] = frozenset({"fused-siblings"})
    preserves_function: ClassVar[bool] = True

    def solve(self, block: BlockContext) -> Iterator[Edit]:
        """Yield one :class:`FuseSites` per set of siblings, a :class:`Refuse` for each sibling left out."""
        self.check_patterns(block.program)
        done = {name for names in block.state.fused for name in names}
        families: dict[fx.Node, list[Candidate]] = {}
        for candidate in candidates(block):
            site = candidate.primary
            if site.kind is SiteKind.LINEAR and site.input is not None and candidate.name not in done:
                families.setdefault(site.input, []).append(candidate)
        for family in families.values():
            if len(family) > 1:
                yield from self._fuse(block, family)

    def _fuse(self, block: BlockContext, family: Sequence[Candidate]) -> Iterator[Edit]:
        alike: list[list[Candidate]] = []
        for candidate in family:
            reason = self._unsuitable(block, candidate)
            if reason is not None:
                yield Refuse(candidate.name, f"not fused with its siblings: {reason}")
                continue
            form = block.state.form(candidate.name)
            for members in alike:
                if _same_product(block.state.form(members[0].name), form):
                    members.append(candidate)
                    break
            else:
                alike.append([candidate])
        for members in alike:
            names = tuple(candidate.name for candidate in members)
            if len(names) > 1:
                yield FuseSites(names, reason=f"{len(names)} products of the same input")
            else:
                yield Refuse(
                    names[0], "not fused with its siblings: none has the same number format and input"
                )

    def _unsuitable(self, block: BlockContext, candidate: Candidate) -> str | None:
        form = block.state.form(candidate.name)
        unselected = self.unselected(block.program, candidate.name)
        if unselected is not None:
            return unselected
        if len(candidate.uses) > 1:
            return "the weight is used at several places"
        shared = [_shared(term) for term in form.terms]
        if not any(isinstance(term, _CODES) for term in shared):
            return "its weight is not quantized"
        if not all(isinstance(term, _CODES | LowRank) for term in form.terms):
            return f"its weight is {' + '.join(term.describe() for term in form.terms)}"
        if any(isinstance(term, QuantizedWeight) and term.group_size == -1 for term in shared):
            return "one scale per matrix does not extend to a larger matrix"
        if form.transform_out:
            return "it has an output transform of its own"
        return None


def _shared(term: WeightTerm) -> WeightTerm:
    """What of a term multiplies the input: the first factor of a low-rank one."""
    return term.v if isinstance(term, LowRank) else term


def _same_product(left: SiteForm, right: SiteForm) -> bool:
    """Whether two quantized linear sites differ in their codes, scales, biases and number of rows only."""
    return (
        len(left.terms) == len(right.terms)
        and all(map(_same_format, left.terms, right.terms))
        and _same_quantizer(left.activation, right.activation)
        and len(left.transform_in) == len(right.transform_in)
        and all(x.same_as(y) for x, y in zip(left.transform_in, right.transform_in, strict=True))
    )


def _same_format(left: WeightTerm, right: WeightTerm) -> bool:
    if type(left) is not type(right):
        return False
    a, b = _shared(left), _shared(right)
    if isinstance(a, CodebookWeight) and isinstance(b, CodebookWeight):
        return a.format == b.format and (a.per_row or torch.equal(a.table, b.table))
    if not isinstance(a, QuantizedWeight) or not isinstance(b, QuantizedWeight):
        return type(a) is type(b)  # each stays a product of its own
    return a.format == b.format and a.scale.dtype == b.scale.dtype


def _same_quantizer(left: ActivationQuantizer | None, right: ActivationQuantizer | None) -> bool:
    if left is None or right is None:
        return left is right
    return left.same_as(right)
