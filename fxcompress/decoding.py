"""Text generation in a thin loop: the decoding step is compiled once, then replayed on the same memory.

The steps are those of :mod:`fxcompress.decode_session`. Everything else about ``generate`` (configuration,
logits processors, stopping criteria) is transformers' own.

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
from typing import Any

import torch
from torch import Tensor, nn

from fxcompress.decode_session import Backend, DecodeSession
from fxcompress.decoding_cache import CacheShapes, NotCoveredError
from fxcompress.evaluate import parameter_names
from fxcompress.generation_cache import CacheMaker, capacity_for

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
