"""Attention equals ATen's, whatever the grouping, the mask and the dtype: as kernel and as two products."""

from __future__ import annotations

import itertools
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from fxcompress.backends.cpu import attention
from fxcompress.backends.cpu.generator import DTYPES, AttentionForm
from fxcompress.backends.cpu.isa import ISAS, PORTABLE, Isa, best_isa, processor_flags
from fxcompress.backends.cpu.native import ensure_kernel, python_attend
from fxcompress.compat import trace_pre_dispatch

BEST = best_isa(processor_flags())
RUNNABLE = [isa for isa in ISAS.values() if isa.needs <= processor_flags()]
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
MASKS = ("none", "causal", "bool", "float", "per head", "per key", "leading keys", "strided")


def number(isa: Isa, dtype: torch.dtype) -> int:
    form = AttentionForm(DTYPES[dtype])
    assert ensure_kernel(form, isa) is None
    return form.number(isa)


def masked(kind: str, batch: int, heads: int, queries: int, keys: int) -> Tensor | None:
    return {
        "none": None,
        "causal": None,
        "bool": torch.rand(batch, 1, queries, keys) > 0.4,  # may hide everything from a row
        "float": torch.randn(1, 1, queries, keys),
        "per head": torch.randn(batch, heads, queries, keys),
        "per key": torch.rand(batch, 1, 1, keys) > 0.3,
        "leading keys": torch.ones(1, 1, queries, keys, dtype=torch.bool).tril(keys - queries),
        "strided": torch.randn(1, 1, keys, queries).transpose(2, 3),
    }[kind]


def check(isa: Isa, dtype: torch.dtype, sizes: tuple[int, ...], kind: str, scale: float = 0.2) -> None:
    batch, kv_heads, groups, queries, keys, width, value_width = sizes
    heads = kv_heads * groups
    q = torch.randn(batch, queries, heads, width).to(dtype).transpose(1, 2)  # as a projection's view lies
    k = torch.randn(batch, kv_heads, keys, width).to(dtype)
    v = torch.randn(batch, keys, kv_heads, value_width).to(dtype).transpose(1, 2)
    mask = masked(kind, batch, heads, queries, keys)
    form = number(isa, dtype)
    found = torch.ops.fxcompress_cpu.attend(q, k, v, mask, kind == "causal", scale, form)
    assert torch.equal(found, python_attend(q, k, v, mask, kind == "causal", scale, form))
    assert found.dtype == dtype
    expected = F.scaled_dot_product_attention(
        q.double(),
        k.double().repeat_interleave(groups, 1),
        v.double().repeat_interleave(groups, 1),
        attn_mask=mask.double() if mask is not None and mask.is_floating_point() else mask,
        is_causal=kind == "causal",
        scale=scale,
    )
    torch.testing.assert_close(found.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_equals_aten(dtype: torch.dtype) -> None:
    @settings(max_examples=60, deadline=None)
    @given(
        sizes=st.tuples(
            st.integers(1, 2),
            st.integers(1, 3),
            st.integers(1, 4),
            st.sampled_from([1, 2, 3, 9, 13, 40]),
            st.sampled_from([1, 5, 31, 32, 33, 129, 300]),
            st.sampled_from([1, 7, 16, 20, 64]),
            st.sampled_from([1, 7, 16, 33, 64]),
        ),
        kind=st.sampled_from(MASKS),
        seed=st.integers(0, 9),
    )
    def run(sizes: tuple[int, ...], kind: str, seed: int) -> None:
        torch.manual_seed(seed)
        check(BEST, dtype, sizes, kind)

    run()


@pytest.mark.parametrize("isa", [isa for isa in RUNNABLE if isa is not BEST], ids=lambda isa: isa.name)
def test_other_instruction_sets(isa: Isa) -> None:
    for kind, queries in itertools.product(MASKS, (1, 30)):
        check(isa, torch.float32, (2, 2, 3, queries, 140, 20, 40), kind)
    if isa is PORTABLE:
        check(isa, torch.bfloat16, (1, 1, 2, 12, 33, 8, 8), "bool")


def test_faults_stay_visible_and_masked_rows_are_zero() -> None:
    form = number(BEST, torch.float32)
    for queries in (1, 20):
        q, k, v = torch.randn(1, 1, queries, 16), torch.randn(1, 1, 40, 16), torch.randn(1, 1, 40, 16)
        hidden = torch.zeros(1, 1, queries, 40, dtype=torch.bool)
        assert not torch.ops.fxcompress_cpu.attend(q, k, v, hidden, False, 1.0, form).any()
        q[0, 0, 0, 3] = torch.nan
        found = torch.ops.fxcompress_cpu.attend(q, k, v, None, False, 1.0, form)
        assert found[0, 0, 0].isnan().all()
        assert not found[0, 0, 1:].isnan().any()
        large = torch.ops.fxcompress_cpu.attend(q.nan_to_num() * 1e4, k, v, None, False, 1.0, form)
        assert large.isfinite().all()


def test_any_thread_count_gives_the_same_bits() -> None:
    form = number(BEST, torch.float32)
    threads = torch.get_num_threads()
    try:
        for queries in (1, 100):
            q, k, v = torch.randn(2, 6, queries, 64), torch.randn(2, 2, 700, 64), torch.randn(2, 2, 700, 64)
            results = []
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                results.append(torch.ops.fxcompress_cpu.attend(q, k, v, None, False, 0.1, form))
            assert all(torch.equal(result, results[0]) for result in results)
    finally:
        torch.set_num_threads(threads)


def test_the_operator_keeps_torchs_rules() -> None:
    form = number(BEST, torch.float32)
    q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 6)
    mask = torch.rand(2, 1, 3, 5) > 0.3
    torch.library.opcheck(torch.ops.fxcompress_cpu.attend.default, (q, k, v, mask, False, 0.3, form))


