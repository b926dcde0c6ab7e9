"""Attention sites: where a query meets keys and values, found by dataflow.

Two spellings are recognised: ``scaled_dot_product_attention``, and a product, a softmax over its last
dimension and a second product, whatever stands between them (scale, mask, bias, soft cap, casts, dropout,
sinks). A softmax whose scores come from a product with a weight (a router) is no attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxcompress.analysis.op_arguments import aten_names, op_name
from fxcompress.analysis.sites import Site, SiteKind, find_sites
from fxcompress.capture.program import Program

__all__ = ["AttentionSite", "find_attention"]

_PRODUCTS = aten_names("matmul bmm baddbmm einsum")
_SOFTMAX = aten_names("softmax _softmax")
_SDPA = "aten::scaled_dot_product_attention"
_REPEAT = "aten::repeat_interleave"
_SHAPE = aten_names(
    "view reshape _unsafe_view transpose permute t contiguous clone expand unsqueeze squeeze flatten"
    " to _to_copy slice select alias detach dropout"
)


@dataclass(frozen=True, eq=False)
class AttentionSite:
    """One attention.

    Args:
        name: Parameter that the values come from, or the node's name when they come from several or none.
        node: The op that yields the mixture of values.
        query, key, value: What enters. ``query, value: [..., T, D]``; the key of the two-product spelling is
            transposed already.
        key_transposed: Whether ``key`` is ``[..., D, S]`` instead of ``[..., S, D]``.
        heads: Query heads; None when the size is symbolic or there is no head dimension.
        kv_heads: Key/value heads before they are repeated for their query group.
        query_weights, key_weights, value_weights: Parameters of the weight sites that each is computed from,
            the nearest on every path; a fused projection is in all three.
        rotary: Whether the key is multiplied by something that depends on positions alone.
        causal: Whether the op masks the future by itself.
    """

    name: str
    node: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    key_transposed: bool
    heads: int | None
    kv_heads: int | None
    query_weights: tuple[str, ...]
    key_weights: tuple[str, ...]
    value_weights: tuple[str, ...]
    rotary: bool
    causal: bool


def find_attention(program: Program, sites: Sequence[Site] | None = None) -> list[AttentionSite]:
    """All attentions of a program, in graph order.

    Args:
        program: A captured program.
        sites: Its weight sites, when known already.

    Example:
        >>> [site.kv_heads for site in find_attention(program)]  # doctest: +SKIP
        [3, 3, 3]
    """
    known = find_sites(program) if sites is None else sites
    finder = _Finder(program, [site for site in known if site.kind is not SiteKind.OTHER])
    return [site for node in program.graph.nodes for site in finder.at(node)]


class _Finder:
    def __init__(self, program: Program, sites: Sequence[Site]) -> None:
        self.weight_of = program.weight_of
        self.sites: dict[fx.Node, list[str]] = {}
        for site in sites:
            self.sites.setdefault(site.node, []).append(site.name)
        self.writers = _writers(program.graph)
        self.data = self._depends(program, lambda node: node in self.sites)
        self.weights = self._depends(
            program, lambda node: node.op == "placeholder" and node.name in program.weight_of
        )

    def _depends(self, program: Program, starts: Callable[[fx.Node], bool]) -> set[fx.Node]:
        """Nodes computed from a node that ``starts``, and buffers that such a node is written into."""
        found: set[fx.Node] = set()
        bases = {writer: base for base, writers in self.writers.items() for writer in writers}
        for node in program.graph.nodes:
            if starts(node) or any(source in found for source in node.all_input_nodes):
                found.add(node)
                if node in bases:
                    found.add(bases[node])
        return found

    def _upstream(self, start: fx.Node, stop: Callable[[fx.Node], bool]) -> Iterator[fx.Node]:
        """Ancestors breadth first, the start included; what ``stop`` holds for is yielded but not passed."""
        pending, seen = [start], {start}
        for node in pending:
            yield node
            if stop(node):
                continue
            for source in (*node.all_input_nodes, *self.writers.get(node, ())):
                if source not in seen:
                    seen.add(source)
                    pending.append(source)

    def at(self, node: fx.Node) -> Iterator[AttentionSite]:
        name = op_name(node)
        if name == _SDPA:
            query, key, value = node.args[:3]
            given = node.args[5] if len(node.args) > 5 else node.kwargs.get("is_causal", False)
            if isinstance(query, fx.Node) and isinstance(key, fx.Node) and isinstance(value, fx.Node):
                yield self._site(node, query, key, value, transposed=False, causal=bool(given))
        elif name in _SOFTMAX and node.args[1] in (-1, _rank(node) - 1):
            scores = self._scores(node)
            if scores is None:
                return
            for product, value in self._mixtures(node):
                query, key = _operands(scores)
                transposed = op_name(scores) != "aten::einsum"  # which names its dimensions instead
                yield self._site(product, query, key, value, transposed=transposed, causal=False)

    def _scores(self, softmax: fx.Node) -> fx.Node | None:
        """The product of two activations that the softmax normalises, or None."""
        for node in self._upstream(softmax, stop=lambda n: self._is_product(n) or n in self.sites):
            if self._is_product(node):
                return node
        return None

    def _mixtures(self, softmax: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
        """Products that read the probabilities, with the values they mix."""
        pending, seen = [softmax], {softmax}
        while pending:
            probabilities = pending.pop()
            for user in probabilities.users:
                if user in seen or user.op == "output":
                    continue
                seen.add(user)
                if self._is_product(user):
                    first, second = _operands(user)
                    if first is probabilities and second is not probabilities:
                        yield user, second
                elif op_name(user) in _SHAPE:
                    pending.append(user)

    def _is_product(self, node: fx.Node) -> bool:
        if op_name(node) not in _PRODUCTS or node in self.sites:
            return False
        operands = _operands(node)
        return len(operands) == 2 and all(operand in self.data for operand in operands)

    def _site(
        self, node: fx.Node, query: fx.Node, key: fx.Node, value: fx.Node, *, transposed: bool, causal: bool
    ) -> AttentionSite:
        values = self._weights([value])
        return AttentionSite(
            name=values[0] if len(values) == 1 else node.name,
            node=node,
            query=query,
            key=key,
            value=value,
            key_transposed=transposed,
            heads=_size(query, -3),
            kv_heads=_heads_before_repeating(value),
            query_weights=self._weights([query]),
            key_weights=self._weights([key]),
            value_weights=values,
            rotary=any(self._is_rotation(between) for between in self._path(key)),
            causal=causal,
        )

    def _path(self, start: fx.Node) -> Iterator[fx.Node]:
        """Everything between ``start`` and the nearest weight sites, both included."""
        return self._upstream(start, stop=lambda node: node in self.sites)

    def _weights(self, starts: Iterable[fx.Node]) -> tuple[str, ...]:
        found: dict[str, None] = {}
        for start in starts:
            for node in self._path(start):
                found.update(dict.fromkeys(self.sites.get(node, ())))
        return tuple(sorted(found))

    def _is_rotation(self, node: fx.Node) -> bool:
        """A product of data with something that comes from neither data nor weights: positions."""
        if op_name(node) != "aten::mul":
            return False
        factors = [factor for factor in node.args[:2] if isinstance(factor, fx.Node)]
        outside = [factor for factor in factors if factor not in self.data and factor not in self.weights]
        return len(factors) == 2 and len(outside) == 1


def _writers(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Mutating ops by the value whose memory they write, views resolved."""
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        target = node.target
        if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable or not node.args:
            continue
        base = node.args[0]
        while isinstance(base, fx.Node) and op_name(base) in _SHAPE and isinstance(base.args[0], fx.Node):
            base = base.args[0]
        if isinstance(base, fx.Node) and base.op in ("call_function", "placeholder"):
            found.setdefault(base, []).append(node)
    return found


