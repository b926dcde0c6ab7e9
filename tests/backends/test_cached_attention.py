"""The generated kernel that attends to a packed cache, against the operator that dequantizes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fxcompress
from fxcompress.backends.cpu import cached_attention, native
from fxcompress.backends.cpu.cached_form import CachedAttentionForm
from fxcompress.backends.cpu.generator import DTYPES
from fxcompress.backends.cpu.isa import PORTABLE
from fxcompress.backends.cpu.selection import this_machine
from fxcompress.cache_record import CacheRecord, to_text
from fxcompress.errors import FxCompressError
from fxcompress.forms import CacheForm, ExactStore, FloatStore, HeadRotation, IntStore
from tests.zoo import entry

CAPACITY = 300
STEPS = (5, 1, 1, 100, 1, 1, 70, 3, 33, 1)  # few and many queries, on empty and filled caches
TURNED = (HeadRotation(),)
CASES: dict[str, tuple[CacheForm, int, torch.dtype]] = {
    "kivi-4": (
        CacheForm(IntStore(4, "channel", 16, residual=32), IntStore(4, "token", 32, residual=32), 3, 64, 64),
        9,
        torch.float32,
    ),
    "rotated-2-8": (
        CacheForm(IntStore(2, transforms=TURNED), IntStore(8, transforms=TURNED), 2, 24, 40),
        2,
        torch.float32,
    ),
    "sinks-3-5-bfloat16": (
        CacheForm(
            IntStore(3, "channel", 8, sinks=3), IntStore(5, "token", 8, residual=5, sinks=2), 2, 16, 24
        ),
        6,
        torch.bfloat16,
    ),
}


def inputs(form: CacheForm, heads: int, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    query = torch.randn(2, heads, count, form.key_width, dtype=dtype)
    key = torch.randn(2, count, form.heads, form.key_width, dtype=dtype).transpose(1, 2)
    value = torch.randn(2, count, form.heads, form.value_width, dtype=dtype).transpose(1, 2)
    return query, key, value


@pytest.mark.parametrize("name", CASES)
def test_kernel_and_operator_agree(name: str) -> None:
    form, heads, dtype = CASES[name]
    isa = this_machine().isa
    kernel = CachedAttentionForm.of(form, DTYPES[dtype])
    assert kernel is not None
    assert native.ensure_kernel(kernel, isa) is None
    layout = CacheRecord(form, CAPACITY, dtype)
    text, constants = to_text(form)
    memories = [layout.allocate(2, torch.device("cpu")) for _ in range(3)]
    lengths = [torch.zeros((), dtype=torch.int64) for _ in range(3)]
    tolerance = 2e-6 if dtype == torch.float32 else 2e-2
    scale, done = form.key_width**-0.5, 0
    for count in STEPS:
        query, key, value = inputs(form, heads, count, dtype)
        mask = torch.arange(CAPACITY) <= torch.arange(count)[:, None] + done
        mask = mask.expand(2, 1, count, CAPACITY).clone()
        mask[0, :, :, 1:3] = False
        k, v = torch.ops.fxcompress.update_cache(
            memories[0], lengths[0], key, value, constants, text, CAPACITY, CAPACITY
        )
        groups = heads // form.heads
        wide = [x.repeat_interleave(groups, 1) for x in (k, v)]
        expected = F.scaled_dot_product_attention(query, *wide, mask, scale=scale)
        number = kernel.number(isa)
        found = torch.ops.fxcompress_cpu.attend_cached(
            query, key, value, mask, memories[1], lengths[1], CAPACITY, scale, number
        )
        python = cached_attention.python_attend_cached(
            query, key, value, mask, memories[2], lengths[2], CAPACITY, scale, number
        )
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
        assert torch.equal(found, python)
        done += count
        assert {int(length) for length in lengths} == {done}
    rotated = any(store.transforms for store in (form.key, form.value))  # type: ignore[attr-defined]
    if not rotated:  # a sum in another order may round a code differently
        assert torch.equal(memories[0], memories[1])
    assert torch.equal(memories[1], memories[2])
    many = inputs(form, heads, 100, dtype)
    with pytest.raises((FxCompressError, RuntimeError), match="do not fit a cache of 300"):
        torch.ops.fxcompress_cpu.attend_cached(
            *many, None, memories[1], lengths[1], CAPACITY, scale, kernel.number(isa)
        )
    one = [x[:1] for x in inputs(form, heads, 1, dtype)]
    with pytest.raises((FxCompressError, RuntimeError), match="another batch"):
        torch.ops.fxcompress_cpu.attend_cached(
            *one, None, memories[1], lengths[1], CAPACITY, scale, kernel.number(isa)
        )


def test_forms_without_a_kernel() -> None:
    plain = IntStore(4)
    for key in (ExactStore(), FloatStore(), IntStore(4, transforms=TURNED * 2)):
        assert CachedAttentionForm.of(CacheForm(key, plain, 2, 16, 16), "float32") is None


def test_sources_are_deterministic_and_numbers_differ() -> None:
    forms = [CachedAttentionForm.of(form, DTYPES[dtype]) for form, _, dtype in CASES.values()]
    numbers = set()
    for form in forms:
        assert form is not None
        assert form.render(PORTABLE) == form.render(PORTABLE)
        assert form.render(PORTABLE).startswith(f"// {form.title}")
        numbers.add(form.number(PORTABLE))
        assert form.number(PORTABLE) < 1 << 34
    assert len(numbers) == len(forms)


@pytest.mark.slow
def test_compiled_steps_use_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    fused: list[int] = []
    find = cached_attention.find_fused

    def watched(*args: Any) -> cached_attention.Fused:
        found = find(*args)
        updates = sum(n.target is torch.ops.fxcompress.update_cache.default for n in args[0].nodes)
        fused.append(updates - len(found.forms))
        return found

    monkeypatch.setattr(cached_attention, "find_fused", watched)
    recipe = [{"quantize-kv-cache": {"bits": 4, "key_axis": "channel", "group_size": 2, "residual": 4}}]
    small = fxcompress.compress(entry("phi3").build(), recipe, verify="off", progress=False)
    ids = entry("phi3").tensors(2, 12)["input_ids"]
    options = {"input_ids": ids, "max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    found = small.generate(**options)
    assert fused
    assert not any(fused)
    small.set_backend("eager")
    assert torch.equal(found, small.generate(**options))
