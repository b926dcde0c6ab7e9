"""What explains a model's kernels: kernel, reason and source of every site."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import fxcompress


@pytest.fixture(scope="module")
def small() -> fxcompress.CompressedModel:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32))
    return fxcompress.compress(model, "w8a16", example_inputs=(torch.randn(2, 64),))


def test_nothing_is_explained_before_it_is_compiled(small: fxcompress.CompressedModel) -> None:
    with pytest.raises(fxcompress.FxCompressError, match="call the model once"):
        fxcompress.explain(small)


def test_every_site_has_a_kernel_and_a_reason(small: fxcompress.CompressedModel, tmp_path: Path) -> None:
    small(torch.randn(2, 64))
    found = fxcompress.explain(small)
    assert [site.site for site in found.sites] == ["0.weight", "2.weight"]
    assert {site.site: site.kernel for site in found.sites} == small.explain()
    assert all("kernels for this machine" in site.why for site in found.sites)
    assert "0.weight" in str(found)
    assert found.sites[0].why in str(found)
    written = found.dump(tmp_path / "kernels")
    assert len(written) == len({site.title for site in found.sites if site.source})
    for path in written:
        assert path.suffix == ".cpp"
        assert "#include" in path.read_text(encoding="utf-8")
