"""The ``torch.compile`` backend: ``torch.compile(model, backend="fxcompress", options={...})``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, fx, nn

from fxcompress.apply import apply_state
from fxcompress.backends.cpu.forecast import compile_ahead
from fxcompress.backends.cpu.roofline import KernelUse, measure_kernels
from fxcompress.backends.cpu.sparse import executable_store, noted
from fxcompress.backends.executable import Executable, Trace
from fxcompress.backends.execution_plan import plan_execution, plan_reference
from fxcompress.backends.kept_steps import KeptSteps
from fxcompress.backends.regions import RegionCompiler
from fxcompress.backends.sources import GhostSource, OwnFormsFirst, source_from_options
from fxcompress.backends.target import TritonTarget, target_of
from fxcompress.capture.dynamo import program_from_dynamo
from fxcompress.capture.program import Program
from fxcompress.compat import probe_processor, runs_alone, traced_files
from fxcompress.errors import BackendError
from fxcompress.ghost import ghost_tag
from fxcompress.store import WeightStore

logger = logging.getLogger("fxcompress.backends")

_OPTIONS = frozenset({"recipe", "artifact", "inner"})
INNER = ("inductor", "eager")


class FormSource(Protocol):
    """Where the compressed forms of a captured graph come from."""

    def store(self, program: Program) -> WeightStore:
        """Forms for the program's weights, under the program's names."""
        ...


class CompressingBackend:
    """A Dynamo backend that rewrites each captured graph with the forms of ``source`` and compiles it.

    Args:
        source: Where forms come from.
        inner: ``"inductor"`` or ``"eager"`` (reference: the rewritten graph runs op by op).

    Raises:
        BackendError: unknown inner compiler.
    """

    def __init__(self, source: FormSource, inner: str = "inductor") -> None:
        if inner not in INNER:
            raise BackendError(f"inner compiler {inner!r} is unknown.", fix=f"use one of {', '.join(INNER)}.")
        self.source = source
        self.inner = inner
        self.choices: dict[str, str] = {}
        self.uses: list[KernelUse] = []

    def __call__(self, module: fx.GraphModule, example_inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        """Compile one graph captured by Dynamo."""
        with torch.no_grad():
            program = program_from_dynamo(module, example_inputs)
            store = self._store_for(program)
            packs = (torch.ops.fxcompress.update_cache.default, torch.ops.fxcompress.update_window.default)
            if not any(store.state.rewrites(name) for name in program.weight_of.values()) and not any(
                node.target in packs for node in program.graph.nodes
            ):
                return self._plain(program, module, example_inputs)
            applied = apply_state(program, store.state)
            regions = None
            if self.inner == "inductor":
                compiler = RegionCompiler(applied, store, compile_with_inductor)
                regions = compiler.compile()
                self.choices.update(compiler.choices)
                self.choices.update(noted(store, program, self.choices))
                self.uses += compiler.uses

        def rebind(weights: dict[str, Tensor]) -> WeightStore:
            other = Program(
                program.graph_module,
                program.weight_of,
                weights,
                program.parameters,
                program.aliases,
                program.inputs,
            )
            with torch.no_grad():
                return self._store_for(other)

        compressed = store.state.is_compressed
        if regions is None:
            plan = plan_reference(applied, compressed)
        else:
            plan = plan_execution(applied, regions, compressed)
        sizes = tuple(value for value in example_inputs if isinstance(value, torch.SymInt))
        return Executable(plan, program.weights, store, rebind, Trace(sizes, traced_files()))

    def _store_for(self, program: Program) -> WeightStore:
        """The store of a program's forms; compiled for a CPU, sparse weights have the forms they run in."""
        store = self.source.store(program)
        cuda = next((t.device for t in program.weights.values() if t.device.type == "cuda"), None)
        if cuda is not None:
            store.place(cuda)
        on_cpu = cuda is None and not isinstance(target_of(()), TritonTarget)
        return executable_store(store) if self.inner == "inductor" and on_cpu else store

    def _plain(
        self, program: Program, module: fx.GraphModule, example_inputs: Sequence[Any]
    ) -> Callable[..., Any]:
        """A graph without compressed weights: compiled as it is."""
        if self.inner == "eager":
            return module.forward
        from torch._inductor.compile_fx import compile_fx

        return cast("Callable[..., Any]", compile_fx(module, example_inputs))


