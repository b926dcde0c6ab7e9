"""The generated kernel that attends to a packed cache, against the operator that dequantizes it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fxcompress
from fxcompress.backends.cpu import cached_attention, native
from fxcompress.backends.cpu.cached_form import CachedAttentionForm
from fxcompress.backends.cpu.generator import DTYPES
from fxcompress.backends.cpu.isa import AVX2, NEON, PORTABLE, Isa, processor_flags
from fxcompress.backends.cpu.selection import this_machine
from fxcompress.cache_record import CacheRecord, to_text
from fxcompress.errors import FxCompressError
from fxcompress.forms import (
    CacheForm,
    ChannelAffine,
    CodebookStore,
    ExactStore,
    FloatStore,
    HeadRotation,
    IntStore,
    PositionRotation,
)
from tests.zoo import entry

CAPACITY = 300
STEPS = (5, 1, 1, 100, 1, 1, 70, 3, 33, 1)  # few and many queries, on empty and filled caches
TURNED = (HeadRotation(),)


def affine(heads: int, width: int) -> tuple[ChannelAffine]:
    """Channels of uneven range around uneven middles."""
    drawn = torch.Generator().manual_seed(width)
    shift = torch.randn(heads, width, generator=drawn)
    return (ChannelAffine(shift, torch.rand(heads, width, generator=drawn) + 0.5),)


def rotary(width: int, start: int, pairs: int, neighbours: bool) -> tuple[PositionRotation]:
    """Pairs of neighbouring channels, or of channels half of the rotated part apart."""
    partner, frequency = torch.arange(width), torch.zeros(width, dtype=torch.float64)
    for pair in range(pairs):
        one = start + (2 * pair if neighbours else pair)
        two = one + (1 if neighbours else pairs)
        partner[one], partner[two] = two, one
        frequency[one] = 1e4 ** (-pair / pairs)
        frequency[two] = -frequency[one]
    return (PositionRotation(partner, frequency),)


def book(bits: int, heads: int = 0, width: int = 0, **options: Any) -> CodebookStore:
    """An uneven codebook; with ``heads``, calibrated ranges that are too narrow for some values."""
    values = torch.linspace(-1, 1, 1 << bits).sin()
    if not heads:
        return CodebookStore(values, **options)
    drawn = torch.Generator().manual_seed(width)
    offset = torch.randn(heads, width, generator=drawn) / 4
    return CodebookStore(values, offset, torch.rand(heads, width, generator=drawn) + 1, **options)


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
    "fp8": (CacheForm(FloatStore(), FloatStore("e5m2", residual=5, sinks=2), 1, 64, 40), 5, torch.float32),
    "fp8-rotated-exact-bfloat16": (
        CacheForm(FloatStore("e5m2", transforms=TURNED), ExactStore(), 2, 24, 40),
        4,
        torch.bfloat16,
    ),
    "wkvquant-4": (
        CacheForm(
            IntStore(4, transforms=affine(1, 64)),
            IntStore(3, "token", 8, transforms=affine(1, 40)),
            1,
            64,
            40,
        ),
        12,  # query heads: many for one key head
        torch.float32,
    ),
    "kvquant-3": (
        CacheForm(
            book(3, 3, 64, outliers=1, sinks=1, transforms=rotary(64, 0, 32, neighbours=False)),
            book(3, outliers=1, sinks=1),
            *(3, 64, 384),
        ),
        9,
        torch.float32,
    ),
    "kvquant-2-5-bfloat16": (
        CacheForm(
            book(2, 2, 64, outliers=3, residual=4, transforms=rotary(64, 4, 22, neighbours=True)),
            book(5, 2, 40, sinks=3),
            *(2, 64, 40),
        ),
        6,
        torch.bfloat16,
    ),
}
MIXED = (
    CacheForm(
        book(4, 2, 32, sinks=2, outliers=1, transforms=rotary(32, 8, 12, neighbours=False)),
        FloatStore("e4m3", residual=3, transforms=affine(2, 24)),
        *(2, 32, 24),
    ),
    CacheForm(IntStore(6, transforms=affine(2, 32)), book(3, residual=2, outliers=1), 2, 32, 64),
)


def inputs(form: CacheForm, heads: int, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    query = torch.randn(2, heads, count, form.key_width, dtype=dtype)
    key = torch.randn(2, count, form.heads, form.key_width, dtype=dtype).transpose(1, 2)
    value = torch.randn(2, count, form.heads, form.value_width, dtype=dtype).transpose(1, 2)
    return query, key, value


@pytest.mark.parametrize("name", CASES)
def test_kernel_and_operator_agree(name: str) -> None:
    form, heads, dtype = CASES[name]
    check(form, heads, dtype, this_machine().isa)


@pytest.mark.parametrize("isa", [AVX2, PORTABLE], ids=lambda isa: isa.name)
@pytest.mark.parametrize("form", MIXED, ids=("book-float", "affine-book"))
def test_instruction_sets_agree(form: CacheForm, isa: Isa) -> None:
    if not isa.needs <= processor_flags():
        pytest.skip(f"this processor lacks {isa.name}")
    check(form, 4, torch.float32, isa)


def check(form: CacheForm, heads: int, dtype: torch.dtype, isa: Isa) -> None:
    """The kernel attends and appends as the operator does, called from C++ and from Python."""
    kernel = CachedAttentionForm.of(form, DTYPES[dtype])
    assert kernel is not None
    assert native.ensure_kernel(kernel, isa) is None
    layout = CacheRecord(form, CAPACITY, dtype)
    text, tensors = to_text(form)
    constants = [tensors[place] for place in cached_attention.places_of(kernel, text)]
    memories = [layout.allocate(2, torch.device("cpu")) for _ in range(3)]
    lengths = [torch.zeros((), dtype=torch.int64) for _ in range(3)]
    tolerance = 2e-6 if dtype == torch.float32 else 2e-2
    scale, done, number = form.key_width**-0.5, 0, kernel.number(isa)
    for count in STEPS:
        query, key, value = inputs(form, heads, count, dtype)
        mask = torch.arange(CAPACITY) <= torch.arange(count)[:, None] + done
        mask = mask.expand(2, 1, count, CAPACITY).clone()
        mask[0, :, :, 1:3] = False
        k, v = torch.ops.fxcompress.update_cache(
            memories[0], lengths[0], key, value, tensors, text, CAPACITY, CAPACITY
        )
        groups = heads // form.heads
        wide = [x.repeat_interleave(groups, 1) for x in (k, v)]
        expected = F.scaled_dot_product_attention(query, *wide, mask, scale=scale)
        found, python = (
            attend(query, key, value, mask, memory, length, constants, CAPACITY, scale, number)
            for attend, memory, length in zip(
                (torch.ops.fxcompress_cpu.attend_cached, cached_attention.python_attend_cached),
                memories[1:],
                lengths[1:],
                strict=True,
            )
        )
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
        assert torch.equal(found, python)
        done += count
        assert {int(length) for length in lengths} == {done}
    stores = (form.key, form.value)
    if not any(isinstance(part, HeadRotation) for store in stores for _, part in store.parts()):
        assert torch.equal(
            memories[0], memories[1]
        )  # else a sum in another order may round a code differently
    assert torch.equal(memories[1], memories[2])
    rest = (None, memories[1], lengths[1], constants, CAPACITY, scale, number)
    with pytest.raises((FxCompressError, RuntimeError), match="do not fit a cache of 300"):
        torch.ops.fxcompress_cpu.attend_cached(*inputs(form, heads, 100, dtype), *rest)
    with pytest.raises((FxCompressError, RuntimeError), match="another batch"):
        torch.ops.fxcompress_cpu.attend_cached(*(x[:1] for x in inputs(form, heads, 1, dtype)), *rest)


def test_forms_without_a_kernel() -> None:
    plain = IntStore(4)
    twice = CacheForm(IntStore(4, transforms=TURNED * 2), plain, 2, 16, 16)
    assert CachedAttentionForm.of(twice, "float32") is None
    turning = IntStore(4, transforms=rotary(16, 0, 8, neighbours=False))
    assert CachedAttentionForm.of(CacheForm(plain, turning, 2, 16, 16), "float32") is None
    assert CachedAttentionForm.of(CacheForm(turning, plain, 2, 16, 16), "float32") is not None


def test_special_values_of_eight_bit_floats() -> None:
    """NaN and infinity reach the codes' token alone; small and large values round as torch rounds them."""
    form = CacheForm(FloatStore("e4m3"), FloatStore("e5m2"), 1, 16, 16)
    kernel, isa = CachedAttentionForm.of(form, "float32"), this_machine().isa
    assert kernel is not None
    assert native.ensure_kernel(kernel, isa) is None
    layout, (text, tensors) = CacheRecord(form, 8, torch.float32), to_text(form)
    row = torch.tensor([448.0, 57344.0, 1e-3, -(2.0**-9), 0.0, -0.0, 1.5 * 2**-9, 463.9, 17.0, 1e30, 1e-30])
    x = torch.zeros(1, 1, 5, 16)
    x[0, 0, 0, :11], x[0, 0, 1, :9], x[0, 0, 4, :7] = row, row[:9] / 57344, row[:7]
    x[0, 0, 2, 3], x[0, 0, 3, 3] = math.nan, math.inf
    memories = [layout.allocate(1, torch.device("cpu")) for _ in range(2)]
    lengths = [torch.zeros((), dtype=torch.int64) for _ in range(2)]
    torch.ops.fxcompress.update_cache(memories[0], lengths[0], x, x, tensors, text, 8, 8)
    rest = (None, memories[1], lengths[1], [], 8, 1.0, kernel.number(isa))
    torch.ops.fxcompress_cpu.attend_cached(x, x, x, *rest)
    for one, two in zip(layout.read(memories[0], 5), layout.read(memories[1], 5), strict=True):
        torch.testing.assert_close(two, one, rtol=0, atol=0, equal_nan=True)


