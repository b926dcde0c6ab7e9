"""Tile sizes of product kernels: what there is to choose from, and a model of what each choice costs.

The model is a roofline per choice: memory, matrix units, decoding in ordinary instructions, and how well the
programs fill the device. It prunes what is measured where measuring was asked for, and decides elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from fxcompress.backends.triton.bytes_form import BytesForm
from fxcompress.backends.triton.devices import Device
from fxcompress.backends.triton.linear_form import LinearForm, UnpackForm
from fxcompress.backends.triton.sparse_form import SparseForm
from fxcompress.errors import BackendError

__all__ = ["Config", "Shape", "best", "bytes_form", "candidates", "cost", "row_bucket", "unpack_form"]

ProductForm = LinearForm | BytesForm | SparseForm
BUCKETS = (1, 16, 32, 64, 128, 256, 1024, 4096)
"""Numbers of rows that choices are made for; others count as the next larger one."""
_LAUNCH = 3e-6  # seconds a kernel takes that does nothing, in a graph of kernels
_ITERATION = {True: (0.15e-6, 0.5e-6), False: (0.05e-6, 0.22e-6)}
"""Seconds of a program's step, and more per 128 inputs: with words, and without (measured, H200)."""
_INT32 = 1 << 31


@dataclass(frozen=True)
class Shape:
    """Sizes of a product: ``[M, K] × [K, N]``."""

    m: int
    n: int
    k: int


@dataclass(frozen=True)
class Config:
    """How a product is divided.

    Args:
        block_m, block_n: Rows and outputs of a program.
        block_k: Inputs read at once (2:4 weights: 128).
        splits: Programs that share the inputs of one tile; their parts are summed by a second kernel.
        warps: Of a program.
        stages: Of the pipeline of loads.
        scale_weight: Scale weights before they are multiplied, not the products of a chunk.
        unpacked: The weight is unpacked to memory first, then multiplied densely (``block_m`` is 0).
    """

    block_m: int
    block_n: int
    block_k: int
    splits: int
    warps: int
    stages: int
    scale_weight: bool = False
    unpacked: bool = False

    def constants(self, form: ProductForm) -> dict[str, Any]:
        """Compile-time arguments of the form's kernel."""
        if isinstance(form, BytesForm):
            return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k, "GROUP_M": 8}
        found: dict[str, Any] = {"BLOCK_N": self.block_n, "SPLITS": self.splits}
        if isinstance(form, LinearForm):
            found |= {"BLOCK_K": self.block_k, "SCALE_WEIGHT": self.scale_weight}
        return {"BLOCK_M": self.block_m, **found}

    def to_dict(self) -> dict[str, Any]:
        """For files."""
        return asdict(self)


def row_bucket(rows: int) -> int:
    """The number of rows a choice is made for."""
    return next((bucket for bucket in BUCKETS if rows <= bucket), BUCKETS[-1])


def check_shape(shape: Shape, form: ProductForm) -> None:
    """Refuse sizes whose offsets inside a tile would not fit 32 bits; those between tiles have 64.

    Raises:
        BackendError: naming the size.
    """
    for name, size in (("outputs", shape.n), ("inputs", shape.k)):
        if size * 256 >= _INT32:
            raise BackendError(f"{form.title}: {size} {name}, more than {_INT32 // 256 - 1}.")


def candidates(form: ProductForm, shape: Shape, device: Device) -> Iterator[Config]:
    """Configurations that fit the device, none of them plainly useless for the shape."""
    for block_m in (16, 32, 64, 128):
        if block_m > 16 and block_m >= 2 * shape.m:
            continue
        if block_m < 64 and shape.m > 8 * block_m:
            continue
        for block_n in (32, 64, 128, 256):
            if (block_n > 64 and block_n >= 2 * shape.n) or block_m * block_n > 128 * 256:
                continue
            if block_n < 64 and (block_m >= 64 or isinstance(form, LinearForm)):
                continue
            ways = _warps(form, block_m, block_n), _stages(form, block_m), _blocks_k(form)
            for warps, stages, block_k in product(*ways):
                for splits in _splits(form, shape, block_m, block_n, device):
                    config = Config(block_m, block_n, block_k, splits, warps, stages, block_m >= 64)
                    if shared_bytes(form, config) <= device.shared:
                        yield config
    if isinstance(form, LinearForm) and unpack_form(form) is not None and shape.m >= 128:
        yield Config(0, 64, max(form.block_k), 1, 4, 1, True, True)


