"""Quality measures against values worked out by hand or by another formula."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxcompress.errors import CalibrationError
from fxcompress.evaluate import agreement, call_model, perplexity, similarity, text_windows
from fxcompress.progress import ProgressEvent
from tests.zoo import ZOO

VOCABULARY = 11


class Bigram(nn.Module):
    """Next-token logits are a row of a table."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(VOCABULARY, VOCABULARY, generator=generator))

    def forward(self, ids: Tensor) -> Tensor:
        return self.table[ids]


def windows(count: int = 5, length: int = 300) -> Tensor:
    return torch.randint(VOCABULARY, (count, length), generator=torch.Generator().manual_seed(1))


def characters(text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
    assert not add_special_tokens
    return {"input_ids": [ord(c) for c in text]}


def test_uniform_model_has_the_perplexity_of_its_vocabulary() -> None:
    found = perplexity(lambda ids: torch.zeros(*ids.shape, VOCABULARY), windows())
    assert found.perplexity == pytest.approx(VOCABULARY, rel=1e-6)
    assert found.loss == pytest.approx(math.log(VOCABULARY), rel=1e-6)
    assert (found.window, found.windows, found.tokens) == (300, 5, 5 * 299)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_perplexity_is_that_of_the_formula(batch: int) -> None:
    model, ids = Bigram(), windows()
    rows = model.table.detach().double().log_softmax(-1)
    expected = -rows[ids[:, :-1], ids[:, 1:]].mean()
    assert perplexity(model, ids, batch=batch).loss == pytest.approx(float(expected), rel=1e-6)


def test_broken_model_is_seen() -> None:
    found = perplexity(lambda ids: torch.full((*ids.shape, VOCABULARY), math.nan), windows())
    assert math.isnan(found.perplexity)
    assert found.to_dict()["perplexity"] is None
    certain = torch.full((VOCABULARY,), -1e30)
    certain[0] = 0
    assert math.isinf(perplexity(lambda ids: certain.expand(*ids.shape, -1), windows()).perplexity)


def test_agreement_with_itself_is_perfect() -> None:
    found = agreement(Bigram(), Bigram(), windows())
    assert (found.kl, found.top1) == (pytest.approx(0, abs=1e-7), 1.0)
    assert found.to_dict() == {
        "kl": found.kl,
        "kl_max": found.kl_max,
        "top1": 1.0,
        "window": 300,
        "windows": 5,
    }


def test_agreement_is_that_of_the_formula() -> None:
    model, reference, ids = Bigram(1), Bigram(2), windows()
    p, q = (m.table.detach().double().log_softmax(-1)[ids] for m in (reference, model))
    kl = (p.exp() * (p - q)).sum(-1)
    found = agreement(model, reference, ids)
    assert found.kl == pytest.approx(float(kl.mean()), rel=1e-5)
    assert found.kl_max == pytest.approx(float(kl.max()), rel=1e-5)
    assert found.top1 == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))


def test_different_vocabularies_are_refused() -> None:
    with pytest.raises(CalibrationError, match=r"\(1, 300, 11\).*\(1, 300, 5\) \(reference\)"):
        agreement(Bigram(), lambda ids: torch.zeros(*ids.shape, 5), windows())


def test_similarity_leaves_out_masked_positions() -> None:
    mask = torch.tensor([[1, 1, 0]])
    item = {"x": torch.eye(3)[None], "attention_mask": mask}

    def reference(x: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        return {"pooled": x[0], "last_hidden_state": x}

    def model(x: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        return {"last_hidden_state": x * torch.tensor([[[2.0], [1.0], [-1.0]]])}

    found = similarity(model, reference, [item])
    assert (found.mean, found.worst, found.vectors) == (pytest.approx(1), pytest.approx(1), 2)
    with pytest.raises(CalibrationError, match="no inputs"):
        similarity(model, reference, [])


def test_similarity_of_an_encoder() -> None:
    entry = ZOO["bert"]
    items = [entry.inputs(), entry.inputs(1, 5)]
    found = similarity(entry.build(), entry.build(), items)
    assert found.worst == pytest.approx(1)
    assert found.vectors == sum(int(item["attention_mask"].sum()) for item in items)


def test_hugging_face_model_is_called_without_a_cache() -> None:
    entry = ZOO["gpt2-odd"]
    model = entry.build()
    seen: list[dict[str, Any]] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    ids = entry.inputs(2, 8)["input_ids"]
    expected = model(input_ids=ids, labels=ids).loss
    assert perplexity(model, ids).loss == pytest.approx(float(expected.detach()), rel=1e-5)
    assert set(seen[-1]) == {"input_ids", "use_cache"}


def test_wrappers_are_looked_through() -> None:
    class Wrapper:
        def __init__(self) -> None:
            self.model = Bigram()

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self.model(*args, **kwargs)

    ids = windows()
    assert perplexity(Wrapper(), ids) == perplexity(Bigram(), ids)


def test_items_of_every_kind() -> None:
    def model(x: Tensor, y: Tensor | int = 0, *, flag: bool = False) -> tuple[Tensor, bool]:
        return x + y, flag

    x = torch.ones(2)
    assert torch.equal(call_model(model, x)[0], x)
    assert torch.equal(call_model(model, (x, x))[0], x + x)
    assert call_model(model, {"x": x}, flag=True, unknown=1)[1]


@pytest.mark.parametrize(
    "bad", [torch.zeros(3, 4), torch.zeros(4, dtype=torch.int64), torch.zeros(2, 1, dtype=torch.int64)]
)
def test_wrong_windows_are_refused(bad: Tensor) -> None:
    with pytest.raises(CalibrationError, match="expected \\[W, T"):
        perplexity(Bigram(), bad)


def test_wrong_output_is_refused() -> None:
    with pytest.raises(CalibrationError, match="causal language model"):
        perplexity(lambda ids: ids.float(), windows())
    with pytest.raises(CalibrationError, match="holds no tensor"):
        perplexity(lambda ids: "text", windows())


def test_windows_cover_the_text_without_overlap() -> None:
    found = text_windows("abcdefghijk", characters, length=3)
    assert found.tolist() == [[97, 98, 99], [100, 101, 102], [103, 104, 105]]
    spread = text_windows("abcdefghijk", characters, length=2, windows=2)
    assert ["".join(map(chr, row)) for row in spread.tolist()] == ["ab", "ef"]


@pytest.mark.parametrize(
    ("text", "windows", "length"),
    [("", None, 4), ("abc", None, 4), ("abcdefgh", 3, 4), ("abc", 0, 2), ("abc", None, 1)],
)
def test_texts_that_are_too_short_are_refused(text: str, windows: int | None, length: int) -> None:
    with pytest.raises(CalibrationError, match="evaluation"):
        text_windows(text, characters, length=length, windows=windows)


def test_progress_is_told() -> None:
    events: list[ProgressEvent] = []
    perplexity(Bigram(), windows(), batch=2, progress=events.append)
    assert [(event.done, event.total) for event in events] == [(1, 3), (2, 3), (3, 3)]
