"""Number formats: which values a code stands for, and how codes are packed."""

from fxcompress.formats.codebook import CodebookFormat
from fxcompress.formats.floating import FloatFormat, quantize_to_float_term
from fxcompress.formats.integer import (
    IntFormat,
    decode,
    encode,
    find_parameters,
    make_term,
    quantize_to_term,
)
from fxcompress.formats.packing import pack_codes, packed_width, unpack_codes

__all__ = [
    "CodebookFormat",
    "FloatFormat",
    "IntFormat",
    "decode",
    "encode",
    "find_parameters",
    "make_term",
    "pack_codes",
    "packed_width",
    "quantize_to_float_term",
    "quantize_to_term",
    "unpack_codes",
]