def _operands(product: fx.Node) -> tuple[fx.Node, ...]:
    """The two factors of a product, in order."""
    name = op_name(product)
    given: Sequence[object] = product.args[1:3] if name == "aten::baddbmm" else product.args[:2]
    if name == "aten::einsum":
        given = product.args[1] if isinstance(product.args[1], list | tuple) else ()
    return tuple(operand for operand in given if isinstance(operand, fx.Node))


def _heads_before_repeating(value: fx.Node) -> int | None:
    """Heads of a value before grouped-query attention expanded them."""
    node = value
    while op_name(node) in (*_SHAPE, _REPEAT) and isinstance(node.args[0], fx.Node):
        source = node.args[0]
        if op_name(node) == "aten::expand" and _rank(source) == 5:
            return _size(source, 1)
        if op_name(node) == _REPEAT:
            return _size(source, -3)
        node = source
    return _size(value, -3)


def _size(node: fx.Node, dim: int) -> int | None:
    tensor = node.meta.get("val")
    if not isinstance(tensor, Tensor) or tensor.dim() < 4:
        return None
    size: int | torch.SymInt = tensor.shape[dim]
    return size if isinstance(size, int) else None


def _rank(node: fx.Node) -> int:
    tensor = node.meta.get("val")
    return tensor.dim() if isinstance(tensor, Tensor) else 0
