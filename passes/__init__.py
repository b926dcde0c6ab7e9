"""Compression methods, one module per method."""

if __name__ != "fxcompress.passes":
    raise ImportError(
        f"these modules are the package 'fxcompress.passes', but were imported as {__name__!r}:"
        " a second copy would register every pass twice."
        " Install the project (pip install -e .) and import fxcompress.passes."
    )

from fxcompress.passes.allocate_sparsity import AllocateSparsity
from fxcompress.passes.asvd import Asvd
from fxcompress.passes.awq import Awq
from fxcompress.passes.balance_attention import BalanceAttention
from fxcompress.passes.clip_weights import ClipWeights
from fxcompress.passes.distill import Distill
from fxcompress.passes.dsnot import Dsnot
from fxcompress.passes.e_sparse import ESparse
from fxcompress.passes.fuse_siblings import FuseSiblings
from fxcompress.passes.fwsvd import Fwsvd
from fxcompress.passes.gptq import Gptq
from fxcompress.passes.insert_quant_dequant import InsertQuantDequant
from fxcompress.passes.kvquant import Kvquant
from fxcompress.passes.laser import Laser
from fxcompress.passes.layer_distill import LayerDistill
from fxcompress.passes.low_rank_residual import LowRankResidual
from fxcompress.passes.lplr import Lplr
from fxcompress.passes.pack_sparse import PackSparse
from fxcompress.passes.permute_channels import PermuteChannels
from fxcompress.passes.prune_channels import PruneChannels
from fxcompress.passes.prune_magnitude import PruneMagnitude
from fxcompress.passes.quantize_activations import QuantizeActivations
from fxcompress.passes.quantize_codebook import QuantizeCodebook
from fxcompress.passes.quantize_kv_cache import QuantizeKvCache
from fxcompress.passes.quantize_weights import QuantizeWeights
from fxcompress.passes.remove_blocks import RemoveBlocks
from fxcompress.passes.reorder_channels import ReorderChannels
from fxcompress.passes.smooth_activations import SmoothActivations
from fxcompress.passes.sparsegpt import SparseGpt
from fxcompress.passes.split_outlier_features import SplitOutlierFeatures
from fxcompress.passes.suppress_outliers import SuppressOutliers
from fxcompress.passes.svd import Svd
from fxcompress.passes.svd_llm import SvdLlm
from fxcompress.passes.wanda import Wanda
from fxcompress.passes.wkvquant import Wkvquant

__all__ = [
    "AllocateSparsity",
    "Asvd",
    "Awq",
    "BalanceAttention",
    "ClipWeights",
    "Distill",
    "Dsnot",
    "ESparse",
    "FuseSiblings",
    "Fwsvd",
    "Gptq",
    "InsertQuantDequant",
    "Kvquant",
    "Laser",
    "LayerDistill",
    "LowRankResidual",
    "Lplr",
    "PackSparse",
    "PermuteChannels",
    "PruneChannels",
    "PruneMagnitude",
    "QuantizeActivations",
    "QuantizeCodebook",
    "QuantizeKvCache",
    "QuantizeWeights",
    "RemoveBlocks",
    "ReorderChannels",
    "SmoothActivations",
    "SparseGpt",
    "SplitOutlierFeatures",
    "SuppressOutliers",
    "Svd",
    "SvdLlm",
    "Wanda",
    "Wkvquant",
]
