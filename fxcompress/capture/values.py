"""Types of values that a rewriting put into a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from fxcompress.compat import fake_mode_of

__all__ = ["infer_values"]


def infer_values(graph: fx.Graph) -> None:
    """Give every call without ``meta["val"]`` its fake value, computed from those of its arguments.

    Blocks are cut wherever a graph repeats, so any value may become the input of a compiled block and must
    have a type. Equal calls on equal types are computed once: all layers of a model share one computation.
    """
    values = [node.meta.get("val") for node in graph.nodes]
    mode = fake_mode_of(values)
    if mode is None:
        return
    faked = _Faked(mode, device_of(values))
    known: dict[Any, Any] = {}
    # Some ops compute their type with operators on symbolic sizes, which only Python's dispatcher serves.
    with mode, enable_python_dispatcher(), torch.no_grad():
        for node in graph.nodes:
            if node.op != "call_function" or "val" in node.meta:
                continue
            key = (node.target, repr(fx.node.map_arg((node.args, node.kwargs), _described)))
            if key not in known:
                args, kwargs = fx.node.map_arg(
                    (node.args, node.kwargs), lambda source: source.meta.get("val")
                )
                args, kwargs = pytree.tree_map_only(Tensor, faked, (args, kwargs))
                known[key] = node.target(*args, **kwargs)
            # A tensor of its own: tracers tell values apart by identity.
            node.meta["val"] = pytree.tree_map_only(Tensor, _another, known[key])


def _another(value: Tensor) -> Tensor:
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def device_of(values: Sequence[Any]) -> torch.device:
    """Where a graph with these values computes: on the first CUDA device among them, else the CPU."""
    devices = (value.device for value in values if isinstance(value, Tensor))
    return next((device for device in devices if device.type == "cuda"), torch.device("cpu"))


class _Faked:
    """Puts plain meta tensors (of forms) into the graph's fake mode, where they will lie.

    Args:
        mode: The mode, active.
        device: Of the graph.
    """

    def __init__(self, mode: FakeTensorMode, device: torch.device) -> None:
        self.mode, self.device = mode, device

    def __call__(self, value: Tensor) -> Tensor:
        if isinstance(value, FakeTensor):
            return value
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=self.device)


class _Text(str):
    def __repr__(self) -> str:
        return str(self)


def _described(source: fx.Node) -> Any:
    return _Text(pytree.tree_map_only(Tensor, _type, source.meta.get("val")))


def _type(value: Tensor) -> Mapping[str, Any]:
    sizes = [str(size) for size in (*value.shape, *value.stride())]
    return {"dtype": str(value.dtype), "device": str(value.device), "sizes": ",".join(sizes)}
