"""The normal form: data types that say how a compressed site computes."""

from fxcompress.forms.activation import ActivationQuantizer, DynamicPerToken, StaticPerTensor
from fxcompress.forms.component import Component, component, from_spec
from fxcompress.forms.layout import WeightLayout
from fxcompress.forms.site_form import Scale, Shift, SiteForm, Transform, same_transform
from fxcompress.forms.terms import QuantizedWeight, WeightTerm

__all__ = [
    "ActivationQuantizer",
    "Component",
    "DynamicPerToken",
    "QuantizedWeight",
    "Scale",
    "Shift",
    "SiteForm",
    "StaticPerTensor",
    "Transform",
    "WeightLayout",
    "WeightTerm",
    "component",
    "from_spec",
    "same_transform",
]
