"""Fixed memory for decoding: a prompt is read, then one compiled step is replayed on the same tensors.

A step reads and writes tensors that stay where they are: the last token, a cache of fixed capacity, the
logits. So after one step through Dynamo, whose guards check all that could have changed, the others call the
compiled graph directly; what a step computes (the greedy token included) lies in that graph. A backend may
keep compiled calls for later processes, which then trace nothing at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fxcompress.compat import compile_function
from fxcompress.decoding_cache import CacheShapes, NotCoveredError
from fxcompress.device_graph import on_device
from fxcompress.errors import FxCompressError
from fxcompress.evaluate import parameter_names
from fxcompress.generation_cache import CacheMaker, fixed_cache

__all__ = ["Backend", "DecodeSession", "Keeper", "Kept"]


class Backend(Protocol):
    """What compiles a captured graph."""

    def __call__(self, module: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile."""
        ...


class _Recorder:
    """A backend that remembers the last call of what it compiled."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.last: tuple[Any, tuple[Any, ...]] | None = None

    def __call__(self, module: torch.fx.GraphModule, example_inputs: Sequence[Any], **_: Any) -> Any:
        compiled = self._backend(module, example_inputs)

        def run(*args: Any) -> Any:
            self.last = (compiled, args)
            return compiled(*args)

        return run

    def replay(self) -> Callable[[], object] | None:
        """The last call again, on the same tensors and without checks; None if its graph cannot."""
        compiled, args = self.last or (None, ())
        self.last = None
        make = getattr(compiled, "replay", None)
        return None if make is None else make(args)


class Kept(Protocol):
    """A compiled call of an earlier process."""

    result: int | None

    @property
    def executable(self) -> Any:
        """What runs."""
        ...

    def arguments(self, named: Mapping[str, Tensor], tokens: int) -> tuple[Any, ...] | None:
        """Its arguments for a call, or None where it does not serve it."""
        ...


class Keeper(Protocol):
    """Where a backend keeps compiled calls for later processes."""

    def watch(self) -> AbstractContextManager[list[Any]]:
        """The compiled graphs called inside the block."""
        ...

    def find(self, kind: str, module: nn.Module, named: Mapping[str, Tensor]) -> Kept | None:
        """A call kept before."""
        ...

    def keep(
        self,
        kind: str,
        module: nn.Module,
        named: Mapping[str, Tensor],
        calls: Sequence[Any],
        result: Tensor | None = None,
    ) -> None:
        """Keep a call, if it can be kept."""
        ...


class _NoKeeper:
    """For backends that keep nothing."""

    def watch(self) -> AbstractContextManager[list[Any]]:
        return nullcontext([])

    def find(self, *_: Any) -> None:
        return None

    def keep(self, *_: Any) -> None:
        return None


class DecodeSession:
    """Fixed memory for decoding: a cache, the last token, the logits of the last step.

    Args:
        module: A decoder of transformers, compiled in place.
        backend: Compiles the step.
        batch: Sequences.
        capacity: Tokens the cache can hold.
        padded: Whether prompts may be padded; the step then also has a mask and positions.
        caches: Makes quantized caches, when the model has them.
        shapes: ``(heads, size)`` of every layer's keys, where the configuration does not tell them.

    Raises:
        NotCoveredError: (prefill) the model's cache keeps counts outside of tensors, or has a shape that its
            configuration does not tell.

    Example:
        >>> session = DecodeSession(small.model, backend, 1, 256, False)  # doctest: +SKIP
        >>> logits = session.prefill(ids); logits = session.step()  # the greedy token's successor
    """

    def __init__(
        self,
        module: nn.Module,
        backend: Backend,
        batch: int,
        capacity: int,
        padded: bool,
        caches: CacheMaker | None = None,
        shapes: CacheShapes = (),
    ) -> None:
        self.capacity, self.padded = capacity, padded
        self._module, self._recorder = module, _Recorder(backend)
        self._keeper: Keeper = getattr(backend, "kept", None) or _NoKeeper()
        self._kept: dict[str, Kept | None] = {}
        self._asked: set[str] = set()
        device = self._device = next(module.parameters()).device
        self._cache = fixed_cache(module, caches, batch, capacity, device, shapes)
        if padded and any(getattr(layer, "slides", False) for layer in self._cache.layers):
            raise NotCoveredError("padded prompts, and layers that forget old tokens", this_call=True)
        self.token = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.logits = torch.empty(0)
        self._extra: dict[str, Tensor] = {}
        if padded:
            self._extra["attention_mask"] = torch.ones(batch, capacity, dtype=torch.long, device=device)
            self._extra["position_ids"] = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self._step = compile_function(_step, self._recorder)
        self._replay: Callable[[], object] | None = None
        self._proven = False
        self._used = 0
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in parameter_names(module) else {}

    def prefill(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Start over with prompts ``[B, T]`` (and ``[B, T]`` mask of ones and zeros): logits ``[B, V]``.

        Raises:
            FxCompressError: the prompt is longer than the cache, or its mask is missing or not expected.
        """
        if (mask is not None) != self.padded:
            raise FxCompressError("mask: expected exactly when the session was made with padded=True.")
        self._used = 0
        self._take(ids.shape[1])
        self._cache.reset()
        self._replay = None
        given: dict[str, Tensor] = {}
        if mask is not None:
            self._extra["attention_mask"].fill_(1)[:, : ids.shape[1]] = mask
            positions = (mask.long().cumsum(-1) - 1).clamp_min(0)
            given = {"attention_mask": self._extra["attention_mask"], "position_ids": positions}
            self._extra["position_ids"].copy_(positions[:, -1:] + 1)
            torch._dynamo.maybe_mark_dynamic(positions, 1)
        # A slice of one row keeps the strides of where it was cut from, for which Dynamo would compile again.
        ids = ids.clone(memory_format=torch.contiguous_format)
        torch._dynamo.maybe_mark_dynamic(ids, 1)
        logits = self._read(ids, given)[:, -1].float()
        if self.logits.shape != logits.shape:
            self.logits = torch.empty_like(logits)
        self.logits.copy_(logits)
        self.token.copy_(logits.argmax(-1, keepdim=True))
        return self.logits

    def _take(self, tokens: int) -> None:
        """Count tokens: compiled code would write behind the end of a full cache."""
        if self._used + tokens > self.capacity:
            raise FxCompressError(
                f"{self._used + tokens} tokens do not fit a cache of {self.capacity}.",
                fix="ask for a session of the whole length.",
            )
        self._used += tokens

    def _named(self, **more: Tensor) -> dict[str, Tensor]:
        """The session's own tensors by role, for what is kept."""
        found = {"token": self.token, "logits": self.logits, **self._extra, **more}
        for number, layer in enumerate(self._cache.layers):
            tensors = {key: value for key, value in vars(layer).items() if isinstance(value, Tensor)}
            found.update({f"cache.{number}.{key}": value for key, value in tensors.items()})
        return found

    def _find(self, kind: str, named: dict[str, Tensor], tokens: int) -> tuple[Kept, tuple[Any, ...]] | None:
        """A kept call and its arguments, if there is one that serves this call."""
        if kind not in self._kept:
            self._kept[kind] = self._keeper.find(kind, self._module, named)
        kept = self._kept[kind]
        arguments = None if kept is None else kept.arguments(named, tokens)
        return None if kept is None or arguments is None else (kept, arguments)

    def _read(self, ids: Tensor, given: dict[str, Tensor]) -> Tensor:
        """Logits ``[B, T or 1, V]`` of a prompt."""
        fresh = {"positions": given["position_ids"]} if given else {}
        named = self._named(ids=ids, **fresh)
        kind = "prompt" if ids.shape[1] > 1 else "token"  # which Dynamo compiles apart
        found = self._find(kind, named, ids.shape[1])
        if found is not None:
            kept, arguments = found
            self._proven = True
            logits: Tensor = kept.executable(*arguments)[kept.result]
            return logits
        with self._keeper.watch() as calls:
            logits = self._trace(ids, given).logits
        self._keep(kind, named, calls, logits)
        return logits

    def _keep(
        self, kind: str, named: dict[str, Tensor], calls: Sequence[Any], result: Tensor | None = None
    ) -> None:
        """Keep the first call of a kind that no kept one served."""
        if self._kept.get(kind) is None and kind not in self._asked:
            self._asked.add(kind)
            self._keeper.keep(kind, self._module, named, calls, result)

    def _trace(self, ids: Tensor, given: dict[str, Tensor]) -> Any:
        """The prompt's output; the first time, whether this model can be served shows."""
        before = _python_state(self._cache)
        try:
            with torch.no_grad():
                output = self._module(
                    input_ids=ids, past_key_values=self._cache, use_cache=True, **given, **self._options
                )
        except torch._dynamo.exc.TorchDynamoException as error:
            if self._proven:
                raise
            reason = str(error).strip().splitlines()[0]
            raise NotCoveredError(f"its prompt cannot be read into a static cache ({reason})") from error
        if _python_state(self._cache) != before:
            raise NotCoveredError("its cache counts tokens outside of tensors.")
        self._proven = True
        return output

    def step(self, token: Tensor | None = None) -> Tensor:
        """Logits ``[B, V]`` after ``token`` ``[B]`` (default: the greedy one); the same tensor every time.

        Raises:
            FxCompressError: the cache is full.
        """
        self._take(1)
        if token is not None:
            self.token.copy_(token.view(-1, 1))
        with torch.no_grad():
            if self._replay is not None:
                self._replay()
            else:
                self._first_step()
        return self.logits

    def _first_step(self) -> None:
        """A step with all its checks; those that follow replay it."""
        named = self._named()
        found = self._find("step", named, 1)
        if found is not None:
            kept, arguments = found
            self._replay = on_device(kept.executable.replay(arguments), self._device)
            self._replay()
            return
        with self._keeper.watch() as calls:
            self._step(self._module, self._cache, self.token, self.logits, self._extra, self._options)
        replay = self._recorder.replay()
        self._replay = None if replay is None else on_device(replay, self._device)
        self._keep("step", named, calls)


def _step(
    module: nn.Module,
    cache: Any,
    token: Tensor,
    logits: Tensor,
    extra: dict[str, Tensor],
    options: dict[str, int],
) -> None:
    """One token per sequence; results go where the inputs came from."""
    output = module.forward(input_ids=token, past_key_values=cache, use_cache=True, **extra, **options)
    last = output.logits[:, -1].float()
    logits.copy_(last)
    token.copy_(last.argmax(-1, keepdim=True))
    if "position_ids" in extra:
        extra["position_ids"].add_(1)


def _python_state(cache: Any) -> list[dict[str, object]]:
    """Attributes of a cache's layers that are no tensors, and which tensors it holds."""
    return [
        {key: id(value) if isinstance(value, Tensor) else value for key, value in vars(layer).items()}
        for layer in cache.layers
    ]
