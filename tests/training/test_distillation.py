"""``fxcompress.distill``: from model to artifact and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress
from fxcompress.errors import TrainingError
from fxcompress.forms import LowRank
from fxcompress.training.data import SelfGenerated
from fxcompress.training.loop import TrainingResult
from tests.zoo_causal import BODY, causal_lm

IDS = [torch.randint(3, 128, (1, 16), generator=torch.Generator().manual_seed(i)) for i in range(16)]
FAST: dict[str, Any] = {"steps": 4, "batch_size": 4, "learning_rate": 1e-3, "progress": False}


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    return causal_lm("LlamaConfig", {**BODY, **options}).eval()


@pytest.fixture(scope="module")
def model() -> Any:
    made = llama()
    with torch.no_grad():  # a random model predicts nothing; make it sure of something
        made.lm_head.weight *= 20
    return made


def shrink(model: nn.Module, *recipe: Any) -> fxcompress.CompressedModel:
    small = fxcompress.compress(model, list(recipe), IDS, progress=False, verify="off")
    small.set_backend("eager")
    return small


def scores(model: Any) -> Tensor:
    return model(IDS[0]).logits


W3 = {"quantize-weights": {"bits": 3, "group_size": 32}}
CUT = {
    "prune-channels": {"amount": 0.3, "target": "block-parameters", "importance": "flap", "max_amount": 0.9}
}


@pytest.mark.parametrize(
    ("recipe", "parts"),
    [
        ([W3], ("weights", "floats")),
        (
            [{"quantize-codebook": {"double_quant": True}}, {"quantize-weights": {"only_remaining": True}}],
            ("lora",),
        ),
        ([CUT], ("lora", "floats")),
        ([{"wanda": {"pattern": "2:4"}}, "pack-sparse"], ("weights",)),
    ],
)
def test_a_distilled_model_is_nearer_and_survives_saving(
    model: Any, recipe: list[Any], parts: tuple[str, ...], tmp_path: Path
) -> None:
    small = shrink(model, *recipe)
    results: list[TrainingResult] = []
    healed = fxcompress.distill(small, model, IDS, train_parts=parts, on_result=results.append, **FAST)
    healed.set_backend("eager")
    (result,) = results
    assert result.held_out[-1][1] < result.held_out[0][1]
    wanted = torch.log_softmax(scores(model).detach(), -1)

    def gap(other: Any) -> float:
        return float((wanted.exp() * (wanted - torch.log_softmax(scores(other), -1))).sum(-1).mean())

    assert gap(healed) < gap(small)
    healed.save(tmp_path / "out")
    loaded = fxcompress.load(tmp_path / "out", backend="eager")
    assert torch.equal(scores(loaded), scores(healed))
    names = [entry["name"] for entry in loaded.report.passes]
    assert names[-1] == "distill"
    assert loaded.report.totals["bytes_after"] >= small.report.totals["bytes_after"]
    if parts == ("lora",):
        form = loaded.artifact.forms["model.layers.0.self_attn.q_proj.weight"]
        assert isinstance(form.terms[1], LowRank)


def test_zeros_of_a_loaded_pruned_model_stay(model: Any, tmp_path: Path) -> None:
    shrink(model, {"wanda": {"pattern": "2:4"}}).save(tmp_path / "out")
    pruned = fxcompress.load(tmp_path / "out", backend="eager")
    healed = fxcompress.distill(pruned, model, IDS, **FAST)
    for name, value in healed.artifact.tensors.items():
        if value.dim() == 2:
            zeros = pruned.artifact.tensors[name] == 0
            assert not bool((value[zeros] != 0).any()), name
    changed = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(healed.artifact.tensors[changed], pruned.artifact.tensors[changed])


def test_a_small_module_learns_from_a_compressed_teacher_of_other_width(model: Any) -> None:
    student = llama(hidden_size=32)
    before = scores(student).detach().clone()
    teacher = shrink(model, {"quantize-weights": {"bits": 8}})
    made = fxcompress.distill(
        student,
        teacher,
        IDS,
        objective={"kd": {}, "hidden": {"weight": 0.5}, "attention": {}},
        train_parts=("weights", "embeddings", "floats"),
        **FAST,
    )
    assert torch.equal(scores(student), before)  # the caller's module stays as it was
    made.set_backend("eager")
    assert not torch.equal(scores(made), before)
    assert made.report.totals["compressed"] == 0


def test_a_second_instance_of_the_class_as_teacher_is_kept_apart(model: Any) -> None:
    other = llama()
    small = shrink(other, W3)
    reference = scores(model).detach().clone()
    fxcompress.distill(small, model, IDS, **FAST)
    assert torch.equal(scores(model), reference)
    own = fxcompress.distill(small, other, IDS, **FAST)
    foreign = fxcompress.distill(small, model, IDS, **FAST)
    own.set_backend("eager")
    foreign.set_backend("eager")
    assert not torch.equal(scores(own), scores(foreign))


def test_text_of_its_own_and_checkpoints(model: Any, tmp_path: Path) -> None:
    small = shrink(model, W3)
    options = {**FAST, "checkpoint": tmp_path, "held_out": 0}
    first = fxcompress.distill(small, model, SelfGenerated(samples=8, length=12), **options)
    second = fxcompress.distill(
        small, model, SelfGenerated(samples=8, length=12), **options
    )  # finished already
    for name, form in first.artifact.forms.items():
        assert form.same_as(second.artifact.forms[name]), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": []}, "gave no batch"),
        ({"data": [torch.zeros(1, 70, dtype=torch.long)] * 2}, "70 tokens, the model takes at most 64"),
        ({"sequence_length": 100}, "100 tokens, the model takes at most 64"),
        ({"teacher": None}, "needs a teacher"),
        ({"student": 3}, "found a int"),
        ({"train_parts": ("everything",)}, "unknown part 'everything'"),
        ({"stepz": 3}, "unknown option 'stepz'"),
        ({"include": ("nothing",)}, "nothing to train"),
        ({"objective": "minilm"}, "unknown objective"),
    ],
)
def test_bad_input(model: Any, change: dict[str, Any], message: str) -> None:
    given = {"student": llama(), "teacher": model, "data": IDS, **FAST, **change}
    positional = [given.pop(name) for name in ("student", "teacher", "data")]
    with pytest.raises(fxcompress.FxCompressError, match=message):
        fxcompress.distill(*positional, **given)


def test_another_vocabulary_is_refused_before_data_are_read(model: Any) -> None:
    def data() -> Any:
        raise AssertionError("read")

    with pytest.raises(TrainingError, match="the teacher scores 128 tokens, the student 120"):
        fxcompress.distill(llama(vocab_size=120), model, data, progress=False)
