"""What kernels are called with: ``templates/arguments.j2`` and ``attention_arguments.j2`` as structures."""

from __future__ import annotations

import ctypes

__all__ = ["Arguments", "AttentionArguments"]


class Arguments(ctypes.Structure):
    """``fx_arguments`` of ``templates/arguments.j2``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weight", "scale", "zero", "total", "bias")),
        *((name, ctypes.c_void_p) for name in ("act_scale", "act_zero", "out")),
        *((name, ctypes.c_int64) for name in ("x_stride", "m", "n", "k", "group", "threads", "epilogue")),
        ("residual", ctypes.c_void_p),
        ("residual_stride", ctypes.c_int64),
    ]


class AttentionArguments(ctypes.Structure):
    """``fx_attention`` of ``templates/attention_arguments.j2``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "mask", "out")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "kv_heads", "queries", "keys", "width")),
        ("value_width", ctypes.c_int64),
        ("strides", ctypes.c_int64 * 13),  # of q, k and v by batch, head and row; of the mask, all four
        *((name, ctypes.c_int64) for name in ("mask_is_float", "causal", "threads")),
        ("scale", ctypes.c_double),
    ]