def test_sources_are_deterministic_and_numbers_differ() -> None:
    forms = [CachedAttentionForm.of(form, DTYPES[dtype]) for form, _, dtype in CASES.values()]
    numbers = set()
    for form in forms:
        assert form is not None
        assert form.render(PORTABLE) == form.render(PORTABLE)
        assert form.render(PORTABLE).startswith(f"// {form.title}")
        numbers.add(form.number(PORTABLE))
        assert form.number(PORTABLE) < 1 << 34
        assert ("f_table(values)" in form.render(NEON)) == ("book" in form.title)
    assert len(numbers) == len(forms)


RECIPES: dict[str, Any] = {
    "kivi": {"quantize-kv-cache": {"bits": 4, "key_axis": "channel", "group_size": 2, "residual": 4}},
    "kvquant": {"kvquant": {"bits": 4}},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_compiled_steps_use_the_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fused: list[int] = []
    find = cached_attention.find_fused

    def watched(*args: Any) -> cached_attention.Fused:
        found = find(*args)
        updates = sum(n.target is torch.ops.fxcompress.update_cache.default for n in args[0].nodes)
        fused.append(updates - len(found.forms))
        return found

    monkeypatch.setattr(cached_attention, "find_fused", watched)
    model, batches = entry("phi3").build(), [entry("phi3").inputs(2, 24, seed=seed) for seed in range(2)]
    small = fxcompress.compress(model, [RECIPES[name]], batches, verify="off", progress=False)
    ids = entry("phi3").tensors(2, 12)["input_ids"]
    options = {"input_ids": ids, "max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    found = small.generate(**options)
    assert fused
    assert not any(fused)
    small.set_backend("eager")
    assert torch.equal(found, small.generate(**options))


@pytest.mark.slow
def test_tables_of_several_sizes_compile_in_one_process() -> None:
    model, batches = entry("phi3").build(), [entry("phi3").inputs(2, 24, seed=seed) for seed in range(2)]
    ids = entry("phi3").tensors(2, 12)["input_ids"][:1]
    for bits in (4, 8):  # Dynamo takes sizes that change between models for dynamic ones
        small = fxcompress.compress(
            model, [{"kvquant": {"bits": bits}}], batches, verify="off", progress=False
        )
        session = small.generate.session(1, 40)
        assert session.prefill(ids).shape[0] == 1
        session.step()
