"""The rest of the zoo: encoders, encoder-decoders, vision models and plain modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tests import zoo_modules
from tests.zoo_causal import POSITIONS, VOCAB
from tests.zoo_entry import InputMaker, ZooEntry

_SPECIAL: dict[str, Any] = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_ENCODER: dict[str, Any] = {
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 88,
    "max_position_embeddings": POSITIONS,
}
_BATCH_ONLY = (0,)
_BATCH_AND_LENGTH = (0, 1)


def _ids(batch: int, seq: int) -> Tensor:
    return torch.randint(3, VOCAB, (batch, seq))


def masked_ids(batch: int, seq: int) -> dict[str, Tensor]:
    """Token ids `[batch, seq]` and their mask; the last row ends in two padded positions."""
    ids, mask = _ids(batch, seq), torch.ones(batch, seq, dtype=torch.long)
    ids[-1, -2:], mask[-1, -2:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def _pair(batch: int, seq: int) -> dict[str, Tensor]:
    return {**masked_ids(batch, seq), "decoder_input_ids": _ids(batch, seq - 3)}


def _pixels(size: int) -> InputMaker:
    return lambda batch, seq: {"pixel_values": torch.randn(batch, 3, size, size)}


def _image_and_text(batch: int, seq: int) -> dict[str, Tensor]:
    return {**masked_ids(batch, seq), **_pixels(32)(batch, seq)}


def _speech(batch: int, seq: int) -> dict[str, Tensor]:
    return {"input_features": torch.randn(batch, 10, 32), "decoder_input_ids": _ids(batch, seq)}


def _transformer(
    name: str,
    model_class: str,
    config_class: str,
    tags: str,
    maker: InputMaker,
    dynamic: Mapping[str, tuple[int, ...]],
    options: dict[str, Any],
    *,
    generates: bool = False,
    call: dict[str, Any] | None = None,
    export_note: str = "",
) -> ZooEntry:
    def builder() -> nn.Module:
        config = getattr(transformers, config_class)(**options)
        model = getattr(transformers, model_class)(config)
        assert isinstance(model, nn.Module)
        return model

    return ZooEntry(
        name, builder, frozenset(tags.split()), maker, generates, call or {}, dynamic, export_note
    )


def _plain(
    name: str,
    builder: Callable[[], nn.Module],
    tags: str,
    maker: InputMaker,
    *,
    dynamic: tuple[int, ...] = _BATCH_ONLY,
    export_note: str = "",
) -> ZooEntry:
    keys = maker(2, 8)
    return ZooEntry(
        name,
        builder,
        frozenset(tags.split()) | {"plain"},
        maker,
        dynamic_dims=dict.fromkeys(keys, dynamic),
        export_note=export_note,
    )


def _random(key: str, *shape: int) -> InputMaker:
    """Float input `[batch, *shape]`; a -1 in `shape` becomes the sequence length."""
    return lambda batch, seq: {key: torch.randn(batch, *(seq if size == -1 else size for size in shape))}


def _ranker_inputs(batch: int, seq: int) -> dict[str, Tensor]:
    return {"item": torch.randint(0, 50, (batch,)), "context": torch.randn(batch, 7)}


_TEXT_DIMS = {"input_ids": _BATCH_AND_LENGTH, "attention_mask": _BATCH_AND_LENGTH}
_PAIR_DIMS = {**_TEXT_DIMS, "decoder_input_ids": _BATCH_AND_LENGTH}
_PIXEL_DIMS = {"pixel_values": _BATCH_ONLY}

ENCODERS: tuple[ZooEntry, ...] = (
    _transformer(
        "bert",
        "BertModel",
        "BertConfig",
        "encoder learned-positions bias post-norm",
        masked_ids,
        _TEXT_DIMS,
        _ENCODER,
    ),
    _transformer(
        "distilbert-classifier",
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        "encoder learned-positions bias post-norm classifier",
        masked_ids,
        _TEXT_DIMS,
        {
            "vocab_size": VOCAB,
            "dim": 48,
            "hidden_dim": 80,
            "n_layers": 2,
            "n_heads": 3,
            "num_labels": 3,
            "max_position_embeddings": POSITIONS,
        },
    ),
    _transformer(
        "albert",
        "AlbertModel",
        "AlbertConfig",
        "encoder shared-layers bias",
        masked_ids,
        _TEXT_DIMS,
        {**_ENCODER, "embedding_size": 20},
    ),
    _transformer(
        "modernbert",
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        "encoder rope fused-qkv fused-gate-up tied local-attention",
        masked_ids,
        _TEXT_DIMS,
        {**_ENCODER, **_SPECIAL, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 4},
    ),
)

ENCODER_DECODERS: tuple[ZooEntry, ...] = (
    _transformer(
        "t5",
        "T5ForConditionalGeneration",
        "T5Config",
        "encoder-decoder relative-bias cross-attention tied",
        _pair,
        _PAIR_DIMS,
        {
            "vocab_size": VOCAB,
            "d_model": 48,
            "d_kv": 12,
            "d_ff": 80,
            "num_layers": 2,
            "num_heads": 4,
            "pad_token_id": 0,
            "eos_token_id": 2,
            "decoder_start_token_id": 0,
        },
        generates=True,
        call={"use_cache": False},
    ),
    _transformer(
        "bart",
        "BartForConditionalGeneration",
        "BartConfig",
        "encoder-decoder learned-positions cross-attention bias tied",
        _pair,
        _PAIR_DIMS,
        {
            **_SPECIAL,
            "d_model": 48,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 72,
            "decoder_ffn_dim": 72,
            "max_position_embeddings": POSITIONS,
            "decoder_start_token_id": 2,
            "forced_eos_token_id": None,
        },
        generates=True,
        call={"use_cache": False},
    ),
    _transformer(
        "whisper",
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        "encoder-decoder audio conv1d cross-attention bias tied",
        _speech,
        {"input_features": _BATCH_ONLY, "decoder_input_ids": _BATCH_AND_LENGTH},
        {
            **_SPECIAL,
            "d_model": 48,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 72,
            "decoder_ffn_dim": 72,
            "num_mel_bins": 10,
            "max_source_positions": 16,
            "max_target_positions": POSITIONS,
            "decoder_start_token_id": 1,
        },
        call={"use_cache": False},
    ),
)

VISION: tuple[ZooEntry, ...] = (
    _transformer(
        "vit",
        "ViTForImageClassification",
        "ViTConfig",
        "vision classifier bias patch-conv",
        _pixels(32),
        _PIXEL_DIMS,
        {
            "hidden_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 72,
            "image_size": 32,
            "patch_size": 8,
            "num_labels": 5,
        },
    ),
    _transformer(
        "swin",
        "SwinForImageClassification",
        "SwinConfig",
        "vision classifier window-attention",
        _pixels(32),
        _PIXEL_DIMS,
        {
            "image_size": 32,
            "patch_size": 4,
            "embed_dim": 24,
            "depths": [2, 2],
            "num_heads": [2, 4],
            "window_size": 4,
            "num_labels": 5,
        },
    ),
    _transformer(
        "convnext",
        "ConvNextForImageClassification",
        "ConvNextConfig",
        "vision cnn depthwise classifier",
        _pixels(32),
        _PIXEL_DIMS,
        {"hidden_sizes": [16, 28], "depths": [1, 2], "num_stages": 2, "patch_size": 4, "num_labels": 5},
    ),
    _transformer(
        "clip",
        "CLIPModel",
        "CLIPConfig",
        "vision text two-towers bias",
        _image_and_text,
        {**_TEXT_DIMS, **_PIXEL_DIMS},
        {
            "projection_dim": 20,
            "text_config": {**_ENCODER, **_SPECIAL, "projection_dim": 20},
            "vision_config": {
                "hidden_size": 40,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "intermediate_size": 64,
                "image_size": 32,
                "patch_size": 8,
                "projection_dim": 20,
            },
        },
    ),
)

PLAIN: tuple[ZooEntry, ...] = (
    _plain("mlp", zoo_modules.Mlp, "linear layernorm", _random("x", 30)),
    _plain(
        "tied-autoencoder",
        zoo_modules.TiedAutoencoder,
        "weight-used-twice transposed-weight",
        _random("x", 27),
    ),
    _plain("shared-layers", zoo_modules.SharedLayers, "shared-layers tied", _random("x", 24)),
    _plain("resnet", zoo_modules.ResNet, "cnn batchnorm residual", _random("image", 3, 16, 16)),
    _plain(
        "depthwise",
        zoo_modules.DepthwiseSeparable,
        "cnn batchnorm depthwise grouped squeeze-excite",
        _random("image", 3, 16, 16),
    ),
    _plain("densenet", zoo_modules.DenseNet, "cnn batchnorm concat", _random("image", 3, 8, 8)),
    _plain("unet", zoo_modules.UNet, "cnn transposed-conv concat groupnorm", _random("image", 3, 16, 16)),
    _plain(
        "temporal-conv",
        zoo_modules.TemporalConv,
        "cnn conv1d split",
        _random("series", 5, -1),
        dynamic=(0, 2),
    ),
    _plain("volume", zoo_modules.VolumeNet, "cnn conv3d batchnorm", _random("volume", 2, 4, 6, 6)),
    _plain(
        "einsum",
        zoo_modules.EinsumWeights,
        "einsum-weight attention",
        _random("x", -1, 36),
        dynamic=_BATCH_AND_LENGTH,
    ),
    _plain("batched-weights", zoo_modules.BatchedWeights, "bmm-weight baddbmm-weight", _random("x", 26)),
    _plain(
        "matmul-forms", zoo_modules.MatmulForms, "addmm-weight matmul-weight sliced-weight", _random("x", 20)
    ),
    _plain("ranker", zoo_modules.Ranker, "keyword-only dataclass-output embedding", _ranker_inputs),
    _plain(
        "recurrent",
        zoo_modules.Recurrent,
        "gru fixed-length",
        _random("x", -1, 9),
        dynamic=_BATCH_AND_LENGTH,
        export_note="aten.gru unrolls over time: torch.export specialises on the sequence length",
    ),
)

OTHERS: tuple[ZooEntry, ...] = ENCODERS + ENCODER_DECODERS + VISION + PLAIN
