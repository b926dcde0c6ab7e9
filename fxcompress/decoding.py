"""Text generation in a thin loop: the decoding step is compiled once, then replayed on the same memory.

A step reads and writes tensors that stay where they are: the last token, a cache of fixed capacity, the
logits. So after one step through Dynamo, whose guards check all that could have changed, the others call the
compiled graph directly; what a step computes (the greedy token included) lies in that graph. Everything else
about ``generate`` (configuration, logits processors, stopping criteria) is transformers' own.

What the loop does not cover runs in transformers' loop: beams, assistants, encoder-decoders, caches given by
the caller, models whose cache counts tokens in Python. A quantized cache is used by both.
"""

from __future__ import annotations

import copy
import functools
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fxcompress.compat import compile_function
from fxcompress.decoding_cache import CacheShapes, NotCoveredError
from fxcompress.errors import FxCompressError
from fxcompress.evaluate import parameter_names
from fxcompress.generation_cache import CacheMaker, capacity_for, fixed_cache

__all__ = ["DecodeSession", "Generator", "NotCoveredError"]

logger = logging.getLogger("fxcompress.decoding")

_MAX_SESSIONS = 4
_OWN_ARGUMENTS = frozenset(
    {
        *("inputs", "input_ids", "attention_mask", "streamer"),
        *("generation_config", "logits_processor", "stopping_criteria"),
    }
)
"""Arguments of ``generate`` the loop understands, besides the fields of a generation configuration."""


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
        device = next(module.parameters()).device
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
        torch._dynamo.maybe_mark_dynamic(ids, 1)
        output = self._read(ids, given)
        logits = output.logits[:, -1].float()
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

    def _read(self, ids: Tensor, given: dict[str, Tensor]) -> Any:
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
                self._step(self._module, self._cache, self.token, self.logits, self._extra, self._options)
                self._replay = self._recorder.replay()
        return self.logits


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


class Generator:
    """``generate`` of a compressed model.

    Args:
        module: The module, compiled in place.
        backend: Compiles the decoding step.
        prepare: Called with the module before it is.
        caches: Makes quantized caches; None, or without forms, leaves caches as they are.
        shapes: ``(heads, size)`` of every layer's keys, where the configuration does not tell them.
    """

    def __init__(
        self,
        module: Any,
        backend: Backend,
        prepare: Callable[[nn.Module], None],
        caches: CacheMaker | None = None,
        shapes: CacheShapes = (),
    ) -> None:
        self._shapes = shapes
        self._module, self._backend, self._prepare = module, backend, prepare
        self._caches = caches if caches is not None and caches.layers else None
        self._sessions: OrderedDict[tuple[int, int, bool], DecodeSession] = OrderedDict()
        self._refusal = _refusal(module, packed=self._caches is not None)
        self._busy = threading.Lock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Transformers' ``generate``, with its decoding loop replaced where ours covers what is asked for."""
        self._prepare(self._module)
        why = self._refusal or _unsupported(self._module, args, kwargs)
        if why is None and not self._busy.acquire(blocking=False):
            why = "another thread is generating with it"
        elif why is None:
            try:
                # Of its own arguments, transformers does not pass the streamer on to a loop of the caller.
                loop = functools.partial(self._loop, kwargs.get("streamer"))
                return self._module.generate(*args, custom_generate=loop, **kwargs)
            except NotCoveredError as error:
                why = str(error)
                self._refusal = None if error.this_call else why
            finally:
                self._busy.release()
        logger.info("%s: transformers' generation loop is used: %s", type(self._module).__name__, why)
        cache = None if self._caches is None else self._caches.for_generate(args, kwargs)
        if cache is not None:
            kwargs = {**kwargs, "past_key_values": cache}
        return self._module.generate(*args, **kwargs)

    def session(self, batch: int, length: int, *, padded: bool = False) -> DecodeSession:
        """Memory for ``batch`` sequences of up to ``length`` tokens; kept for the next call of that size.

        Raises:
            NotCoveredError: the model cannot be decoded this way.
        """
        if self._refusal is not None:
            raise NotCoveredError(self._refusal)
        limit = getattr(self._module.config, "max_position_embeddings", None)
        capacity = capacity_for(length, limit if isinstance(limit, int) else None)
        key = (batch, capacity, padded)
        if key not in self._sessions:
            while len(self._sessions) >= _MAX_SESSIONS:
                self._sessions.popitem(last=False)
            self._sessions[key] = DecodeSession(
                *(self._module, self._backend, batch, capacity, padded, self._caches, self._shapes)
            )
        self._sessions.move_to_end(key)
        return self._sessions[key]

    def _loop(
        self,
        streamer: Any,
        module: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Tensor:
        """What transformers calls in the place of its own loop."""
        batch, start = input_ids.shape
        mask = model_kwargs.get("attention_mask")
        padded = mask is not None and not bool(mask.all())
        longest = int(stopping_criteria.max_length or generation_config.max_length)
        session = self.session(batch, max(longest, start + 1), padded=padded)
        ends = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        pad = generation_config._pad_token_tensor
        greedy = not generation_config.do_sample and not logits_processor
        ids = input_ids.new_empty(batch, longest + 1)
        ids[:, :start] = input_ids
        running = torch.ones(batch, dtype=torch.long, device=input_ids.device)
        session.prefill(input_ids, mask if padded else None)
        for length in range(start, longest + 1):
            if greedy:
                token = session.token[:, 0].clone()
            else:
                token = _choose(ids[:, :length], session.logits, logits_processor, generation_config)
            if ends:
                token = token * running + pad * (1 - running)
            ids[:, length] = token
            if streamer is not None:
                streamer.put(token.cpu())
            so_far = ids[:, : length + 1]
            running &= ~stopping_criteria(so_far, None)
            if not bool(running.any()):
                break
            session.step(None if greedy and batch == 1 else token)
        if streamer is not None:
            streamer.end()
        return so_far.clone()


def _choose(ids: Tensor, logits: Tensor, processors: Any, config: Any) -> Tensor:
    """The next token ``[B]`` as transformers' loop chooses it, with the same use of the random generator."""
    scores = processors(ids, logits.clone())
    if not config.do_sample:
        return torch.argmax(scores, dim=-1)
    return torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)


