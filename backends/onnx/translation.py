"""The translation table: what each operator of a lowered graph is in ONNX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx.defs import OpSchema
from onnxscript import FLOAT, INT8, INT32, INT64, UINT8, values
from onnxscript.onnx_opset import opset21

from fxcompress.backends.onnx.operators import TINY, ops

__all__ = ["DOMAIN", "translation_table"]

onnx: Any = opset21  # its methods are typed for eager arrays

DOMAIN = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""

_FLOATS = ["tensor(float)", "tensor(float16)"]
_TYPES = {
    "T": _FLOATS,
    "B": ["tensor(uint8)"],
    "I": ["tensor(int64)", "tensor(int32)"],
    "M": ["tensor(int32)"],
    "S": ["tensor(int8)"],
}


def _runtime_operator(name: str, inputs: str, outputs: str, **attributes: str) -> values.Op:
    """An operator of ONNX Runtime, which the ``onnx`` package has no schema for.

    Args:
        name: Its name.
        inputs: ``"name:type"`` words with types of ``_TYPES``; a ``?`` after the type marks optional ones.
        outputs: The same for results.
        attributes: Name → ``"INT"``, ``"FLOAT"``, …; none is required.
    """

    def parameter(text: str) -> OpSchema.FormalParameter:
        label, _, kind = text.partition(":")
        options = OpSchema.FormalParameterOption
        option = options.Optional if kind.endswith("?") else options.Single
        return OpSchema.FormalParameter(label, kind.rstrip("?"), param_option=option)

    described = [parameter(text) for text in inputs.split()], [parameter(text) for text in outputs.split()]
    kinds = sorted({text.partition(":")[2].rstrip("?") for text in f"{inputs} {outputs}".split()})
    schema = OpSchema(
        name,
        DOMAIN,
        1,
        inputs=described[0],
        outputs=described[1],
        type_constraints=[(kind, _TYPES[kind], "") for kind in kinds],
        attributes=[
            OpSchema.Attribute(key, getattr(OpSchema.AttrType, kind), "", required=False)
            for key, kind in attributes.items()
        ],
    )
    return values.Op(values.Opset(DOMAIN, 1), name, schema)


_MATMUL_NBITS = _runtime_operator(
    "MatMulNBits",
    "A:T B:B scales:T zero_points:B? g_idx:M? bias:T?",
    "Y:T",
    K="INT",
    N="INT",
    bits="INT",
    block_size="INT",
    accuracy_level="INT",
)
_GATHER_NBITS = _runtime_operator(
    "GatherBlockQuantized",
    "data:B indices:I scales:T zero_points:B?",
    "output:T",
    bits="INT",
    block_size="INT",
    gather_axis="INT",
    quantize_axis="INT",
)


_GROUP_QUERY_ATTENTION = _runtime_operator(
    "GroupQueryAttention",
    "query:T key:T? value:T? past_key:T? past_value:T? seqlens_k:M total_sequence_length:M"
    " cos_cache:T? sin_cache:T? position_ids:I? attention_bias:T?",
    "output:T present_key:T present_value:T",
    num_heads="INT",
    kv_num_heads="INT",
    scale="FLOAT",
)


def _grouped_attention(
    q: FLOAT, k: FLOAT, v: FLOAT, past_k: FLOAT, past_v: FLOAT, bias: FLOAT, scale: float
) -> tuple[FLOAT, FLOAT, FLOAT]:
    """The operator takes heads side by side, and how long every sequence is: all as long as the longest."""

    def beside(x: FLOAT) -> FLOAT:  # [B, H, S, D] → [B, S, H·D]
        return onnx.Reshape(onnx.Transpose(x, perm=[0, 2, 1, 3]), onnx.Constant(value_ints=[0, 0, -1]))  # type: ignore[no-any-return]

    queries, keys = _sizes(q), _sizes(k)
    heads, width, kv_heads = queries[1], queries[3], keys[1]
    total = onnx.Cast(onnx.Shape(bias, start=3, end=4), to=6)  # int32 [1]
    batch = onnx.Shape(q, start=0, end=1)
    last = onnx.Expand(onnx.Sub(total, onnx.Cast(onnx.Constant(value_ints=[1]), to=6)), batch)
    found, grown_k, grown_v = _GROUP_QUERY_ATTENTION(
        *(beside(q), beside(k), beside(v), past_k, past_v, last, onnx.Squeeze(total)),
        *(None, None, None, bias),
        num_heads=int(heads),
        kv_num_heads=int(kv_heads),
        scale=scale,
    )
    apart = onnx.Reshape(found, onnx.Constant(value_ints=[0, 0, int(heads), int(width)]))
    return onnx.Transpose(apart, perm=[0, 2, 1, 3]), grown_k, grown_v


_ROTARY_EMBEDDING = _runtime_operator(
    "RotaryEmbedding",
    "input:T position_ids:I cos_cache:T sin_cache:T",
    "output:T",
    interleaved="INT",
)


def _row_numbers(angles: FLOAT, x: FLOAT) -> INT64:
    sizes = onnx.Concat(onnx.Shape(angles, start=0, end=1), onnx.Shape(angles, start=2, end=3), axis=0)
    zero, one = (onnx.Constant(value_int=number) for number in (0, 1))
    numbers = onnx.Range(zero, onnx.ReduceProd(sizes, keepdims=0), one)
    batch = onnx.Concat(onnx.Shape(x, start=0, end=1), onnx.Shape(x, start=2, end=3), axis=0)
    return onnx.Expand(onnx.Reshape(numbers, sizes), batch)  # type: ignore[no-any-return]


def _rotary_embedding(x: FLOAT, rows: INT64, cos: FLOAT, sin: FLOAT) -> FLOAT:
    return _ROTARY_EMBEDDING(x, rows, cos, sin, interleaved=0)  # type: ignore[no-any-return]


def _sizes(value: Any) -> Any:
    """The sizes of a value of a graph under construction, whose eager type has none."""
    return value.shape


def _matmul_nbits(
    x: FLOAT,
    b: UINT8,
    scales: FLOAT,
    zeros: UINT8 | None,
    bias: FLOAT | None,
    K: int,
    N: int,
    bits: int,
    block: int,
    accuracy: int,
) -> FLOAT:
    return _MATMUL_NBITS(  # type: ignore[no-any-return]
        x, b, scales, zeros, None, bias, K=K, N=N, bits=bits, block_size=block, accuracy_level=accuracy
    )


def _gather_nbits(
    ids: INT64, data: UINT8, scales: FLOAT, zeros: UINT8 | None, bits: int, block: int, K: int
) -> FLOAT:
    wide = onnx.Unsqueeze(scales, onnx.Constant(value_ints=[-1]))  # [V, blocks, 1], shared with the product
    points = None if zeros is None else onnx.Unsqueeze(zeros, onnx.Constant(value_ints=[-1]))
    rows = _GATHER_NBITS(data, ids, wide, points, bits=bits, block_size=block, gather_axis=0, quantize_axis=2)
    shape = onnx.Concat(onnx.Shape(ids), onnx.Constant(value_ints=[-1]), axis=0)
    rows = onnx.Reshape(rows, shape)
    if K % block:  # the last block is padded
        first, last, width = (onnx.Constant(value_ints=[number]) for number in (0, -1, K))
        rows = onnx.Slice(rows, first, width, last)
    return rows  # type: ignore[no-any-return]


def _scalar(number: float, dtype: type[np.generic]) -> Any:
    return onnx.Constant(value=ir.tensor(np.array(number, dtype)))


def _token_codes(x: FLOAT, bits: int) -> tuple[UINT8, FLOAT]:
    last, most = onnx.Constant(value_ints=[-1]), _scalar((1 << (bits - 1)) - 1, np.float32)
    scale = onnx.Max(onnx.Div(onnx.ReduceMax(onnx.Abs(x), last, keepdims=1), most), _scalar(TINY, np.float32))
    # Rounds, counts from 0 and saturates in one pass; a scale per token would need as many zero-points.
    q = onnx.QuantizeLinear(onnx.Div(x, scale), _scalar(1, np.float32), _scalar(128, np.uint8))
    return q, scale


def _counted(q: INT8) -> UINT8:
    counted = onnx.Add(onnx.Cast(q, to=ir.DataType.INT32), _scalar(128, np.int32))
    return onnx.Cast(counted, to=ir.DataType.UINT8)  # type: ignore[no-any-return]


# Codes are counted from 0: for two signed operands ONNX Runtime has no vectorised kernel on x86 (measured: 20
# to 45 times slower).
def _matmul_integer(a: UINT8, b: INT8, zero: INT8 | None) -> INT32:
    return onnx.MatMulInteger(a, b, _scalar(128, np.uint8), zero)  # type: ignore[no-any-return]


_MATMUL_INTEGER_TO_FLOAT = _runtime_operator(
    "MatMulIntegerToFloat",
    "A:B B:S a_scale:T b_scale:T a_zero_point:B? b_zero_point:S? bias:T?",
    "Y:T",
)


def _matmul_scaled(a: UINT8, b: INT8, scale: FLOAT, zero: INT8 | None) -> FLOAT:
    one, middle = _scalar(1, np.float32), _scalar(128, np.uint8)
    return _MATMUL_INTEGER_TO_FLOAT(a, b, one, scale, middle, zero)  # type: ignore[no-any-return]


def _quantize_linear(x: FLOAT, scale: FLOAT, zero: UINT8, axis: int) -> UINT8:
    return onnx.QuantizeLinear(x, scale, zero, axis=axis)  # type: ignore[no-any-return]


def _dequantize_linear(q: INT8, scale: FLOAT, zero: INT8 | None, axis: int, block: int) -> FLOAT:
    if block > 0:
        return onnx.DequantizeLinear(q, scale, zero, axis=axis, block_size=block)  # type: ignore[no-any-return]
    return onnx.DequantizeLinear(q, scale, zero, axis=axis)  # type: ignore[no-any-return]


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Operator overload → function that builds its ONNX nodes; for ``torch.onnx.export``."""
    return {
        ops.matmul_nbits.default: _matmul_nbits,
        ops.grouped_attention.default: _grouped_attention,
        ops.row_numbers.default: _row_numbers,
        ops.rotary_embedding.default: _rotary_embedding,
        ops.gather_nbits.default: _gather_nbits,
        ops.token_codes.default: _token_codes,
        ops.counted.default: _counted,
        ops.matmul_integer.default: _matmul_integer,
        ops.matmul_scaled.default: _matmul_scaled,
        ops.quantize_linear.default: _quantize_linear,
        ops.dequantize_linear.default: _dequantize_linear,
    }
