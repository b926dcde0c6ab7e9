"""Schemas of the operators ``fxcompress_cpu::*``, and the shapes of their results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxcompress.backends.cpu.generator import output_dtype, outputs_of
from fxcompress.backends.cpu.sparse_native import FAKES, SCHEMAS

LIBRARY = torch.library.Library("fxcompress_cpu", "DEF")
_SCHEMAS = (
    "linear(Tensor x, Tensor weight, Tensor scale, Tensor? zero, Tensor total, Tensor? bias,"
    " Tensor? act_scale, Tensor? act_zero, int form) -> Tensor",
    "linear_residual(Tensor x, Tensor residual, Tensor weight, Tensor scale, Tensor? zero, Tensor total,"
    " Tensor? bias, Tensor? act_scale, Tensor? act_zero, int form) -> Tensor",
    "experts(Tensor x, Tensor weight, Tensor scale, Tensor? zero, Tensor total, Tensor ends,"
    " Tensor? act_scale, Tensor? act_zero, int form) -> Tensor",
    "embedding(Tensor indices, Tensor weight, Tensor scale, Tensor? zero, Tensor total, int columns,"
    " int form) -> Tensor",
    "dense(Tensor weight, Tensor scale, Tensor? zero, int columns, int form) -> Tensor",
    "attend(Tensor query, Tensor key, Tensor value, Tensor? mask, bool causal, float scale,"
    " int form) -> Tensor",
    *SCHEMAS,
)
for _schema in _SCHEMAS:
    LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def _fake_linear(
    x: Tensor,  # [..., K]
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    total: Tensor,  # [N]
    bias: Tensor | None,
    act_scale: Tensor | None,
    act_zero: Tensor | None,
    form: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], outputs_of(form, total.shape[0])), dtype=output_dtype(form))


def _fake_linear_residual(
    x: Tensor,  # [..., K]
    residual: Tensor,  # [..., N]
    *rest: Any,
) -> Tensor:
    result: Tensor = _fake_linear(x, *rest)
    return result


def _fake_experts(
    x: Tensor,  # [T, K]
    weight: Tensor,  # [E, …]
    scale: Tensor,
    zero: Tensor | None,
    total: Tensor,  # [E, N]
    ends: Tensor,  # [E]
    act_scale: Tensor | None,
    act_zero: Tensor | None,
    form: int,
) -> Tensor:
    return x.new_empty((x.shape[0], total.shape[1]), dtype=output_dtype(form))


def _fake_embedding(
    indices: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    total: Tensor,
    columns: int,
    form: int,
) -> Tensor:
    return weight.new_empty((*indices.shape, columns), dtype=output_dtype(form))


def _fake_dense(weight: Tensor, scale: Tensor, zero: Tensor | None, columns: int, form: int) -> Tensor:
    return weight.new_empty((columns, scale.shape[0] * scale.shape[2]), dtype=output_dtype(form))


def _fake_attend(
    query: Tensor,  # [B, H, Q, D]
    key: Tensor,
    value: Tensor,  # [B, H / G, S, V]
    mask: Tensor | None,
    causal: bool,
    scale: float,
    form: int,
) -> Tensor:
    batch, heads, queries, _ = query.shape
    out = query.new_empty((batch, queries, heads, value.shape[3]), dtype=output_dtype(form))
    return out.transpose(1, 2)


_FAKES: dict[str, Callable[..., Tensor]] = {
    "linear": _fake_linear,
    "linear_residual": _fake_linear_residual,
    "experts": _fake_experts,
    "embedding": _fake_embedding,
    "dense": _fake_dense,
    "attend": _fake_attend,
    **FAKES,
}
for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"fxcompress_cpu::{_name}", _fake, lib=LIBRARY)
