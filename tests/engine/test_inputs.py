from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fxcompress.calibration import as_calibration
from fxcompress.capture.export import capture_model
from fxcompress.errors import CalibrationError
from tests.engine.models import VOCABULARY, decoder, masked, tokens


class Letters:
    """A tokenizer of lower-case letters with a begin mark, as real ones have."""

    model_max_length = 1 << 60

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = [ord(c) - 96 for c in text if c.isalpha()]
        return {"input_ids": [30, *ids] if add_special_tokens else ids}


def ids_of(data: Any) -> list[list[int]]:
    return [batch.inputs[0].tolist()[0] for batch in data.batches]


def test_text_file_is_cut_into_spread_windows(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("abcdefghijklmnop" * 4)
    data = as_calibration(path, decoder(), tokenizer=Letters(), samples=2, sequence_length=9)
    assert ids_of(data) == [[30, *range(1, 9)], [30, *range(1, 9)]]
    assert data.tokens == 18
    assert data.source == "text file text.txt"
    assert (
        as_calibration(str(path), decoder(), tokenizer=Letters(), samples=2, sequence_length=9).tokens == 18
    )


def test_masks_are_made_for_text() -> None:
    data = as_calibration(["abc", "de"], masked(), tokenizer=Letters())
    assert [[v.tolist() for v in batch.inputs] for batch in data.batches] == [
        [[[30, 1, 2, 3]], [[1, 1, 1, 1]]],
        [[[30, 4, 5]], [[1, 1, 1]]],
    ]


def test_limit_of_the_tokenizer_and_of_samples() -> None:
    tokenizer = Letters()
    tokenizer.model_max_length = 3
    data = as_calibration(["abcdef"] * 5, decoder(), tokenizer=tokenizer, samples=2)
    assert ids_of(data) == [[30, 1, 2]] * 2


@pytest.mark.parametrize(
    "data",
    [
        tokens(2, 5),
        {"input_ids": tokens(2, 5)},
        (tokens(2, 5),),
        ((), {"input_ids": tokens(2, 5)}),
        [{"input_ids": row[None]} for row in tokens(2, 5)],
        [row[None] for row in tokens(2, 5)],
        lambda: iter([{"input_ids": tokens(2, 5)}]),
        DataLoader([{"input_ids": row} for row in tokens(2, 5)], batch_size=1),  # type: ignore[arg-type]
    ],
    ids=["tensor", "dict", "tuple", "args-kwargs", "dicts", "tensors", "callable", "loader"],
)
def test_all_kinds_of_data_agree(data: Any) -> None:
    made = as_calibration(data, decoder())
    assert torch.equal(torch.cat([batch.inputs[0] for batch in made.batches]), tokens(2, 5))
    assert made.tokens == 10


def test_endless_iterables_stop_at_samples() -> None:
    def forever() -> Any:
        while True:
            yield tokens(2, 4)

    assert len(as_calibration(forever, decoder(), samples=6)) == 3


class Flagged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, scale: bool = False, extra: Tensor | None = None) -> Tensor:
        y: Tensor = self.linear(x)
        return y * 2 if scale else y


def test_constants_of_the_capture_may_be_left_out() -> None:
    program = capture_model(Flagged(), (torch.randn(2, 4),), {"scale": True, "extra": None})
    assert as_calibration(torch.randn(3, 4), program).tokens == 3
    assert as_calibration({"x": torch.randn(3, 4)}, program).tokens == 3
    with pytest.raises(CalibrationError, match=r"scale.*found False, but the model was captured with True"):
        as_calibration({"x": torch.randn(3, 4), "scale": False}, program)
    with pytest.raises(CalibrationError, match="contains NaN"):
        as_calibration(torch.full((3, 4), float("nan")), program)
    with pytest.raises(CalibrationError, match=r"found torch.float64, expected torch.float32"):
        as_calibration(torch.randn(3, 4, dtype=torch.float64), program)
    with pytest.raises(CalibrationError, match=r"found shape \(1, 5\), expected \(any, 4\)"):
        as_calibration(torch.randn(3, 5), program)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "there are no data"),
        ([], "the list gave no batch"),
        ("no/such/file.txt", "is no file"),
        (["some text"], "text was given without a tokenizer"),
        ({"input_idx": tokens()}, "'input_idx' is no input.*did you mean 'input_ids'"),
        ({}, "the input 'input_ids' is missing"),
        ({"input_ids": tokens() + VOCABULARY}, r"token id \d+ is outside of embed.weight, which has 40 rows"),
        ({"input_ids": -tokens() - 1}, r"token id -\d+ is outside"),
        ({"input_ids": tokens().float()}, "found torch.float32, expected torch.int64"),
        ({"input_ids": tokens()[0]}, r"found shape \(6,\), expected \(any, any\)"),
        ({"input_ids": tokens()[:0]}, "the tensor is empty"),
        ([[tokens(), tokens()]], r"batch 1: found 2 values, the captured call takes 1.*labels"),
        ([3], "batch 1: found a int"),
        (3, "found a int"),
    ],
)
def test_unusable_data(data: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        as_calibration(data, decoder())


def test_empty_text_and_wrong_kinds(tmp_path: Path) -> None:
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text("")
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CalibrationError, match="gave no batch"):
        as_calibration(empty, decoder(), tokenizer=Letters())
    with pytest.raises(CalibrationError, match="cannot be read as UTF-8"):
        as_calibration(binary, decoder(), tokenizer=Letters())
    with pytest.raises(CalibrationError, match="gave no batch"):
        as_calibration(["", ""], decoder(), tokenizer=Letters())
    with pytest.raises(CalibrationError, match="a int among the texts"):
        as_calibration(["a", 3], decoder(), tokenizer=Letters())


def test_fingerprint_follows_the_values() -> None:
    one, same, other = (as_calibration(tokens(2, 5, seed), decoder()) for seed in (1, 1, 2))
    assert one.fingerprint() == same.fingerprint() != other.fingerprint()


def test_sample_shortens_text_only(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("abcdefghij" * 40)
    data = as_calibration(path, decoder(), tokenizer=Letters(), sequence_length=50)
    assert [batch.tokens for batch in data.sample(2, 10).batches] == [10, 10]
    assert as_calibration(data, decoder()).sample(1, 10).tokens == 10
    tensors = as_calibration(tokens(3, 50), decoder())
    assert tensors.sample(1, 10).tokens == 50