def unpack_form(form: LinearForm) -> UnpackForm | None:
    """The form that unpacks the weight of a product, or None where its second term is added by the kernel."""
    if form.rank or form.outliers:
        return None
    return UnpackForm(**{**vars(form), "bias": False})


def bytes_form(form: LinearForm) -> BytesForm:
    """The product with the unpacked codes of a form with int8 activations."""
    return BytesForm("int8", False, 1, form.group, 0, form.input, form.bias)


def _blocks_k(form: ProductForm) -> tuple[int, ...]:
    return (form.chunk,) if isinstance(form, SparseForm) else form.block_k


def _warps(form: ProductForm, block_m: int, block_n: int) -> tuple[int, ...]:
    if block_m * block_n >= 128 * 128:
        return (8,)
    if isinstance(form, LinearForm) and block_m < 64 and 64 <= block_n <= 128:
        return (2, 4)  # fewer of them read the activations less often
    return (4,)


def _stages(form: ProductForm, block_m: int) -> tuple[int, ...]:
    if isinstance(form, LinearForm):
        return (2, 3) if block_m >= 64 else (3, 4)
    return (2, 3, 4)


def _splits(form: ProductForm, shape: Shape, block_m: int, block_n: int, device: Device) -> Iterator[int]:
    yield 1
    if isinstance(form, BytesForm):
        return
    programs = math.ceil(shape.m / block_m) * math.ceil(shape.n / block_n)
    chunks = math.ceil(shape.k / form.chunk)
    for splits in (2, 4, 8, 16):
        if 2 * splits <= chunks and programs * splits <= 8 * device.processors:
            yield splits


def shared_bytes(form: ProductForm, config: Config) -> int:
    """Shared memory, estimated: the stages of both operands, and the decoded block."""
    if isinstance(form, BytesForm):
        widened = 2 * config.block_k * (config.block_m + config.block_n) if form.emulated else 0
        return config.stages * config.block_k * (config.block_m + config.block_n) + widened
    if isinstance(form, SparseForm):
        codes = 96 * config.block_n * form.bits // 4
        return config.stages * (codes + 256 * config.block_m) + 2 * 128 * config.block_n
    codes = config.block_k * form.stored_bits // 8 * config.block_n
    rows = config.block_k * config.block_m * (1 if form.activation else 2)
    extra = 2 * config.block_k * form.rank
    return config.stages * (codes + rows + extra) + 2 * config.block_k * config.block_n


def weight_bytes(form: ProductForm, shape: Shape) -> float:
    """Bytes of codes and scales."""
    numbers = shape.n * shape.k
    if isinstance(form, BytesForm):
        return numbers + (4 * numbers / form.group / form.block_rows if form.group else 4 * shape.n)
    if isinstance(form, SparseForm):
        scales = (2 + form.zero) * numbers / form.group if form.group else 4 * shape.n
        return numbers * form.bits / 16 + numbers / 8 + (scales if form.bits < 16 else 0)
    per_scale = {"float32": 4, "bfloat16": 2}.get(form.scale_dtype, 1) + form.zero
    scales = shape.n * (math.ceil(shape.k / form.group) if form.group else 1) * per_scale
    return numbers * form.stored_bits / 8 + scales