def traced(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, groups: int, **options: Any
) -> fx.GraphModule:
    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        def repeat(x: Tensor) -> Tensor:
            batch, heads, length, width = x.shape
            x = x[:, :, None].expand(batch, heads, groups, length, width)
            return x.reshape(batch, heads * groups, length, width)

        return F.scaled_dot_product_attention(q, repeat(k), repeat(v), attn_mask=mask, **options)

    mode = FakeTensorMode()
    fakes = [None if tensor is None else mode.from_tensor(tensor) for tensor in (q, k, v, mask)]
    return trace_pre_dispatch(call, fakes, mode)


class Lowered(fx.Interpreter):
    """Runs attentions as the backend does; every value is kept, as there."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.used = 0

    def run_node(self, n: fx.Node) -> Any:
        found = attention.lower(n, lambda a: fx.node.map_arg(a, lambda node: self.env[node]), BEST)
        if found is None:
            return super().run_node(n)
        self.used += 1
        return found


@pytest.fixture(params=[True, False], ids=["compiler", "no compiler"])
def compiler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if not request.param:
        monkeypatch.setattr(attention, "ensure_kernel", lambda form, isa: "none")
    return bool(request.param)


@pytest.mark.parametrize("kind", ["none", "bool", "float", "per head"])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_the_graph_is_lowered(kind: str, scale: float | None, compiler: bool) -> None:
    for groups, queries in itertools.product((1, 3), (1, 4)):
        q, k, v = torch.randn(2, 2 * groups, queries, 7), *torch.randn(2, 2, 2, 9, 7)
        mask = masked(kind, 2, 2 * groups, queries, 9)
        module = traced(q, k, v, mask, groups, scale=scale)
        lowered = Lowered(module)
        torch.testing.assert_close(lowered.run(q, k, v, mask), module(q, k, v, mask), rtol=1e-5, atol=1e-6)
        assert lowered.used == (1 if compiler or queries == 1 else 0)


def test_keys_are_read_before_they_are_repeated() -> None:
    q, k, v = torch.randn(1, 6, 1, 4), torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4)
    module = traced(q, k, v, None, 3)
    (node,) = (n for n in module.graph.nodes if "scaled_dot_product" in str(n.target))
    names = [attention.before_repeating(argument).name for argument in node.args[1:3]]
    assert names == ["k_1", "v_1"]


def test_what_stays_with_aten() -> None:
    q, k, v = torch.randn(3, 1, 2, 3, 4)
    for options, dtype, used in (
        ({"is_causal": True}, torch.float32, 1),
        ({"dropout_p": 0.5}, torch.float32, 0),
        ({}, torch.float64, 0),
    ):
        operands = (q.to(dtype), k.to(dtype), v.to(dtype))
        lowered = Lowered(traced(*operands, None, 1, **options))
        lowered.run(*operands, None)
        assert lowered.used == used
    for queries in (torch.randn(2, 2, 3, 4), torch.randn(1, 1, 3, 4)):  # more batches, fewer heads: broadcast
        module = traced(queries, k, v, None, 1)
        lowered = Lowered(module)
        torch.testing.assert_close(lowered.run(queries, k, v, None), module(queries, k, v, None))
        assert lowered.used == 0
