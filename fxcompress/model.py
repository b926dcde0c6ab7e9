"""CompressedModel: the user's module with its weights in compressed form."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxcompress.artifact import Artifact, read_artifact, save_artifact
from fxcompress.compat import compile_in_place
from fxcompress.decoding import Generator
from fxcompress.edits import CompressionState
from fxcompress.errors import BackendError, FxCompressError
from fxcompress.explanation import SiteKernel
from fxcompress.generation_cache import CacheMaker
from fxcompress.ghost import contains_ghosts, ghost_copy, ghost_tag
from fxcompress.pretrained import save_plain
from fxcompress.registry import backend_class, exporter
from fxcompress.report import Report
from fxcompress.store import WeightStore


class CompressedModel:
    """A compressed model; called like the original.

    The module's own Python keeps running (generation loops, caches, sampling); every graph that PyTorch
    captures from it is rewritten with the artifact's forms. Compressed parameters of :attr:`model` are
    *ghosts*: NaN, no memory. Made by :func:`fxcompress.compress` and :func:`fxcompress.load`.

    Attributes:
        model: The module, ready to be called (it is compiled in place).
        report: What was compressed, how, and at what cost.
        artifact: The edits, their tensors lazily read from disk.
        tokenizer: The tokenizer given to ``compress`` or saved with the artifact, or None.
    """

    def __init__(
        self,
        module: nn.Module,
        artifact: Artifact,
        *,
        backend: str = "inductor",
        tokenizer: Any | None = None,
        device: torch.device | None = None,
    ) -> None:
        weights: dict[str, Tensor] = {}
        state = CompressionState(weights)
        state.forms = artifact.forms  # type: ignore[assignment]
        state.fused = list(artifact.fused)
        self._store = WeightStore(state)
        names = set(artifact.parameters)
        replaced = {name for name in names if artifact.is_replaced(name)}
        values = {name: artifact.tensors[name] for name in names - replaced}
        self.model = ghost_copy(module, values, replaced, self._store, device)
        artifact.restore_buffers(self.model)
        weights.update(dict(self.model.named_parameters()))
        self.artifact = artifact
        self.report = Report.from_dict(artifact.report)
        self.tokenizer = tokenizer
        self._folder: str | None = None
        self._caches = CacheMaker(self.model, state.forms)
        self.set_backend(backend)

    def set_backend(self, backend: str) -> None:
        """Run on another backend: ``"inductor"`` (default) or ``"eager"`` (the reference).

        Raises:
            BackendError: unknown backend.
        """
        self.backend = backend
        self._compiler = backend_class(backend)(self._store)
        for module in entry_points(self.model):
            compile_in_place(module, self._compiler)
        guard_ghosts(self.model)
        if hasattr(self.model, "generate"):
            structure = self.artifact.structure
            shapes = () if structure is None else structure.cache
            begin = partial(prepare, self._compiler)
            self.generate = Generator(self.model, self._compiler, begin, self._caches, shapes)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model."""
        prepare(self._compiler, self.model)
        self._caches.before_call(args, kwargs)
        with torch.no_grad():
            return self.model(*args, **kwargs)

    def __repr__(self) -> str:
        return f"CompressedModel({type(self.model).__name__}, {self.report.totals}, backend={self.backend!r})"

    @property
    def config(self) -> Any:
        """The module's configuration, when it has one."""
        return getattr(self.model, "config", None)

    def new_cache(self, capacity: int | None = None) -> Any:
        """An empty cache in the recipe's form, to pass as ``past_key_values``; ``generate`` makes its own.

        Args:
            capacity: Tokens there is room for. Default None: it grows.

        Raises:
            FxCompressError: the recipe quantized no cache.

        Example:
            >>> cache = small.new_cache()  # doctest: +SKIP
            >>> small(input_ids=ids, past_key_values=cache, use_cache=True)  # doctest: +SKIP
        """
        return self._caches.new(capacity)

    def resident_bytes(self) -> int:
        """Bytes held by parameters, buffers and packed weights, each storage counted once.

        Packed weights are built when the first graph that needs them is compiled; call the model once before.
        """
        tensors = [*self.model.parameters(), *self.model.buffers(), *self._store.resident_tensors()]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(storages.values())

    def explain(self) -> dict[str, str]:
        """Kernel of every linear site compiled so far, by parameter name."""
        return dict(self._compiler.choices)

    def explain_sites(self) -> list[SiteKernel]:
        """Every linear site compiled so far: its kernel, why that one, and the kernel's generated source."""
        reasons: dict[str, tuple[str, str, str]] = getattr(self._compiler, "reasons", dict)()
        found = []
        for name, kernel in sorted(self._compiler.choices.items()):
            why, title, source = reasons.get(name, (kernel, "", ""))
            found.append(SiteKernel(name, kernel, why, title, source))
        return found

    def measure_kernels(self, tokens: Sequence[int] = (1, 32, 512)) -> list[dict[str, Any]]:
        """Time every distinct product compiled so far, beside what the machine was measured to do.

        Args:
            tokens: Rows of activations to measure with.

        Returns:
            One row per product and number of tokens: weights, kernel, milliseconds, bytes and operations per
            second, and both as a share of the machine's (``read share``, ``peak share``).

        Raises:
            BackendError: the backend has no kernels of its own to measure.
        """
        measure = getattr(self._compiler, "measure_kernels", None)
        if measure is None:
            raise BackendError(f"backend {self.backend!r} has no kernels to measure.", fix="use 'inductor'.")
        rows: list[dict[str, Any]] = measure(tokens)
        return rows

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Save as a directory of safetensors and JSON; see :mod:`fxcompress.artifact`.

        Raises:
            ArtifactError: the directory exists, or cannot be written.
        """
        save_artifact(self.artifact, path, tokenizer=self.tokenizer, overwrite=overwrite)

    def save_pretrained(self, path: str | Path) -> None:
        """Save as a plain checkpoint of transformers, which loads it without fxcompress.

        For models whose weights are all dense (pruned, smoothed) and whose configuration can tell their
        structure: every layer cut alike, or whole layers removed.

        Raises:
            ArtifactError: a weight is quantized, the layers have sizes of their own, or the directory exists.

        Example:
            >>> small.save_pretrained("pruned")  # doctest: +SKIP
            >>> AutoModelForCausalLM.from_pretrained("pruned")  # doctest: +SKIP
        """
        save_plain(self.artifact, path, self.tokenizer)

    def export_onnx(
        self,
        path: str | Path,
        *,
        cache: bool = False,
        opset: int = 21,
        target: str = "onnxruntime",
        external_data: bool | str = "auto",
        example_inputs: Any | None = None,
        calibration: Sequence[Any] = (),
        overwrite: bool = False,
        attention: str = "fused",
        accuracy_level: int | None = None,
    ) -> Any:
        """Write an ONNX file that computes what this model computes, and check it in ONNX Runtime.

        Quantized weights stay quantized: as ``MatMulNBits`` and ``GatherBlockQuantized``, between
        ``QuantizeLinear`` and ``DequantizeLinear``, or as ``MatMulInteger``. Batch and sequence stay dynamic.

        Args:
            path: A new file that ends in ``.onnx``.
            cache: For decoders: take and return keys and values of earlier tokens, and write the files that
                generators read (``genai_config.json``, configuration, tokenizer) beside the model.
            opset: Version of the ONNX standard, 21…24. Default 21.
            target: ``"onnxruntime"`` (default) or ``"portable"``: only operators of the standard.
            external_data: Weights in a file of their own: True, False or ``"auto"`` (default: from 2 GiB on).
            example_inputs: One call of the model, as for :func:`fxcompress.compress`.
            calibration: Further calls that the result is checked on.
            overwrite: Replace an existing file.
            attention: With ``cache``: ``"fused"`` (default) or ``"plain"`` operators. ONNX Runtime's fused
                operator continues prompts of one sequence at a time; whole prompts and single tokens come in
                batches of any size.
            accuracy_level: Of ``MatMulNBits``: 4 rounds activations to int8 in blocks, which is fast; 1 keeps
                them in float; None (default) takes 4 where the mean KL divergence that it causes is at most
                0.005 nats.

        Returns:
            A report: errors against the reference on every set of inputs, size, kernels that ran.

        Raises:
            BackendError: onnx or onnxruntime is missing, something has no ONNX form, or ONNX Runtime computes
                something else; the message names the first diverging node.
            ArtifactError: the file cannot be written.

        Example:
            >>> print(small.export_onnx("model.onnx", cache=True))  # doctest: +SKIP
        """
        return exporter("onnx")(
            self,
            path,
            cache=cache,
            opset=opset,
            target=target,
            external_data=external_data,
            example_inputs=example_inputs,
            calibration=calibration,
            overwrite=overwrite,
            attention=attention,
            accuracy_level=accuracy_level,
        )


def prepare(compiler: Any, module: nn.Module) -> None:
    """Let the backend begin what it can before the first graph is there; most calls find it done."""
    begin = getattr(compiler, "prepare", None)
    if begin is not None:
        begin(module)


def entry_points(model: nn.Module) -> list[nn.Module]:
    """Modules that Python code may call by themselves: the model, and submodules that are models too.

    An encoder–decoder's ``generate`` calls the encoder directly; such submodules carry a configuration and
    name their main input, as the whole model does.
    """
    found = [model]
    for submodule in model.modules():
        own = hasattr(submodule, "config") and hasattr(submodule, "main_input_name")
        if submodule is not model and own and contains_ghosts(submodule):
            found.append(submodule)
    return found


def guard_ghosts(model: nn.Module) -> None:
    """Make what a ghosted module cannot do fail with an explanation.

    ``load_state_dict`` would end in a stride error, and a call that escapes compilation (Dynamo gave up on
    the code, or met its limit of recompilations) in NaN.
    """
    for name, submodule in model.named_modules():
        own = [key for key, parameter in submodule._parameters.items() if ghost_tag(parameter) is not None]
        if own and not getattr(submodule, "_fxcompress_guarded", False):
            submodule.register_load_state_dict_pre_hook(_refuse_state_dict)
            submodule.register_forward_pre_hook(_RefuseEager(f"{name}.{own[0]}".lstrip(".")))
            submodule._fxcompress_guarded = True


def _refuse_state_dict(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any, *_: Any
) -> None:
    for name, parameter in module._parameters.items():
        assigned = metadata.get("assign_to_params_buffers", False)
        if f"{prefix}{name}" in state_dict and ghost_tag(parameter) is not None and not assigned:
            raise FxCompressError(
                f"{prefix}{name}: is compressed, its values cannot be overwritten.",
                fix="compress the model that has the new weights, or load_state_dict(..., assign=True).",
            )


class _RefuseEager:
    """A forward hook that Dynamo traces to nothing and that Python, running uncompiled, trips over."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling() and any(
            ghost_tag(parameter) is not None for parameter in module._parameters.values()
        ):
            raise FxCompressError(
                f"{self.name}: is compressed, and the code that uses it was not compiled: Dynamo left it to"
                " Python (a graph break inside it, or the recompilation limit after many input shapes).",
                fix="see TORCH_LOGS=graph_breaks,recompiles; pad inputs to fewer shapes.",
            )


def temporary_artifact(artifact: Artifact, tokenizer: Any | None) -> tuple[Artifact, str]:
    """Move a freshly made artifact to disk, so that its tensors need not stay in memory."""
    folder = tempfile.mkdtemp(prefix="fxcompress-")
    try:
        save_artifact(artifact, Path(folder) / "artifact", tokenizer=tokenizer)
        return read_artifact(Path(folder) / "artifact"), folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def remove_with(owner: object, folder: str) -> None:
    """Delete ``folder`` when ``owner`` is gone."""
    weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True)
