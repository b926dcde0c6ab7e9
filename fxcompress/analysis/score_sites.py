"""Sites whose outputs meet in attention scores: queries and keys, found by dataflow.

A score is the product of two activations that leads to a softmax through element-wise ops, or what
``scaled_dot_product_attention`` multiplies inside. Walking back from the two factors, the first sites met are
the query and key projections; rotations, norms and views may lie between.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import fx

from fxcompress.analysis.op_arguments import arguments, aten_names, op_name
from fxcompress.analysis.site_types import Site
from fxcompress.capture.program import Program

_SOFTMAX = aten_names("softmax _softmax _safe_softmax log_softmax")
_PRODUCTS = aten_names("matmul bmm mm einsum baddbmm")
_ELEMENTWISE = aten_names(
    """
    to _to_copy type_as clone contiguous view reshape _unsafe_view unsqueeze squeeze transpose permute expand
    slice mul div add sub neg tanh where masked_fill softcap clamp dropout cat
    """
)


def score_sites(program: Program, sites: Sequence[Site]) -> frozenset[str]:
    """Names of weights whose products become queries or keys.

    Args:
        program: The program.
        sites: All its weight sites.
    """
    by_node: dict[fx.Node, list[Site]] = {}
    for site in sites:
        by_node.setdefault(site.node, []).append(site)
    factors: list[fx.Node] = []
    for node in program.graph.nodes:
        name = op_name(node)
        if name == "aten::scaled_dot_product_attention":
            factors += [arguments(node)["query"], arguments(node)["key"]]
        elif name in _SOFTMAX:
            for product in _products_before(node, by_node):
                factors += product.all_input_nodes
    return frozenset(site.name for node in _sites_before(factors, by_node) for site in by_node[node])


def _products_before(softmax: fx.Node, sites: dict[fx.Node, list[Site]]) -> list[fx.Node]:
    """Products of two activations that reach a softmax through element-wise ops only."""
    found = []
    queue = list(softmax.all_input_nodes)
    seen = set(queue)
    for node in queue:
        name = op_name(node)
        if node in sites:
            continue
        if name in _PRODUCTS:
            found.append(node)
        elif name in _ELEMENTWISE:
            new = [source for source in node.all_input_nodes if source not in seen]
            seen.update(new)
            queue += new
    return found


def _sites_before(start: Iterable[fx.Node], sites: dict[fx.Node, list[Site]]) -> list[fx.Node]:
    """The nearest sites before some values."""
    queue = list(dict.fromkeys(start))
    seen = set(queue)
    found = []
    for node in queue:
        if node in sites:
            found.append(node)
            continue
        new = [source for source in node.all_input_nodes if source not in seen]
        seen.update(new)
        queue += new
    return found