def _refusal(module: Any, *, packed: bool) -> str | None:
    """Why no call of this model is covered, or None."""
    config = getattr(module, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False):
        return "it is no decoder alone"
    if not getattr(module, "_can_compile_fullgraph", False):
        return "transformers says that it cannot run with a cache of fixed size"
    missing = {"input_ids", "past_key_values", "use_cache"} - set(parameter_names(module))
    if missing:
        return f"its forward has no {', '.join(sorted(missing))}"
    if packed:
        return None  # nothing but tensors counts tokens there
    from transformers import StaticCache

    layers: Any = StaticCache(config=config, max_cache_len=2).layers  # allocates on first use only
    if any(getattr(layer, "is_sliding", True) for layer in layers):
        return "its cache has sliding windows or other layers that count tokens in Python"
    return None


def _unsupported(module: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> str | None:
    """Why this call is not covered, or None."""
    config = copy.deepcopy(kwargs.get("generation_config") or module.generation_config)
    rest = config.update(**{key: value for key, value in kwargs.items() if key not in _OWN_ARGUMENTS})
    if len(args) > 1 or rest:
        return f"arguments {', '.join(sorted(rest)) or 'by position'}"
    mode = str(getattr(config.get_generation_mode(), "value", ""))
    if mode not in ("greedy_search", "sample"):
        return f"generation mode {mode}"
    for name in ("return_dict_in_generate", "cache_implementation", "prefill_chunk_size"):
        if getattr(config, name, None):
            return f"{name}={getattr(config, name)}"
    if config.use_cache is False:
        return "use_cache=False"
    mask = kwargs.get("attention_mask")
    if mask is not None and (mask.dim() != 2 or "position_ids" not in parameter_names(module)):
        padded = mask.dim() != 2 or not bool(mask.all())
        return "padded prompts, and its forward takes no position_ids" if padded else None
    return None


def _python_state(cache: Any) -> list[dict[str, object]]:
    """Attributes of a cache's layers that are no tensors, and which tensors it holds."""
    return [
        {key: id(value) if isinstance(value, Tensor) else value for key, value in vars(layer).items()}
        for layer in cache.layers
    ]
