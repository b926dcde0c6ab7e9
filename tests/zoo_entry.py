"""What one zoo entry is: how to build a small model, call it, and what export makes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

SEED = 20240

InputMaker = Callable[[int, int], dict[str, Tensor]]
ModelBuilder = Callable[[], nn.Module]


@contextmanager
def seeded(seed: int = SEED) -> Iterator[None]:
    """Run a block under a fixed CPU seed and put the caller's random state back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def enliven(model: nn.Module) -> None:
    """Add noise to every parameter, so that no norm is all ones and no bias all zeros.

    Freshly initialised networks hide mistakes: a fold into a norm whose weight is 1, or a bias that
    is lost when it is 0, leaves the output as it was. Matrices get N(0, 0.1), vectors N(0, 0.05).
    Batch norms get running means N(0, 0.2) and variances U(0.5, 1.5) for the same reason. Other
    buffers, such as rotary frequencies, keep their values.
    """
    for parameter in model.parameters():
        spread = 0.1 if parameter.ndim >= 2 else 0.05
        parameter.add_(torch.randn_like(parameter), alpha=spread)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            assert module.running_var is not None
            module.running_mean.normal_(0.0, 0.2)
            module.running_var.uniform_(0.5, 1.5)


@dataclass(frozen=True)
class ZooEntry:
    """One small model of the zoo.

    Attributes:
        name: Unique key, lower case with dashes.
        builder: Makes the module; called under a fixed seed by `build`.
        tags: What the model exercises, for `select`.
        maker: `(batch, seq)` -> tensors by keyword. For images and volumes `seq` is ignored or is a side
            length, as the entry's own maker says.
        generates: Whether the class has a working `generate`.
        options: Non-tensor keywords of the call, such as `use_cache=False`.
        dynamic_dims: Keyword -> the dimensions left to `Dim.AUTO` in export; keywords that are not
            named are static.
        export_note: Limitation of `torch.export` that was met, empty when there is none.
    """

    name: str
    builder: ModelBuilder
    tags: frozenset[str]
    maker: InputMaker
    generates: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    dynamic_dims: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    export_note: str = ""

    def build(self, seed: int = SEED) -> nn.Module:
        """Return a fresh model: same seed, same weights; eval mode, fp32, no gradients recorded yet."""
        with seeded(seed):
            model = self.builder()
            enliven(model)
        return model.eval()

    def tensors(self, batch: int = 2, seq: int = 8, seed: int = SEED + 1) -> dict[str, Tensor]:
        """Return the tensor keywords of one call."""
        with seeded(seed):
            return self.maker(batch, seq)

    def inputs(self, batch: int = 2, seq: int = 8, seed: int = SEED + 1) -> dict[str, Any]:
        """Return all keywords of one call: `tensors` and `options`."""
        return {**self.tensors(batch, seq, seed), **self.options}

    def dynamic_shapes(self) -> dict[str, Any]:
        """Return `dynamic_shapes` for `torch.export.export(model, (), inputs, dynamic_shapes=…)`."""
        auto = torch.export.Dim.AUTO
        shapes: dict[str, Any] = {
            key: dict.fromkeys(self.dynamic_dims.get(key, ()), auto) for key in self.tensors()
        }
        return shapes | dict.fromkeys(self.options)

    def export(self, batch: int = 2, seq: int = 8) -> torch.export.ExportedProgram:
        """Export a fresh build non-strictly, its dynamic dimensions left to `Dim.AUTO`."""
        return torch.export.export(
            self.build(), (), self.inputs(batch, seq), dynamic_shapes=self.dynamic_shapes(), strict=False
        )


@torch.no_grad()
def generate_tokens(model: nn.Module, inputs: Mapping[str, Tensor], count: int = 4) -> Tensor:
    """Greedily generate exactly `count` tokens; returns the new ones as int64 `[batch, count]`.

    Encoder-decoders answer without the prompt, decoders with it; both give only new tokens here.
    """
    generate: Callable[..., Tensor] = model.generate  # type: ignore[assignment]
    ids = inputs["input_ids"]
    settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "num_beams": 1}
    mask = inputs.get("attention_mask", torch.ones_like(ids))
    return generate(input_ids=ids, attention_mask=mask, **settings)[:, -count:]


def scores(output: object) -> Tensor:
    """Return the main tensor of a model's output: logits, else last hidden state, else the first tensor.

    Raises:
        TypeError: when the output holds no tensor.
    """
    if isinstance(output, Tensor):
        return output
    for key in ("logits", "logits_per_image", "last_hidden_state"):
        found = getattr(output, key, None)
        if isinstance(found, Tensor):
            return found
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            return leaf
    raise TypeError(f"the output of type {type(output).__name__} holds no tensor")
