"""The assembly inside generated kernels, which Triton's interpreter cannot run, is executed step by step."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxcompress.backends.triton.generator import render
from fxcompress.backends.triton.linear_form import LinearForm
from fxcompress.backends.triton.packing import shared_table

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
WORDS = st.integers(0, 0xFFFFFFFF)


def assembly(form: LinearForm) -> str:
    """The one block of assembly in a kernel."""
    source = render(form)
    text = source[source.index("inline_asm_elementwise(") :]
    text = text[: text.index('"=h')]
    return "".join(re.findall(r'"([^"]*)"', text.replace('"""', '"').replace("\n", " ")))


def byte_of(word: int, place: int) -> int:
    return word >> 8 * place & 255


def halves(word: int, dtype: torch.dtype) -> Tensor:
    """Both 16-bit floats of a word."""
    return torch.tensor([word & 0xFFFF, word >> 16], dtype=torch.int32).to(torch.int16).view(dtype)


def word_of(pair: Tensor) -> int:
    low, high = (int(x) & 0xFFFF for x in pair.view(torch.int16))
    return low | high << 16


def run(text: str, given: dict[str, int], dtype: torch.dtype) -> dict[str, int]:
    """Execute the few instructions that kernels use."""
    known = dict(given)

    def value(name: str) -> int:
        return int(name, 16) if name.startswith("0x") else int(name) if name.isdigit() else known[name]

    for line in (part.strip() for part in text.strip().strip("{}").split(";")):
        if not line or line.startswith(".reg"):
            continue
        name, rest = line.split(None, 1)
        split = re.match(r"\{(\S+), (\S+)\}, (\w+)", rest)
        if name == "mov.b32" and split:  # a word into two halves
            known[split[1]], known[split[2]] = value(split[3]) & 0xFFFF, value(split[3]) >> 16
            continue
        joined = re.match(r"(\w+), \{(\S+), (\S+)\}", rest)
        if name == "mov.b32" and joined:
            known[joined[1]] = value(joined[2]) | value(joined[3]) << 16
            continue
        target, *operands = (part.strip() for part in rest.split(","))
        a, b, c, *_ = [*map(value, operands), 0, 0, 0]
        if name == "mov.b32":
            known[target] = a
        elif name == "and.b32":
            known[target] = a & b
        elif name == "or.b32":
            known[target] = a | b
        elif name == "shr.u32":
            known[target] = a >> b
        elif name == "prmt.b32":
            choices = [c >> 4 * place & 15 for place in range(4)]
            assert max(choices) < 8, "the sign of a byte would be repeated"
            picked = [byte_of(a if choice < 4 else b, choice % 4) for choice in choices]
            known[target] = sum(byte << 8 * place for place, byte in enumerate(picked))
        elif name == "lop3.b32":
            assert operands[3] == "0xEA"
            known[target] = (a & b) | c
        elif name == "fma.rn.bf16x2":
            x, y, z = (halves(word, dtype).double() for word in (a, b, c))
            known[target] = word_of((x * y + z).to(dtype))
        elif name == "add.rn.f16x2":
            known[target] = word_of((halves(a, dtype).double() + halves(b, dtype).double()).to(dtype))
        else:
            raise AssertionError(f"unknown instruction {name}")
    return known


@given(WORDS, st.sampled_from((2, 4, 8)), st.integers(0, 255), st.sampled_from(sorted(DTYPES)))
def test_two_codes_become_two_floats(word: int, bits: int, zero: int, dtype: str) -> None:
    if bits == 8 and dtype == "bfloat16":
        return  # 128 + 255 has more bits than a bfloat16
    form = LinearForm("int", bits, True, "group", 128, "bfloat16", dtype)
    zero %= 1 << bits
    kind = DTYPES[dtype]
    offset = int(torch.tensor([-form.magic - zero], dtype=kind).view(torch.int16)) & 0xFFFF
    found = run(assembly(form), {"$2": word, "$3": offset}, kind)
    mask = (1 << bits) - 1
    codes = torch.tensor([word & mask, word >> 16 & mask], dtype=torch.float64)
    assert torch.equal(halves(found["$0"] | found["$1"] << 16, kind).double(), codes - zero)


@given(WORDS, st.sampled_from(sorted(DTYPES)))
def test_eight_codes_select_entries_of_a_table(word: int, dtype: str) -> None:
    kind, form = DTYPES[dtype], LinearForm("table", 4, False, "group", 64, "bfloat16", dtype)
    table = torch.randn(16, generator=torch.Generator().manual_seed(0))
    packed = shared_table(table, 4)[0 if dtype == "bfloat16" else 1]
    registers = {f"${9 + i}": int(value) & 0xFFFFFFFF for i, value in enumerate(packed)}
    found = run(assembly(form), {"$8": word, **registers}, kind)
    check_nibbles(word, found, table.to(kind), kind)


@given(WORDS, st.sampled_from(sorted(DTYPES)))
def test_eight_codes_are_small_floats(word: int, dtype: str) -> None:
    kind, form = DTYPES[dtype], LinearForm("e2m1", 4, False, "group", 32, "e8m0", dtype)
    sizes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    table = torch.tensor([sign * size / form.factor for sign in (1, -1) for size in sizes]).to(kind)
    check_nibbles(word, run(assembly(form), {"$8": word}, kind), table, kind)


def check_nibbles(word: int, found: dict[str, int], table: Tensor, dtype: torch.dtype) -> None:
    """Codes 2p and 2p + 1 lie at bit 4p of the lower and of the upper half."""
    for pair in range(4):
        for half in (0, 1):
            code = word >> (4 * pair + 16 * half) & 15
            value = halves(found[f"${2 * pair + half}"], dtype)[0]
            assert torch.equal(value, table[code]), (pair, half, code)


def test_unknown_instructions_are_noticed() -> None:
    with pytest.raises(AssertionError, match=r"unknown instruction mul\.lo"):
        run("{ mul.lo a, $1, $2; }", {"$1": 1, "$2": 2}, torch.float16)
