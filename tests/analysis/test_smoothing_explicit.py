"""Groups without a producer: which sites share one, and which are refused."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcompress.analysis.sites import find_sites
from fxcompress.analysis.smoothing import find_smoothing_groups
from fxcompress.analysis.smoothing_explicit import explicit_groups
from fxcompress.analysis.smoothing_group import GroupKind
from fxcompress.capture.export import capture_model
from fxcompress.edits import SetTensor, SetTransform


class Mixed(nn.Module):
    """Siblings behind GELU, a weight used twice, a batched product."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.one, self.two = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.again = nn.Linear(6, 6)
        self.many = nn.Parameter(torch.randn(2, 6, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h = F.gelu(self.first(x))
        y = torch.tanh(self.again(torch.tanh(self.again(h))))
        return self.one(h), self.two(h), torch.bmm(y, self.many)


def test_siblings_share_a_group_and_the_rest_is_refused_with_a_reason() -> None:
    program = capture_model(Mixed().eval(), (torch.randn(2, 3, 5),))
    sites = find_sites(program)
    left = {site for site, _ in find_smoothing_groups(program, sites).refused}
    groups, refused = explicit_groups(program, sites, left)
    assert [group.site_names for group in groups] == [("first.weight",), ("one.weight", "two.weight")]
    assert all(group.kind is GroupKind.EXPLICIT and not group.producers for group in groups)
    reasons = {site.name: why for site, why in refused.items()}
    assert reasons == {
        "again.weight": "again.weight is used at several places, which would all need the scale",
        "many": "the input of a batched site cannot be given a scale of its own",
    }


def test_edits_divide_the_input_and_multiply_the_columns() -> None:
    program = capture_model(Mixed().eval(), (torch.randn(2, 3, 5),))
    sites = find_sites(program)
    groups, _ = explicit_groups(program, sites, set(sites))
    group = next(g for g in groups if g.site_names == ("one.weight", "two.weight"))
    scale = torch.tensor([1.0, 2, 3, 0.1, 7, 1], dtype=torch.float64)
    for edit in group.edits(scale, program.weights.__getitem__):
        if isinstance(edit, SetTransform):
            (transform,) = edit.transform_in
            factor = transform.tensors()["factor"]
            torch.testing.assert_close(factor.double(), 1 / scale, rtol=1e-6, atol=0)
        else:
            assert isinstance(edit, SetTensor)
            torch.testing.assert_close(
                edit.value.double(), program.weights[edit.name] * scale, rtol=1e-6, atol=0
            )
