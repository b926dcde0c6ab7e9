"""Compiled decoding steps that later processes find again, without tracing or compiling anything.

What Dynamo, this package and Inductor make of a step takes seconds for a small model even when every kernel
is in a cache: the model's Python is traced, layer by layer. A step is kept as a folder beside the compiled
kernels (``FXCOMPRESS_CACHE_DIR``, folder ``steps``): the plan of its slots as JSON, the Python that Inductor
wrote for each distinct block, and the graph's constants. Its name is a digest of all that it depends on
(:mod:`fxcompress.backends.kept_key`); what the step was compiled to assume of sizes is checked at every call,
and that the model is still what it was. Whatever does not fit takes the way through Dynamo.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fxcompress.backends.cpu.native import loaded_kernels, use_kernel
from fxcompress.backends.cpu.roofline import KernelUse
from fxcompress.backends.cpu.toolchain import cache_directory
from fxcompress.backends.executable import Call, Executable, watch_calls
from fxcompress.backends.kept_key import ModuleWatch, file_digest, key_of, process_state
from fxcompress.backends.kept_plan import (
    NotKeptError,
    plan_from_entry,
    plan_to_entry,
    use_from_entry,
    use_to_entry,
)
from fxcompress.compat import compiled_source, guards_hold, guards_of, load_source
from fxcompress.errors import BindingError
from fxcompress.ghost import ghost_tag
from fxcompress.store import WeightStore

__all__ = ["KEEP_VARIABLE", "KeptCall", "KeptSteps"]

logger = logging.getLogger("fxcompress.backends")
KEEP_VARIABLE = "FXCOMPRESS_KEEP_STEPS"
"""``0``: steps are neither kept nor looked for."""
MOST_KEPT = 64
"""Steps that are kept; every size of batch and cache has two."""
_MOST_CONSTANTS = 1 << 20
"""Bytes of constants in a graph that is kept."""
FREE = frozenset({"ids", "positions"})
"""Roles of tensors whose second dimension is the number of tokens."""


@dataclass
class KeptCall:
    """A step that can be called with the session's tensors.

    Args:
        executable: What runs.
        sources: Per argument: ``("weight", name)``, ``("named", role)`` or ``("tokens", "")``.
        result: Which result the caller wants, if any.
        guards: What was assumed of the number of tokens.
        tokens: The only number of tokens it serves, or None where the guards decide.
        module: The model; ``watch`` tells whether it is what it was.
        process: What the process looked like.
    """

    executable: Executable
    sources: list[tuple[str, str]]
    result: int | None
    guards: str
    tokens: int | None
    module: nn.Module
    watch: ModuleWatch
    process: tuple[Any, ...]

    def arguments(self, named: Mapping[str, Tensor], tokens: int) -> tuple[Any, ...] | None:
        """The arguments of a call, or None where the step does not serve it (any more)."""
        count = sum(kind == "tokens" for kind, _ in self.sources)
        if tokens != (self.tokens or tokens) or not guards_hold(self.guards, [tokens] * count):
            return None
        changed = self.watch.changed() or ("the process" if process_state() != self.process else None)
        if changed is not None:
            logger.debug("%s: a kept step does not serve a call: %s", type(self.module).__name__, changed)
            return None
        weights = _weights_of(self.module)
        values: dict[str, Mapping[str, Any]] = {"weight": weights, "named": named, "tokens": {"": tokens}}
        found = tuple(values[kind].get(name) for kind, name in self.sources)
        missing = any(value is None for value in found)
        return None if missing or not self.executable.is_bound_to(found) else found


class KeptSteps:
    """Finds and keeps the steps of one compressed model.

    Args:
        store: Its packed weights, as compiled graphs read them.
        choices, uses: Of the backend, which learns of them what its graphs run.
    """

    def __init__(
        self, store: Callable[[], WeightStore], choices: dict[str, str], uses: list[KernelUse]
    ) -> None:
        self._store, self._choices, self._uses = store, choices, uses

    def watch(self) -> AbstractContextManager[list[Call]]:
        """See :func:`watch_calls`."""
        return watch_calls()

    def find(self, kind: str, module: nn.Module, named: Mapping[str, Tensor]) -> KeptCall | None:
        """A step kept before, ready to be called, or None."""
        if os.environ.get(KEEP_VARIABLE) == "0" or not _on_cpu(module):
            return None
        folder = _folder()
        try:
            store = self._store()
            key = key_of(kind, module, store, named, FREE)
            if key is None:
                return None
            folder = folder / f"{kind}-{key}"
            content = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
            changed = [path for path, digest in content["files"].items() if file_digest(path) != digest]
            if changed:
                raise BindingError(f"{changed[0]} has changed.")
            found = self._load(folder, content, module, named, store)
            os.utime(folder)
        except FileNotFoundError:
            found = None
        except Exception as error:  # whatever is wrong with it, there is another way
            logger.info("%s: a kept step cannot be used (%s: %s)", folder.name, type(error).__name__, error)
            if folder != _folder():
                shutil.rmtree(folder, ignore_errors=True)
            found = None
        return found

    def _load(
        self,
        folder: Path,
        content: dict[str, Any],
        module: nn.Module,
        named: Mapping[str, Tensor],
        store: WeightStore,
    ) -> KeptCall:
        for number, name in content["kernels"]:
            use_kernel(number, cache_directory() / name)
        functions = [load_source((folder / name).read_text(encoding="utf-8")) for name in content["blocks"]]
        constants = load_file(folder / "constants.safetensors")
        plan = plan_from_entry(content["plan"], functions, constants)
        sources = [(kind, name) for kind, name in content["sources"]]
        values: dict[str, Mapping[str, Any]] = {
            "weight": _weights_of(module),
            "named": named,
            "tokens": {"": 0},
        }
        arguments = [values[kind][name] for kind, name in sources]
        for index in plan.compressed:
            tag = ghost_tag(arguments[index])
            if tag is None or tag.name != plan.weights[index]:
                raise BindingError(f"{plan.weights[index]}: another parameter stands in its place.")
        weights = {name: arguments[index] for index, name in plan.weights.items()}
        executable = Executable(plan, weights, store, _no_others)
        self._choices.update(content["choices"])
        self._uses += [use_from_entry(item) for item in content["uses"]]
        return KeptCall(
            *(executable, sources, content["result"], content["guards"], content["tokens"]),
            *(module, ModuleWatch(module), process_state()),
        )

    def keep(
        self,
        kind: str,
        module: nn.Module,
        named: Mapping[str, Tensor],
        calls: Sequence[Call],
        result: Tensor | None = None,
    ) -> None:
        """Keep what a call ran, if it was one graph of blocks and nothing else; failure is no error.

        Args:
            kind: ``"prompt"``, ``"token"`` (a prompt of one) or ``"step"``.
            module: The model.
            named: The call's own tensors, by role.
            calls: What :meth:`watch` saw.
            result: The result that the caller reads.
        """
        if os.environ.get(KEEP_VARIABLE) == "0":
            return
        try:
            if not _on_cpu(module):
                raise NotKeptError("it does not run on a CPU")
            if len(calls) != 1:
                raise NotKeptError(f"it is {len(calls)} graphs")
            key = key_of(kind, module, self._store(), named, FREE)
            if key is None:
                raise NotKeptError("it has hooks, or functions of its own")
            content, texts, constants = self._content(module, named, calls[0], result)
            _write(_folder() / f"{kind}-{key}", content, texts, constants)
        except Exception as reason:  # the call itself went well
            logger.info("%s: this step is not kept: %s", type(module).__name__, reason)

    def _content(
        self, module: nn.Module, named: Mapping[str, Tensor], call: Call, result: Tensor | None
    ) -> tuple[dict[str, Any], dict[str, str], dict[str, Tensor]]:
        plan = call.executable.plan
        texts: dict[str, str] = {}
        blocks: list[str] = []
        for step in plan.steps:
            source = compiled_source(step.function)
            if source is None:
                raise NotKeptError("a block is more than what Inductor wrote")
            texts.setdefault(source, f"block_{len(texts)}.py")
            blocks.append(texts[source])
        constants = {str(slot): _constant(value) for slot, value in plan.attributes}
        if sum(value.nbytes for value in constants.values()) > _MOST_CONSTANTS:
            raise NotKeptError("its graph holds large constants")
        places = [i for i, value in enumerate(call.results) if value is result]
        if result is not None and not places:
            raise NotKeptError("its result is not one of the graph's")
        tokens = next((value.shape[1] for role, value in named.items() if role in FREE), 1)
        sources = _sources(module, named, call, tokens)
        trace = call.executable.take_trace()
        if trace is None:
            raise NotKeptError("its graph was compiled for another call")
        folder = cache_directory()
        loaded = {number: path.name for number, path in loaded_kernels().items()}
        kernels = [[number, name] for number, name in loaded.items() if (folder / name).is_file()]
        free = any(kind == "tokens" for kind, _ in sources)
        names = list(texts.values())
        content = {
            "plan": {**plan_to_entry(plan), "functions": [names.index(name) for name in blocks]},
            "blocks": names,
            "sources": sources,
            "result": places[0] if places else None,
            "guards": guards_of(list(trace.sizes)),
            "files": _digests(trace.files),
            "tokens": None if free else tokens,
            "kernels": kernels,
            "choices": dict(self._choices),
            "uses": [use_to_entry(use) for use in self._uses],
        }
        return content, {name: source for source, name in texts.items()}, constants


def _digests(files: Sequence[str] | None) -> dict[str, str]:
    """By path, for when it is looked for again."""
    if files is None:
        raise NotKeptError("this torch does not tell which code it traced")
    found = {path: file_digest(path) for path in files}
    missing = next((path for path, digest in found.items() if digest is None), None)
    if missing is not None:
        raise NotKeptError(f"it was traced through code that has no file ({missing})")
    return {path: digest for path, digest in found.items() if digest is not None}


def _folder() -> Path:
    return cache_directory() / "steps"


def _on_cpu(module: nn.Module) -> bool:
    return all(parameter.device.type == "cpu" for parameter in module.parameters())


def _weights_of(module: nn.Module) -> dict[str, Tensor]:
    found: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    found.update(dict(module.named_buffers(remove_duplicate=False)))
    return found


def _no_others(_: Mapping[str, Tensor]) -> WeightStore:
    raise BindingError("a kept step is bound to the parameters it was found with.")


def _constant(value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.device.type != "cpu" or type(value) is not Tensor:
        raise NotKeptError("its graph holds constants that are no plain tensors")
    return value.detach().contiguous()


def _sources(
    module: nn.Module, named: Mapping[str, Tensor], call: Call, tokens: int
) -> list[tuple[str, str]]:
    """Where every argument comes from, found by identity."""
    known: dict[int, tuple[str, str]] = {}
    for name, tensor in _weights_of(module).items():
        known.setdefault(id(tensor), ("weight", name))
    for role, tensor in named.items():
        known.setdefault(id(tensor), ("named", role))
    found = []
    for argument in call.arguments:
        if isinstance(argument, int) and not isinstance(argument, bool) and argument == tokens:
            found.append(("tokens", ""))
        elif isinstance(argument, Tensor) and id(argument) in known:
            found.append(known[id(argument)])
        else:
            raise NotKeptError(
                f"an argument ({type(argument).__name__}) is none of the model's or the call's"
            )
    return found


def _forget_old(folder: Path) -> None:
    """Make room: those that were used last stay."""
    kept = sorted(folder.glob("*-*"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in kept[MOST_KEPT - 1 :]:
        shutil.rmtree(path, ignore_errors=True)


def _write(
    folder: Path, content: dict[str, Any], texts: Mapping[str, str], constants: Mapping[str, Tensor]
) -> None:
    """Write aside, then rename; who is first is right for all."""
    if folder.exists():
        return
    _forget_old(folder.parent)
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    aside = Path(tempfile.mkdtemp(prefix=".keeping-", dir=folder.parent))
    try:
        (aside / "plan.json").write_text(json.dumps(content), encoding="utf-8")
        for name, text in texts.items():
            (aside / name).write_text(text, encoding="utf-8")
        save_file(dict(constants), aside / "constants.safetensors")
        if not folder.exists():
            aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
