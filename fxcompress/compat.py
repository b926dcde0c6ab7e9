"""The one place that knows differences between the supported torch versions (2.11–2.13)."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo import trace_rules
from torch._dynamo.external_utils import wrap_inline
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

RECOMPILE_LIMIT = 64
"""Graphs Dynamo may keep per function of a compressed model: shapes, caches, generation stages."""


def placeholder_source(node: fx.Node) -> str | None:
    """Dynamo's source path of a placeholder (``L['self']._modules['a']…``), or None when it has none."""
    argument = node.meta.get("grapharg")
    source = getattr(argument, "source", None) or getattr(node, "_dynamo_source", None)
    if source is None:
        return None
    name = source.name
    return str(name() if callable(name) else name)


def fake_mode_of(values: list[Any]) -> FakeTensorMode | None:
    """The fake mode of the first fake tensor among ``values``."""
    for value in values:
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return None


def trace_pre_dispatch(function: Any, fakes: list[Any], mode: FakeTensorMode | None) -> fx.GraphModule:
    """Trace ``function`` to pre-dispatch ATen on fake values, inside the mode they belong to.

    Graphs with ``vmap`` regions (scans of state-space models) lose track of values at that level, which shows
    as fake tensors baked in as constants; they are traced below dispatch instead, where ``linear`` appears as
    ``addmm`` or ``mm`` on a transposed weight.
    """
    traced = _trace(function, fakes, mode, pre_dispatch=True)
    if any(isinstance(value, FakeTensor) for value in vars(traced).values()) or _has_fake_buffers(traced):
        traced = _trace(function, fakes, mode, pre_dispatch=False)
    return traced


def _trace(
    function: Any, fakes: list[Any], mode: FakeTensorMode | None, *, pre_dispatch: bool
) -> fx.GraphModule:
    tracer = make_fx(function, pre_dispatch=pre_dispatch, tracing_mode="real", _allow_non_fake_inputs=True)
    if mode is None:
        return tracer(*fakes)
    with mode:
        return tracer(*fakes)


def _has_fake_buffers(module: fx.GraphModule) -> bool:
    return any(isinstance(buffer, FakeTensor) for buffer in module.buffers())


def compile_in_place(module: nn.Module, backend: Any) -> None:
    """``module.compile(backend=...)``, also for classes whose forward Dynamo never traces by itself.

    Dynamo skips frames of torch's own modules (``nn.Sequential``); one frame of a plain function around the
    call makes it look inside.
    """
    if any(isinstance(part, nn.RNNBase) for part in module.modules()):
        torch._dynamo.config.allow_rnn = True  # else Dynamo runs recurrent layers as they are: on ghosts
    call = module._call_impl
    if trace_rules.check(module.forward):
        call = wrap_inline(call)
    module._compiled_call_impl = torch.compile(call, backend=backend, **_recompile_options())


def compile_function(function: Any, backend: Any) -> Any:
    """``torch.compile`` of a function whose arguments keep their sizes, as one graph."""
    return torch.compile(function, backend=backend, fullgraph=True, dynamic=False, **_recompile_options())


def _recompile_options() -> dict[str, Any]:
    """Let no graph of another model count against a model's limit of recompilations.

    Code that models share (wrappers of one library) would; past the limit Dynamo runs the code as it is,
    which for ghosts means NaN.
    """
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:  # torch 2.13
        return {"isolate_recompiles": True, "recompile_limit": RECOMPILE_LIMIT}
    return {}


def compiled_source(function: Any) -> str | None:
    """The Python source of what Inductor made of a graph, if that is all it takes to run it on a CPU.

    Example:
        >>> compiled_source(print) is None
        True
    """
    source = getattr(function, "source_code", None)
    alone = not getattr(function, "constants", True) and not getattr(function, "frozen_param_names", True)
    plain = not getattr(function, "inputs_to_check", True) and not getattr(
        function, "torchbind_constants", True
    )
    on_cpu = set(getattr(function, "device_types", ())) == {"cpu"}
    return str(source) if source and alone and plain and on_cpu else None


@functools.cache
def probe_processor() -> threading.Thread:
    """Let Inductor find out, in a thread, what this processor can do: it asks in processes of its own.

    The answer is needed for the first compiled code that is loaded, and is known from then on.
    """

    def ask() -> None:
        from torch._inductor import cpu_vec_isa

        with contextlib.suppress(Exception):  # met again, and reported, by whoever needs the answer
            cpu_vec_isa.pick_vec_isa()

    thread = threading.Thread(target=ask, name="fxcompress-probe", daemon=True)
    thread.start()
    return thread


def load_source(source: str) -> Any:
    """The function of a :func:`compiled_source`; its C++ is compiled unless a cache has it."""
    from torch._inductor.codecache import PyCodeCache

    probe_processor().join()
    return PyCodeCache.load(source).call


def guards_of(sizes: list[torch.SymInt]) -> str:
    """What has been assumed of symbolic sizes, as an expression for :func:`guards_hold`."""
    if not sizes:
        return ""
    return sizes[0].node.shape_env.produce_guards_expression(sizes) or ""


def traced_files() -> tuple[str, ...] | None:
    """The files of all code that Dynamo has traced for the graph being compiled; None where it cannot tell.

    Of code without a file, two kinds are left out: Python's own (``<frozen …>``), and methods that
    ``dataclass`` wrote, which are what their class says.
    """
    context = torch._guards.TracingContext.try_get()
    codes = getattr(context, "traced_code", None) or ()
    names = {code.co_filename for code in codes if code.co_filename != "<string>" or code.co_name[:2] != "__"}
    return tuple(sorted(name for name in names if not name.startswith("<frozen "))) if codes else None


def guards_hold(expression: str, sizes: list[int]) -> bool:
    """Whether sizes are as assumed."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    return not expression or bool(ShapeEnv().evaluate_guards_expression(expression, sizes))


def runs_alone() -> bool:
    """Whether the graph that AOTAutograd is handing to its compiler needs none of AOTAutograd at run time."""
    context = torch._guards.TracingContext.try_get()
    metadata: Any = getattr(context, "fw_metadata", None)
    if metadata is None:
        return False
    plain = all(info.output_type.name == "non_alias" for info in metadata.output_info)
    return plain and metadata.num_mutated_inp_runtime_indices == 0 and not metadata.tokens