def decode_instructions(form: ProductForm, config: Config) -> float:
    """Ordinary instructions per weight of a tile, counted in compiled kernels."""
    if isinstance(form, BytesForm):
        return 4.0 if form.emulated else 0.0
    if isinstance(form, SparseForm):
        return 5.0
    value = {"int": 1.8, "table": 6.0, "row-table": 7.0, "e4m3": 5.0, "e5m2": 4.0, "e2m1": 5.0}[form.values]
    if form.stored_bits == 3:
        value += 1.0
    if form.values == "int" and not form.packed:
        value += 1.5
    if form.scale_place in ("step", "element"):
        value += {"step": 1.0, "element": 4.0}[form.scale_place]
    if config.block_m >= 64:
        return value + 2.0  # to shared memory, where asynchronous matrix instructions read it
    # Rows are read from shared memory again by every warp.
    return value + 1.9 * config.block_m * config.warps / config.block_n


def _unpacked_cost(form: LinearForm, shape: Shape, device: Device) -> float:
    """Of unpacking a weight, and a dense product with it."""
    numbers = shape.n * shape.k
    size = 1 if form.activation else 2
    unpack = (weight_bytes(form, shape) + size * numbers) / (0.8 * device.bandwidth)
    rate = (device.bytes_rate if form.activation else device.half) * 0.7
    product = max(2 * shape.m * numbers / rate, size * numbers / device.bandwidth)
    return unpack + product + 2 * _LAUNCH


def cost(form: ProductForm, config: Config, shape: Shape, device: Device) -> float:
    """Seconds a product takes, estimated."""
    if config.unpacked:
        assert isinstance(form, LinearForm)
        return _unpacked_cost(form, shape, device)
    blocks_m = math.ceil(shape.m / config.block_m)
    blocks_n = math.ceil(shape.n / config.block_n)
    programs = blocks_m * blocks_n * config.splits
    fit = min(2048 // (32 * config.warps), device.shared // max(1, shared_bytes(form, config)))
    resident = max(1, min(8, fit))
    waves = math.ceil(programs / (device.processors * resident))
    filled = programs / (waves * device.processors * resident)
    # Memory is busy when a third of the places for programs are taken; arithmetic follows the processors.
    busy = min(1.0, programs / device.processors / max(1, math.ceil(programs / device.processors)))
    size = weight_bytes(form, shape)
    moved = size + 2 * shape.m * (shape.k + shape.n)
    again = size * (blocks_m - 1) + 2 * shape.m * shape.k * (
        blocks_n - 1
    )  # served by the cache where it fits
    if config.splits > 1:
        moved += 8 * config.splits * shape.m * shape.n
    memory = moved / device.bandwidth / min(1.0, 3 * filled) + again / (4 * device.bandwidth)
    rate = device.bytes_rate if isinstance(form, BytesForm) and not form.emulated else device.half
    rate *= 0.7 * min(1.0, config.block_n / 128) if config.block_m >= 64 else 0.7
    if isinstance(form, BytesForm):
        rate *= 1.37 * config.block_k / (config.block_k + 48)  # short steps wait for each other (measured)
    multiply = 2 * blocks_m * config.block_m * shape.n * shape.k / (rate * busy)
    work = blocks_m * shape.n * shape.k * decode_instructions(form, config)
    decode = work / (device.processors * 128 * device.clock * busy)
    launches = 2 if config.splits > 1 else 1
    steps = waves * math.ceil(shape.k / config.splits / max(1, config.block_k))
    alone, more = _ITERATION[isinstance(form, LinearForm)]
    waiting = steps * (alone + more * config.block_k / 128)
    # Decoding and multiplying wait for each other; both overlap with memory.
    return max(memory, multiply + decode, waiting) + launches * _LAUNCH


def ranked(form: ProductForm, shape: Shape, device: Device) -> list[Config]:
    """Candidates, the cheapest by the model first; equal ones in a fixed order."""
    found = {config: cost(form, config, shape, device) for config in candidates(form, shape, device)}
    if not found:
        raise BackendError(f"{form.title}: no configuration fits {device.name} for {shape}.")
    # Of equal ones those with three stages: the fastest of most forms on what was measured.
    return sorted(
        found,
        key=lambda config: (
            found[config],
            abs(config.stages - 3),
            *(str(v) for v in config.to_dict().values()),
        ),
    )


def best(form: ProductForm, shape: Shape, device: Device) -> Config:
    """The cheapest configuration by the model."""
    return ranked(form, shape, device)[0]
