"""``fxcompress.distill``: from model to artifact and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress
from examples.texts import documentation_text
from fxcompress.errors import TrainingError
from fxcompress.forms import LowRank
from fxcompress.training.data import SelfGenerated
from fxcompress.training.result import TrainingResult
from tests.engine.models import VOCABULARY, build
from tests.zoo_causal import BODY, causal_lm

IDS = [torch.randint(3, VOCABULARY, (1, 16), generator=torch.Generator().manual_seed(i)) for i in range(16)]
FAST: dict[str, Any] = {"steps": 8, "batch_size": 4, "learning_rate": 3e-3, "progress": False}
SMALL: dict[str, Any] = {**FAST, "example_inputs": IDS[0].expand(2, -1)}
W3 = {"quantize-weights": {"bits": 3, "group_size": 8}}


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    return causal_lm("LlamaConfig", {**BODY, **options}).eval()


def shrink(model: nn.Module, *recipe: Any) -> fxcompress.CompressedModel:
    small = fxcompress.compress(model, list(recipe), IDS, progress=False, verify="off")
    small.set_backend("eager")
    return small


def distilled(student: Any, teacher: Any, **options: Any) -> fxcompress.CompressedModel:
    made = fxcompress.distill(student, teacher, IDS, **{**SMALL, **options})
    made.set_backend("eager")
    return made


def scores(model: Any) -> Tensor:
    found: Tensor = model(IDS[0])
    return found.detach()


def gap(teacher: nn.Module, other: Any) -> float:
    wanted, found = (torch.log_softmax(scores(m), -1) for m in (teacher, other))
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


@pytest.mark.parametrize(
    ("recipe", "parts"),
    [
        ([W3], ("weights", "floats")),
        ([{"quantize-codebook": {"group_size": 8, "heads": True, "double_quant": True}}], ("lora",)),
        ([{"prune-channels": {"amount": 0.3}}], ("lora", "floats")),
        ([{"wanda": {"pattern": "2:4"}}, "pack-sparse"], ("weights",)),
    ],
)
def test_a_distilled_model_is_nearer_and_survives_saving(
    recipe: list[Any], parts: tuple[str, ...], tmp_path: Path
) -> None:
    model = build()
    small = shrink(model, *recipe)
    results: list[TrainingResult] = []
    healed = distilled(small, model, train_parts=parts, on_result=results.append)
    (result,) = results
    assert result.held_out[-1][1] < result.held_out[0][1]
    assert gap(model, healed) < gap(model, small)
    healed.save(tmp_path / "out")
    loaded = fxcompress.load(tmp_path / "out", model, backend="eager")
    assert torch.equal(scores(loaded), scores(healed))
    assert loaded.report.passes[-1]["name"] == "distill"
    assert loaded.report.totals["bytes_after"] >= small.report.totals["bytes_after"]
    if parts == ("lora",):
        assert isinstance(loaded.artifact.forms["layers.0.up.weight"].terms[1], LowRank)


def test_zeros_of_a_loaded_pruned_model_stay(tmp_path: Path) -> None:
    model = build()
    shrink(model, {"wanda": {"pattern": "2:4"}}).save(tmp_path / "out")
    pruned = fxcompress.load(tmp_path / "out", model, backend="eager")
    healed = distilled(pruned, model)
    changed = "layers.0.up.weight"
    assert not torch.equal(healed.artifact.tensors[changed], pruned.artifact.tensors[changed])
    for name, value in healed.artifact.tensors.items():
        zeros = pruned.artifact.tensors[name] == 0
        assert value.dim() < 2 or not bool((value[zeros] != 0).any()), name


def test_a_small_module_learns_from_a_compressed_teacher_of_other_width() -> None:
    def logits(model: Any) -> Tensor:
        found: Tensor = model(IDS[0], use_cache=False).logits
        return found.detach()

    teacher, student = llama(), llama(hidden_size=32)
    before = logits(student).clone()
    packed = shrink(teacher, {"quantize-weights": {"bits": 8}})
    results: list[TrainingResult] = []
    made = fxcompress.distill(
        student,
        packed,
        IDS,
        objective={"kd": {}, "hidden": {"weight": 0.5}, "attention": {}},
        train_parts=("weights", "embeddings", "floats"),
        on_result=results.append,
        **FAST,
    )
    assert torch.equal(logits(student), before)  # the caller's module stays as it was
    made.set_backend("eager")
    assert not torch.equal(logits(made), before)
    assert made.report.totals["compressed"] == 0
    assert results[0].held_out[-1][1] < results[0].held_out[0][1]


def test_a_second_instance_of_the_class_as_teacher_is_kept_apart() -> None:
    model, other = build(0), build(1)
    small = shrink(other, W3)
    reference = scores(model).clone()
    foreign, own = distilled(small, model), distilled(small, other)
    assert torch.equal(scores(model), reference)
    assert gap(other, own) < gap(other, foreign)
    assert gap(model, foreign) < gap(model, own)


def test_text_of_its_own_and_checkpoints(tmp_path: Path) -> None:
    model = llama()
    small = shrink(model, {"quantize-weights": {"bits": 3, "group_size": 32}})
    options = {**FAST, "checkpoint": tmp_path, "held_out": 0}
    first = fxcompress.distill(small, model, SelfGenerated(samples=4, length=8), **options)
    results: list[TrainingResult] = []
    second = fxcompress.distill(
        small, model, SelfGenerated(samples=4, length=8), **options, on_result=results.append
    )
    assert results[0].steps == FAST["steps"]  # it was finished already
    for name, form in first.artifact.forms.items():
        assert form.same_as(second.artifact.forms[name]), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": []}, "gave no batch"),
        ({"teacher": None}, "needs a teacher"),
        ({"student": 3}, "found a int"),
        ({"train_parts": ("everything",)}, "unknown part 'everything'"),
        ({"stepz": 3}, "unknown option 'stepz'"),
        ({"include": ("nothing",)}, "nothing to train"),
        ({"objective": "minilm"}, "unknown objective"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    given = {"student": build(), "teacher": build(1), "data": IDS, **SMALL, **change}
    positional = [given.pop(name) for name in ("student", "teacher", "data")]
    with pytest.raises(fxcompress.FxCompressError, match=message):
        fxcompress.distill(*positional, **given)


def test_sequences_longer_than_the_model_allows_are_refused() -> None:
    model = llama()
    long = [torch.zeros(1, 70, dtype=torch.long)] * 2
    for data, more in ((long, {}), (IDS, {"sequence_length": 100})):
        with pytest.raises(TrainingError, match="tokens, the model takes at most 64"):
            fxcompress.distill(model, None, data, objective="ce", **{**FAST, **more})


def test_another_vocabulary_is_refused_before_data_are_read() -> None:
    def data() -> Any:
        raise AssertionError("read")

    other = build()
    other.embed = nn.Embedding(VOCABULARY - 5, 16)
    example = IDS[0].clamp(max=VOCABULARY - 6)
    with pytest.raises(TrainingError, match="the teacher scores 40 tokens, the student 35"):
        fxcompress.distill(other, build(), data, progress=False, example_inputs=example)


@pytest.mark.real_model
def test_the_first_blocks_of_a_real_model_are_healed(
    smollm_small: Any, smollm_tokenizer: Any, tmp_path: Path
) -> None:
    text = documentation_text("calibration")[:12_000]
    held = documentation_text("held-out")[:1_500]
    recipe = [{"quantize-weights": {"bits": 3, "group_size": 64, "embedding_bits": 8}}]
    small = fxcompress.compress(smollm_small, recipe, progress=False, verify="off")
    found: list[TrainingResult] = []
    texts = [text[i : i + 400] for i in range(0, len(text), 400)]
    healed = fxcompress.distill(
        small,
        smollm_small,
        texts,
        held_out=[held],
        tokenizer=smollm_tokenizer,
        sequence_length=64,
        steps=8,
        batch_size=4,
        learning_rate=5e-4,
        evaluate_every=8,
        progress=False,
        on_result=found.append,
    )
    (_, before), (_, after) = found[0].held_out
    assert after < 0.85 * before
    healed.set_backend("eager")
    healed.save(tmp_path / "out")
    loaded = fxcompress.load(tmp_path / "out", backend="eager")
    ids = smollm_tokenizer(held[:200], return_tensors="pt").input_ids
    assert torch.equal(loaded(input_ids=ids).logits, healed(input_ids=ids).logits)