class InductorBackend(CompressingBackend):
    """Backend of a compressed model: blocks compiled by Inductor around the fastest kernels torch has.

    Args:
        store: The model's packed weights.

    Attributes:
        kept: Decoding steps that earlier processes compiled.
    """

    summary = (
        "Inductor, with kernels generated for the machine (or ATen and oneDNN) for the compressed products"
    )

    def __init__(self, store: WeightStore) -> None:
        super().__init__(GhostSource(store), "inductor")
        self._store = store
        self._prepared = False
        self.kept = KeptSteps(lambda: executable_store(store), self.choices, self.uses)

    @classmethod
    def begin(cls) -> None:
        """Start what takes a while and depends on no model, before one is loaded."""
        probe_processor()

    def prepare(self, module: nn.Module) -> None:
        """Start compiling the kernels ``module`` will need, while its first graph is traced."""
        if self._prepared:
            return
        self._prepared = True
        parameters = [p for p in module.parameters() if p.is_floating_point()]
        on_cpu = all(p.device.type == "cpu" for p in parameters)
        if not parameters or not on_cpu or isinstance(target_of(parameters), TritonTarget):
            return
        tables = {
            tag.name
            for part in module.modules()
            if isinstance(part, nn.Embedding) and (tag := ghost_tag(part.weight)) is not None
        }
        attends = hasattr(module, "generate")
        compile_ahead(self._store.state, tables, parameters[0].dtype, attention=attends)

    def reasons(self) -> dict[str, tuple[str, str, str]]:
        """By site: why its kernel was chosen, the generated kernel's name, and its source."""
        found = {}
        for use in self.uses:
            reason = use.target.reason(use.spec)
            found.update({str(term): reason for term in use.terms})
        return found

    def measure_kernels(self, tokens: Sequence[int]) -> list[dict[str, Any]]:
        """Time of every distinct product compiled so far, see :mod:`fxcompress.backends.cpu.roofline`."""
        return measure_kernels(self.uses, executable_store(self._store), tokens)


class EagerBackend(CompressingBackend):
    """Reference backend of a compressed model: the rewritten graph, op by op.

    Args:
        store: The model's packed weights.
    """

    summary = "the rewritten graph op by op, weights dequantized at every use (reference)"

    def __init__(self, store: WeightStore) -> None:
        super().__init__(GhostSource(store), "eager")


def compile_with_inductor(module: fx.GraphModule, fakes: Sequence[Any]) -> Callable[[list[Any]], Any]:
    """Compile a flat graph with Inductor; the result takes its inputs as one list, which it may empty.

    Sizes are checked by Dynamo's guards already; Inductor's assertions on every input and intermediate cost a
    tenth of a decode step. AOTAutograd's run-time wrappers, a few layers of Python around every block, are
    left out where they have nothing to do: no output that aliases another tensor, no input whose mutation
    must be repeated outside of the graph.
    """
    from torch._functorch import config as functorch_config
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    graphs: list[tuple[Any, int, bool]] = []

    def inner(graph: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
        compiled = compile_fx_inner(graph, inputs, **options)
        graphs.append((compiled, len(inputs), runs_alone()))
        return compiled

    with (
        config.patch(size_asserts=False, alignment_asserts=False),
        functorch_config.patch(enable_autograd_cache=False),
    ):
        wrapped = cast("Callable[..., Any]", compile_fx(module, list(fakes), inner_compile=inner))
    if len(graphs) == 1 and graphs[0][1] == len(fakes) and graphs[0][2]:
        return cast("Callable[[list[Any]], Any]", graphs[0][0])
    return lambda inputs: wrapped(*inputs)


def fxcompress_backend(
    module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    **_: Any,
) -> Callable[..., Any]:
    """Entry point of ``torch.compile(model, backend="fxcompress")``.

    Args:
        module: Graph captured by Dynamo.
        example_inputs: Its inputs.
        options: ``recipe``: a data-free recipe (name, YAML path or Recipe; default ``"w8a16"``; None leaves
            weights as they are, for programs that keep their caches in packed form already), or
            ``artifact``: directory of a saved compression;
            ``inner``: ``"inductor"`` (default) or ``"eager"``.

    A compressed model is compiled with the forms it has; then options name neither.

    Raises:
        BackendError: unknown option, or both ``recipe`` and ``artifact``.
    """
    options = dict(options or {})
    unknown = sorted(set(options) - _OPTIONS)
    if unknown:
        raise BackendError(
            f"unknown option(s) {', '.join(unknown)}.", fix=f"use {', '.join(sorted(_OPTIONS))}."
        )
    if "recipe" in options and "artifact" in options:
        raise BackendError("options 'recipe' and 'artifact' exclude each other.", fix="give one of them.")
    source = OwnFormsFirst(source_from_options(options), asked=bool({"recipe", "artifact"} & set(options)))
    backend = CompressingBackend(source, options.get("inner", "inductor"))
    return backend(module, example_inputs)


__all__ = [
    "CompressingBackend",
    "EagerBackend",
    "FormSource",
    "InductorBackend",
    "compile_with_inductor",
    "fxcompress_backend",
]
