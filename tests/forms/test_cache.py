"""Stores of keys and values: known answers, bounds, and contents that do not depend on the steps taken."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxcompress.cache_record import CacheRecord, from_text, to_text
from fxcompress.errors import FormatError, FxCompressError
from fxcompress.forms import (
    CacheForm,
    CacheStore,
    ChannelAffine,
    CodebookStore,
    ExactStore,
    FloatStore,
    HeadRotation,
    IntStore,
    PositionRotation,
)
from fxcompress.forms.cache_stores import pack_planes, unpack_planes

HEADS, WIDTH = 3, 16
CPU = torch.device("cpu")


def rotary(width: int = WIDTH) -> PositionRotation:
    half = width // 2
    partner = torch.arange(width).view(2, half).flip(0).reshape(-1)
    frequency = 0.7 ** torch.arange(half, dtype=torch.float64)
    return PositionRotation(partner, torch.cat([frequency, -frequency]))


def codebook(bits: int) -> Tensor:
    return torch.linspace(-1, 1, 1 << bits)


def per_channel(value: float) -> Tensor:
    return torch.full((HEADS, WIDTH), value)


STORES: dict[str, CacheStore] = {
    "exact": ExactStore(),
    "int4-channel": IntStore(4, "channel", 4, residual=8),
    "int2-channel-no-window": IntStore(2, "channel", 8),
    "int4-token": IntStore(4, "token", 8, residual=5),
    "int3-token-sinks": IntStore(3, "token", 0, residual=3, sinks=2),
    "int8-nothing-exact": IntStore(8),
    "rotated": IntStore(4, transforms=(HeadRotation(),)),
    "smoothed": IntStore(4, transforms=(ChannelAffine(per_channel(0.5), per_channel(2.0)),)),
    "fp8": FloatStore(residual=2),
    "codebook": CodebookStore(codebook(3), outliers=2, sinks=1),
    "pre-rotary": CodebookStore(
        codebook(2), per_channel(0.0), per_channel(3.0), 1, residual=4, transforms=(rotary(),)
    ),
}


def record(store: CacheStore, capacity: int = 96, dtype: torch.dtype = torch.float32) -> CacheRecord:
    text, tensors = to_text(CacheForm(store, store, HEADS, WIDTH, WIDTH))
    return CacheRecord(from_text(text, tensors), capacity, dtype)


def filled(layout: CacheRecord, key: Tensor, value: Tensor, ends: list[int]) -> Tensor:
    memory = layout.allocate(key.shape[0], CPU)
    for first, last in pairwise([0, *ends]):
        layout.append(memory, first, key[:, :, first:last], value[:, :, first:last])
    return memory


def tokens(count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    key, value = (torch.randn(2, HEADS, count, WIDTH, generator=generator).to(dtype) for _ in "kv")
    return key, value


@pytest.mark.parametrize("name", STORES)
@settings(max_examples=8, deadline=None)
@given(cuts=st.lists(st.integers(0, 70), max_size=6), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_contents_do_not_depend_on_the_steps(name: str, cuts: list[int], dtype: torch.dtype) -> None:
    layout = record(STORES[name], dtype=dtype)
    key, value = tokens(70, dtype)
    whole = filled(layout, key, value, [70])
    parts = filled(layout, key, value, [*sorted(cuts), 70])
    for one, other in zip(layout.read(whole, 70), layout.read(parts, 70), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", STORES)
def test_cropping_and_going_on_keeps_what_was_read(name: str) -> None:
    layout = record(STORES[name])
    key, value = tokens(70)
    memory = filled(layout, key, value, [64])
    before = layout.read(memory, 64)
    layout.crop(memory, 64, 51)
    for old, new in zip(before, layout.read(memory, 51), strict=True):
        torch.testing.assert_close(new, old[:, :, :51], atol=1e-6, rtol=0)
    layout.append(memory, 51, key[:, :, 51:70], value[:, :, 51:70])
    assert layout.read(memory, 70)[0].shape == (2, HEADS, 70, WIDTH)


@pytest.mark.parametrize("name", STORES)
def test_growing_keeps_the_content(name: str) -> None:
    layout = record(STORES[name])
    key, value = tokens(70)
    memory = filled(layout, key, value, [70])
    larger, grown = layout.grown(memory, 200)
    for old, new in zip(layout.read(memory, 70), larger.read(grown, 70), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("name", [name for name in STORES if name != "exact"])
def test_recent_and_first_tokens_are_exact(name: str) -> None:
    store = STORES[name]
    assert isinstance(store, IntStore | FloatStore | CodebookStore)
    layout = record(store)
    key, value = tokens(70)
    memory = filled(layout, key, value, [33, 70])
    read, _ = layout.read(memory, 70)
    done = store.sinks + store.quantized(70 - store.sinks)
    assert torch.equal(read[:, :, done:], key[:, :, done:])
    assert torch.equal(read[:, :, : store.sinks], key[:, :, : store.sinks])
    assert not torch.equal(read, key)


def test_keys_are_quantized_a_window_at_a_time_and_values_one_by_one() -> None:
    keys, values = IntStore(2, "channel", 32, residual=128), IntStore(2, "token", 32, residual=128)
    for length in (1, 127, 128, 300, 512):
        assert keys.quantized(length) == length - length % 128
        assert values.quantized(length) == max(0, length - 128)


def test_codes_are_packed_lowest_first() -> None:
    codes = torch.tensor([0, 1, 2, 3], dtype=torch.uint8)
    assert pack_planes(codes, 2).tolist() == [0xE4]
    wide = torch.arange(8, dtype=torch.uint8)
    assert pack_planes(wide, 4).tolist() == [0x40, 0x51, 0x62, 0x73]  # channels 0 and 4, 1 and 5, …


@given(bits=st.integers(2, 8), parts=st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_packing_is_undone(bits: int, parts: int) -> None:
    width = 8 * parts
    codes = torch.randint(0, 1 << bits, (3, width), dtype=torch.uint8)
    assert torch.equal(unpack_planes(pack_planes(codes, bits), bits, width), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("axis", ["channel", "token"])
def test_errors_are_half_a_step(bits: int, axis: str) -> None:
    store = IntStore(bits, axis, 8)
    x = torch.randn(1, HEADS, 32, WIDTH)
    parts = store.encode(x)
    dim = 2 if axis == "channel" else 3
    step = parts["scale"].float().repeat_interleave(8, dim)
    assert bool(((store.decode(parts, WIDTH) - x).abs() <= step * 0.5 + 2e-3).all())


def test_constant_groups_and_dead_channels_are_kept() -> None:
    x = torch.zeros(1, HEADS, 8, WIDTH)
    x[..., 3] = 2.5
    for store in (IntStore(2, "channel", 8), IntStore(4, "token", 1), FloatStore()):
        torch.testing.assert_close(store.decode(store.encode(x), WIDTH), x)


def test_one_bad_token_stays_with_its_group() -> None:
    x = torch.randn(1, HEADS, 8, WIDTH)
    x[0, 0, 3] = math.nan
    store = IntStore(4, "token", 0)
    read = store.decode(store.encode(x), WIDTH)
    assert bool(torch.isfinite(read[:, :, [0, 1, 2, 4, 5, 6, 7]]).all())


def test_channels_beat_tokens_where_a_channel_is_large() -> None:
    x = torch.randn(2, HEADS, 64, WIDTH)
    x[..., 5] *= 20
    errors = {}
    for axis in ("channel", "token"):
        store = IntStore(3, axis, 16)
        wrong = store.decode(store.encode(x), WIDTH) - x
        errors[axis] = float(wrong[..., torch.arange(WIDTH) != 5].norm())  # what its neighbours suffer
    assert errors["channel"] < errors["token"] / 3


def test_every_value_an_outlier_is_exact_to_half_precision() -> None:
    store = CodebookStore(codebook(2), per_channel(0.0), per_channel(1.0), WIDTH)
    x = torch.randn(1, HEADS, 5, WIDTH)
    torch.testing.assert_close(store.decode(store.encode(x), WIDTH), x.half().float(), atol=0, rtol=0)


def test_a_rotation_is_taken_off_and_put_back() -> None:
    x = torch.randn(1, HEADS, 9, WIDTH)
    positions = torch.arange(100, 109)
    transform = rotary()
    torch.testing.assert_close(transform.undo(transform.apply(x, positions), positions), x)
    one = torch.zeros(1, 1, 1, WIDTH)
    one[..., 0] = 1
    turned = transform.undo(one, torch.tensor([2]))
    assert turned[..., 0].item() == pytest.approx(math.cos(2.0))
    assert turned[..., WIDTH // 2].item() == pytest.approx(math.sin(2.0))
    hadamard = HeadRotation()
    eight = torch.zeros(1, 1, 1, 4)
    eight[..., 0] = 8
    assert hadamard.apply(eight, positions).flatten().tolist() == [4, 4, 4, 4]
    odd = torch.randn(1, 1, 2, 12)
    torch.testing.assert_close(hadamard.undo(hadamard.apply(odd, positions), positions), odd)


def test_bytes_are_few() -> None:
    """Of 8192 tokens in float16, all overheads and a float32 window counted."""
    half = 2 * 8192 * 64 * 2
    for bits, size, share in ((4, 64, 0.30), (2, 32, 0.20)):
        key, value = (IntStore(bits, axis, size, residual=size) for axis in ("channel", "token"))
        assert CacheRecord(CacheForm(key, value, 3, 64, 64), 8192, torch.float32).nbytes <= share * half


@pytest.mark.parametrize(
    ("store", "words"),
    [
        (IntStore(3), "do not fill whole bytes"),
        (IntStore(4, "token", 7), "does not divide 20 channels"),
        (IntStore(4, transforms=(rotary(16),)), "for 16 channels, heads have 20"),
        (IntStore(4, transforms=(ChannelAffine(torch.zeros(3, 16), torch.ones(3, 16)),)), "heads have 20"),
        (IntStore(4, transforms=(ChannelAffine(torch.zeros(2, 20), torch.ones(2, 20)),)), "for 2 heads"),
        (CodebookStore(codebook(2), outliers=21), "outliers=21"),
    ],
)
def test_heads_that_do_not_fit_are_refused(store: CacheStore, words: str) -> None:
    with pytest.raises(FormatError, match=words):
        CacheForm(store, store, 3, 20, 20)


def test_bad_options_are_refused() -> None:
    with pytest.raises(FormatError, match="residual=48 is no multiple of group_size=32"):
        IntStore(4, "channel", 32, residual=48)
    for wrong in ({"bits": 1}, {"bits": 9}, {"axis": "head"}, {"group_size": -1}, {"residual": -1}):
        with pytest.raises(FormatError, match=next(iter(wrong))):
            IntStore(**{"bits": 4, **wrong})  # type: ignore[arg-type]
    with pytest.raises(FormatError, match="opposite"):
        PositionRotation(torch.tensor([1, 0]), torch.tensor([1.0, 1.0], dtype=torch.float64))
    with pytest.raises(FormatError, match="codebook"):
        CodebookStore(torch.zeros(5))


def test_a_full_cache_and_another_batch_are_refused() -> None:
    layout = record(STORES["int4-token"], capacity=8)
    key, value = tokens(9)
    memory = layout.allocate(2, CPU)
    with pytest.raises(FxCompressError, match="9 tokens do not fit a cache of 8"):
        layout.append(memory, 0, key, value)
    with pytest.raises(FxCompressError, match="holds 2 sequences"):
        layout.append(memory, 0, key[:1, :, :2], value[:1, :, :2])
