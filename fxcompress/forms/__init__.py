"""The normal form: data types that say how a compressed site computes."""

from fxcompress.forms.activation import (
    ActivationQuantizer,
    DynamicPerGroup,
    DynamicPerToken,
    FloatPerTensor,
    FloatPerToken,
    StaticPerCluster,
    StaticPerTensor,
)
from fxcompress.forms.cache import BlockStore, CacheForm, CacheStore, ExactStore
from fxcompress.forms.cache_stores import CodebookStore, FloatStore, IntStore
from fxcompress.forms.cache_transforms import CacheTransform, ChannelAffine, HeadRotation, PositionRotation
from fxcompress.forms.codebook import CodebookWeight
from fxcompress.forms.component import Component, component, from_spec
from fxcompress.forms.dense import DenseWeight
from fxcompress.forms.double_quantized import DoubleQuantizedCodebook
from fxcompress.forms.emit import Eager, Emit, Within
from fxcompress.forms.layout import WeightLayout
from fxcompress.forms.low_rank import LowRank
from fxcompress.forms.mask import SparsityMask
from fxcompress.forms.outliers import FixedOutliers, OutlierColumns, OutlierSplit, SplitQuantizer
from fxcompress.forms.site_form import EdgeQuantizer, Permute, Scale, Shift, SiteForm, Transform
from fxcompress.forms.sparse import (
    BitmapIndex,
    CsrIndex,
    NmIndex,
    SparseIndex,
    SparseQuantizedWeight,
    SparseWeight,
)
from fxcompress.forms.sparse_cuda import SemiStructuredWeight, TiledSparseWeight
from fxcompress.forms.terms import FloatWeight, QuantizedWeight, WeightTerm

__all__ = [
    "ActivationQuantizer",
    "BitmapIndex",
    "BlockStore",
    "CacheForm",
    "CacheStore",
    "CacheTransform",
    "ChannelAffine",
    "CodebookStore",
    "CodebookWeight",
    "Component",
    "CsrIndex",
    "DenseWeight",
    "DoubleQuantizedCodebook",
    "DynamicPerGroup",
    "DynamicPerToken",
    "Eager",
    "EdgeQuantizer",
    "Emit",
    "ExactStore",
    "FixedOutliers",
    "FloatPerTensor",
    "FloatPerToken",
    "FloatStore",
    "FloatWeight",
    "HeadRotation",
    "IntStore",
    "LowRank",
    "NmIndex",
    "OutlierColumns",
    "OutlierSplit",
    "Permute",
    "PositionRotation",
    "QuantizedWeight",
    "Scale",
    "SemiStructuredWeight",
    "Shift",
    "SiteForm",
    "SparseIndex",
    "SparseQuantizedWeight",
    "SparseWeight",
    "SparsityMask",
    "SplitQuantizer",
    "StaticPerCluster",
    "StaticPerTensor",
    "TiledSparseWeight",
    "Transform",
    "WeightLayout",
    "WeightTerm",
    "Within",
    "component",
    "from_spec",
]
