"""The packaged language model (its first blocks) and encoder: quality, generation, persistence, memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fxcompress
from fxcompress.backends.cpu.selection import this_machine
from tests.end_to_end.zoo_checks import dense_copy

pytestmark = pytest.mark.real_model

PROMPTS = ["The capital of France is", "Water boils at a temperature of one hundred degrees, and ice"]


@pytest.fixture
def batch(smollm_tokenizer: Any) -> Any:
    smollm_tokenizer.padding_side = "left"
    return smollm_tokenizer(PROMPTS, return_tensors="pt", padding=True)


@torch.no_grad()
def test_generates_with_every_cache_like_the_dense_model(smollm_small: Any, batch: Any) -> None:
    small = fxcompress.compress(smollm_small, "w4a16", progress=False, verify="off")
    settings = {"max_new_tokens": 6, "do_sample": False}
    expected = dense_copy(smollm_small, small).generate(**batch, **settings)
    small.set_backend("eager")
    assert torch.equal(small.generate(**batch, **settings), expected)
    assert torch.equal(small.generate(**batch, **settings, cache_implementation="static"), expected)


@torch.no_grad()
def test_compiled_backend_uses_kernels_and_little_memory(smollm_small: Any, batch: Any) -> None:
    dense_bytes = sum(parameter.nbytes for parameter in smollm_small.parameters())
    small = fxcompress.compress(smollm_small, "w4a16", progress=False, verify="off")
    reference = fxcompress.compress(smollm_small, "w4a16", progress=False, verify="off")
    reference.set_backend("eager")
    logits, expected = small(**batch).logits, reference(**batch).logits
    keep = batch["attention_mask"].bool()
    bound = 0.02 if this_machine().bfloat16 else 1e-5  # prefill may multiply in bfloat16 where that is fast
    assert float((logits - expected)[keep].norm() / expected[keep].norm()) < bound
    one = {"input_ids": batch["input_ids"][:1, -1:]}
    assert small(**one).logits.shape[1] == 1
    assert small.resident_bytes() < 0.26 * dense_bytes  # mostly the 8-bit embedding in this cut-down model
    chosen = set(small.explain().values())
    assert all(text.startswith("generated ") for text in chosen), chosen
    assert not any(":" in text for text in chosen), chosen  # no site fell back


@torch.no_grad()
@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-smooth", "w8a8-outliers"])
def test_integer_products_are_in_the_compiled_code(
    recipe: str, smollm_small: Any, smollm_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dynamic and static W8A8: which kernels are called, of which source, is read off what Inductor made."""
    from torch._inductor.utils import fresh_cache, run_and_get_code

    texts = [f"{prompt} and so on, with some more words to look at." for prompt in PROMPTS]
    data = None if recipe == "w8a8" else texts
    small = fxcompress.compress(
        smollm_small, recipe, data, tokenizer=smollm_tokenizer, progress=False, verify="off"
    )
    ids = smollm_tokenizer(PROMPTS[1], return_tensors="pt").input_ids
    with fresh_cache():
        _, sources = run_and_get_code(small, input_ids=ids, use_cache=False)
    kind = "static" if recipe == "w8a8-outliers" else "dynamic"
    integer = {name: text for name, text in small.explain().items() if "-a8" in text}
    assert any(f"a8{kind}" in text for text in integer.values())
    matrices = [name for name in small.explain() if ".layers." in name]
    kept_float = sum(not small.artifact.forms[name].activation for name in matrices)
    assert len(integer) == len(matrices) - kept_float > 0
    counts = [
        sum(source.count(f"torch.ops.fxcompress_cpu.{name}.default(") for source in sources)
        for name in ("linear", "linear_residual")
    ]
    assert counts[0] >= 3  # q·k·v, gate·up of the one compiled block; the head
    assert counts[1] >= 2  # o and down
    assert all("silu + gate" in text for name, text in small.explain().items() if "gate_proj" in name)


@torch.no_grad()
def test_saved_model_generates_the_same_in_a_new_process(
    smollm_small: Any, batch: Any, tmp_path: Path
) -> None:
    small = fxcompress.compress(smollm_small, "w8a8", progress=False, verify="off")
    small.set_backend("eager")
    tokens = small.generate(**batch, max_new_tokens=5, do_sample=False).tolist()
    small.save(tmp_path / "small")
    script = (
        "import json, sys, torch, fxcompress\n"
        "small = fxcompress.load(sys.argv[1], backend='eager')\n"
        "batch = {k: torch.tensor(v) for k, v in json.loads(sys.argv[2]).items()}\n"
        "print(json.dumps(small.generate(**batch, max_new_tokens=5, do_sample=False).tolist()))\n"
    )
    inputs = json.dumps({key: value.tolist() for key, value in batch.items()})
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "small"), inputs],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout.splitlines()[-1]) == tokens


@torch.no_grad()
def test_smoothing_helps_w8a8(smollm_small: Any, smollm_tokenizer: Any) -> None:
    texts = [f"{prompt} and so on, with some more words to look at." for prompt in PROMPTS]
    ids = smollm_tokenizer(PROMPTS[1], return_tensors="pt").input_ids
    expected = smollm_small(ids).logits

    def error(recipe: str) -> float:
        data = None if recipe == "w8a8" else texts
        small = fxcompress.compress(smollm_small, recipe, data, tokenizer=smollm_tokenizer, progress=False)
        small.set_backend("eager")
        return float((small(ids).logits - expected).norm() / expected.norm())

    assert error("w8a8-smooth") < 1.05 * error("w8a8")


@torch.no_grad()
def test_gptq_on_its_own_text_is_deterministic(smollm_small: Any) -> None:
    recipe = [{"gptq": {"bits": 4, "group_size": 64, "search": False}}]
    from fxcompress.calibration.generated import generated_tokens

    data = generated_tokens(smollm_small, samples=2, length=24)
    runs = [fxcompress.compress(smollm_small, recipe, data, progress=False, verify="off") for _ in range(2)]
    forms = [run.artifact.forms for run in runs]
    assert set(forms[0]) == set(forms[1])
    for name in forms[0]:
        left, right = forms[0][name].tensors(), forms[1][name].tensors()
        assert all(torch.equal(left[key], right[key]) for key in left)


@torch.no_grad()
def test_sentence_encoder_keeps_its_embeddings(minilm: Any) -> None:
    model, tokenizer = minilm
    sentences = ["A cat sat on the mat.", "Interest rates rose again in the spring.", "How do I bake bread?"]
    inputs = dict(tokenizer(sentences, return_tensors="pt", padding=True))

    def embed(network: Any) -> torch.Tensor:
        hidden = network(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1)
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    for recipe in ("w8a8", "w8a8-smooth"):
        small = fxcompress.compress(model, recipe, [inputs], example_inputs=inputs, progress=False)
        small.set_backend("eager")
        assert float((embed(small) * embed(model)).sum(-1).min()) >= 0.99
