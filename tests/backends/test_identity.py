"""Packed weights belong to the parameters actually passed: instances, reassignment, reloading."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import fxcompress
from fxcompress.errors import BindingError, FxCompressError, RecipeError

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Net(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first, self.second = nn.Linear(48, 96), nn.Linear(96, 16)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 7

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def close(a: Tensor, b: Tensor) -> bool:
    return float((a - b).norm() / b.norm()) < 0.03


X = torch.randn(32, 48, generator=torch.Generator().manual_seed(9))
OPTIONS = {"recipe": "w8a8", "inner": "eager"}


@torch.no_grad()
def test_two_instances_of_one_class() -> None:
    one, two = Net(1), Net(2)
    fast_one = torch.compile(one, backend="fxcompress", options=OPTIONS)
    fast_two = torch.compile(two, backend="fxcompress", options=OPTIONS)
    for _ in range(2):
        assert close(fast_one(X), one(X))
        assert close(fast_two(X), two(X))
    assert not close(one(X), two(X))


@torch.no_grad()
def test_a_teacher_beside_the_compressed_student() -> None:
    teacher = Net(1)
    student = fxcompress.compress(teacher, "w8a8", example_inputs=X, progress=False)
    student.set_backend("eager")
    expected = teacher(X)
    assert close(student(X), expected)
    assert torch.equal(teacher(X), expected)
    compiled_teacher = torch.compile(teacher, backend="eager")
    assert torch.equal(compiled_teacher(X), expected)
    assert close(student(X), expected)


@torch.no_grad()
def test_reassigned_parameter() -> None:
    net = Net(1)
    fast = torch.compile(net, backend="fxcompress", options=OPTIONS)
    assert close(fast(X), net(X))
    net.first.weight = nn.Parameter(-net.first.weight)
    assert close(fast(X), net(X))


@torch.no_grad()
def test_load_state_dict_and_in_place_updates() -> None:
    net, other = Net(1), Net(2)
    fast = torch.compile(net, backend="fxcompress", options=OPTIONS)
    assert close(fast(X), net(X))
    net.load_state_dict(other.state_dict())
    assert close(fast(X), other(X))
    net.second.weight.mul_(-1)
    assert close(fast(X), net(X))
    assert not close(fast(X), other(X))


@torch.no_grad()
def test_module_compile_and_artifact_option(tmp_path: object) -> None:
    net = Net(1)
    small = fxcompress.compress(net, "w8a8", example_inputs=X, progress=False)
    small.save(f"{tmp_path}/small")
    small.set_backend("eager")
    expected = small(X)
    net.compile(backend="fxcompress", options={"artifact": f"{tmp_path}/small", "inner": "eager"})
    torch.testing.assert_close(net(X), expected)
    stranger = Net(2)
    stranger.compile(backend="fxcompress", options={"artifact": f"{tmp_path}/small", "inner": "eager"})
    with pytest.raises(BindingError, match="not those the artifact was made from"):
        stranger(X)


@torch.no_grad()
def test_compressed_model_refuses_overwriting_but_takes_assignment() -> None:
    small = fxcompress.compress(Net(1), "w8a8", example_inputs=X, progress=False)
    small.set_backend("eager")
    with pytest.raises(FxCompressError, match="compressed, its values cannot be overwritten"):
        small.model.load_state_dict(Net(2).state_dict())
    small.model.load_state_dict(Net(2).state_dict(), assign=True)
    torch.testing.assert_close(small(X), Net(2)(X))


@torch.no_grad()
def test_originals_are_not_resident() -> None:
    net = Net(1)
    dense = sum(parameter.nbytes for parameter in net.parameters())
    small = fxcompress.compress(net, "w8a8", example_inputs=X, progress=False)
    small(X)
    del net
    gc.collect()
    assert small.resident_bytes() < 0.4 * dense
    assert torch.isnan(small.model.first.weight).all()
    assert small.model.first.weight.untyped_storage().nbytes() == 4


@torch.no_grad()
def test_a_compressed_model_may_be_compiled() -> None:
    """As a whole or as a part of another module, with the forms it has; not with other ones."""
    small = fxcompress.compress(Net(1), "w8a8", example_inputs=X, progress=False)
    expected = small(X)
    around = nn.Sequential(small.model, nn.ReLU())
    torch._dynamo.reset()
    assert torch.equal(torch.compile(small, backend="fxcompress")(X), expected)
    assert torch.equal(torch.compile(around, backend="fxcompress")(X), expected.relu())
    torch._dynamo.reset()
    with pytest.raises(Exception, match="belong to a compressed model already"):
        torch.compile(nn.Sequential(small.model), backend="fxcompress", options=OPTIONS)(X)


def test_compressing_twice_is_refused() -> None:
    small = fxcompress.compress(Net(1), "w8a8", example_inputs=X, progress=False)
    with pytest.raises(RecipeError, match="already compressed"):
        fxcompress.compress(small.model, "w8a8", example_inputs=X)
    with pytest.raises(RecipeError, match="already compressed"):
        fxcompress.compress(small, "w8a8", example_inputs=X)  # type: ignore[arg-type]


def test_compress_leaves_the_model_alone() -> None:
    net = Net(1)
    before = copy.deepcopy(net.state_dict())
    fxcompress.compress(net, "w8a8", example_inputs=X, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipie": "w8a8"}, "unknown option"),
        ({"recipe": "w8a8", "artifact": "x"}, "exclude each other"),
        ({"inner": "magic"}, "inner compiler 'magic' is unknown"),
        ({"recipe": "w4a16-gptq"}, "needs calibration data"),
        ({"recipe": "w5"}, "w5"),
    ],
)
def test_bad_options(options: dict[str, str], message: str) -> None:
    fast = torch.compile(Net(1), backend="fxcompress", options=options)
    with torch.no_grad(), pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=message):
        fast(X)
