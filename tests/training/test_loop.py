"""The loop: what it learns, how it stops, goes on, splits its work and refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fxcompress.calibration.plan import Plan
from fxcompress.capture import capture_model
from fxcompress.edits import CompressionState
from fxcompress.errors import CalibrationError, TrainingError
from fxcompress.progress import ProgressEvent
from fxcompress.training.catalogue import objective_from
from fxcompress.training.data import SelfGenerated, as_training
from fxcompress.training.graph import TrainingGraph
from fxcompress.training.loop import train
from fxcompress.training.objectives import Cakld, Kd
from fxcompress.training.options import TrainingOptions
from fxcompress.training.result import TrainingResult
from fxcompress.training.sampling import Sampler
from tests.engine.models import VOCABULARY, Decoder, build, decoder, tokens
from tests.training.cases import call, compressed, graph, rows, teacher

W3 = {"quantize-weights": {"bits": 3, "group_size": 8}}


def run(trained: TrainingGraph | None = None, objective: Any = "kd", **settings: Any) -> TrainingResult:
    extra = {k: settings.pop(k) for k in ("evaluation", "checkpoint", "progress", "longest") if k in settings}
    options = TrainingOptions(**{"steps": 12, "batch_size": 4, "learning_rate": 3e-3, **settings})
    data = rows()
    return train(
        trained or graph(compressed(W3)), teacher(), data, objective_from(objective), options, **extra
    )


def parameters(trained: TrainingGraph) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trained.parameters()]


@pytest.mark.parametrize(
    "objective",
    [
        "ce",
        {"kd": {"hard_ratio": 0.5, "temperature": 2.0}},
        "reverse-kl",
        {"skew-kl": {"reverse": True}},
        {"gkd": {"new_tokens": 4}},
        "cakld",
        {"minillm": {"new_tokens": 4}},
        {"kd": {}, "hidden": {"weight": 0.5}},
        {"ted": {"filter_steps": 4}},
    ],
)
def test_every_objective_lowers_what_it_is_judged_by(objective: Any) -> None:
    learned, held = rows().split(0.25)
    data = {"steps": 20, "batch_size": 4, "learning_rate": 3e-3, "evaluate_every": 10}
    result = train(
        graph(compressed(W3), "weights", "embeddings"),
        teacher(),
        learned,
        objective_from(objective),
        TrainingOptions(**data),
        evaluation=held,
    )
    looks = [loss for _, loss in result.held_out]
    assert min(looks) < 0.97 * looks[0]
    assert len(result.losses) == 20
    assert result.tokens > 0


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    whole = graph(compressed(W3), "weights", "lora")
    first = run(whole, {"gkd": {"new_tokens": 3}}, checkpoint_every=4, evaluation=rows(3))

    class KilledError(Exception):
        pass

    def kill(event: ProgressEvent) -> None:
        if event.stage == "distill" and event.done == 6:
            raise KilledError

    options: dict[str, Any] = {"checkpoint_every": 4, "checkpoint": tmp_path, "evaluation": rows(3)}
    with pytest.raises(KilledError):
        run(graph(compressed(W3), "weights", "lora"), {"gkd": {"new_tokens": 3}}, progress=kill, **options)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step-00000004"]
    again = graph(compressed(W3), "weights", "lora")
    second = run(again, {"gkd": {"new_tokens": 3}}, **options)
    assert second.losses == first.losses
    assert second.held_out == first.held_out
    assert all(torch.equal(a, b) for a, b in zip(parameters(whole), parameters(again), strict=True))
    assert {p.suffix for p in tmp_path.rglob("*") if p.is_file()} == {".json", ".safetensors"}


def test_a_checkpoint_of_another_run_or_damaged_is_refused(tmp_path: Path) -> None:
    run(checkpoint=tmp_path, steps=2)
    with pytest.raises(TrainingError, match="other data, options or models"):
        run(checkpoint=tmp_path, steps=2, learning_rate=1e-3)
    newest = sorted(tmp_path.iterdir())[-1]
    (newest / "optimizer.safetensors").write_bytes(b"nonsense")
    with pytest.raises(TrainingError, match="is damaged"):
        run(checkpoint=tmp_path, steps=2)


def test_a_loss_that_is_no_number_stops_before_the_update(tmp_path: Path) -> None:
    trained = graph(compressed(W3), "lora")
    run(trained, checkpoint=tmp_path, steps=4, checkpoint_every=2)
    before = parameters(trained)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"step 1: the loss is nan; its update was not made"):
        run(trained)
    broken = graph(compressed(W3), "lora")

    def poison(event: ProgressEvent) -> None:
        if event.stage == "distill" and event.done == 5:
            with torch.no_grad():
                next(iter(broken.parameters())).fill_(float("inf"))

    other = tmp_path / "other"
    with pytest.raises(TrainingError, match=r"step 6: .* last good checkpoint is .*step-00000004"):
        run(broken, checkpoint=other, steps=8, checkpoint_every=4, progress=poison)
    assert (other / "step-00000004" / "state.json").is_file()
    assert all(torch.isfinite(p).all() for p in before)


def test_early_stopping_keeps_the_best_look() -> None:
    trained = graph(compressed(W3), "lora")
    start = parameters(trained)
    data = {
        "steps": 50,
        "learning_rate": 3.0,
        "warmup": 0.0,
        "evaluate_every": 1,
        "patience": 2,
        "clip_norm": 0.0,
    }
    result = run(trained, "kd", evaluation=rows(4), **data)
    assert result.stopped
    assert result.steps == 2
    assert result.best == 0
    assert all(torch.equal(a, b) for a, b in zip(start, parameters(trained), strict=True))


def test_how_a_step_is_split_changes_nothing() -> None:
    states = []
    for accumulation in (1, 4):
        trained = graph(compressed(W3))
        result = run(trained, {"gkd": {"new_tokens": 3}}, accumulation=accumulation, steps=4)
        states.append((result.losses, parameters(trained)))
    (first, a), (second, b) = states
    assert first == pytest.approx(second, rel=1e-5)
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(a, b, strict=True))


def report(checkpoint: str) -> list[Any]:
    """What the same short run gives, in however many processes it is called."""
    trained = graph(compressed(W3), "weights", "lora")
    result = run(trained, {"gkd": {"new_tokens": 3}}, steps=4, evaluation=rows(5), checkpoint=checkpoint)
    total = sum(float(p.detach().double().sum()) for p in trained.parameters())
    return [result.losses, result.held_out, total]


def shard(accelerator: Any, learner: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """What Accelerate does for FSDP2, which it offers on devices only."""
    from torch.distributed.fsdp import fully_shard

    names = {parameter: name for name, parameter in learner.named_parameters()}
    groups = [{**group, "params": [names[p] for p in group["params"]]} for group in optimizer.param_groups]
    model = fully_shard(learner)
    shards = dict(model.named_parameters())
    assert all(hasattr(value, "full_tensor") for value in shards.values())
    return model, torch.optim.AdamW([{**g, "params": [shards[n] for n in g["params"]]} for g in groups])


def report_sharded(checkpoint: str) -> list[Any]:
    """As :func:`report`, with sharded parameters, and once more from the last snapshot but one."""
    import accelerate

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accelerate.Accelerator, "prepare", shard)
        first = report(checkpoint)
        torch.distributed.barrier()
        if os.environ["RANK"] == "0":
            shutil.rmtree(sorted(Path(checkpoint).glob("step-*"))[-1])
        torch.distributed.barrier()
        assert report(checkpoint) == first
    return first


@pytest.mark.parametrize("function", ["report", "report_sharded"])
def test_two_processes_learn_what_one_learns(tmp_path: Path, function: str) -> None:
    script = tmp_path / "work.py"
    script.write_text(
        "import json, os, sys, torch\n"
        "torch.set_num_threads(1)\n"
        f"from tests.training.test_loop import {function}\n"
        f"found = {function}(sys.argv[1])\n"
        "open(f'{sys.argv[1]}/out-{os.environ[\"RANK\"]}', 'w').write(json.dumps(found))\n",
        encoding="utf-8",
    )
    root, folder = Path(__file__).parents[2], tmp_path / "two"
    folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(script), str(folder)]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (json.loads(path.read_text()) for path in sorted(folder.glob("out-*")))
    losses, looks, total = report(str(tmp_path / "one"))
    assert first == second
    assert first[0] == pytest.approx(losses, rel=1e-4)
    assert [loss for _, loss in first[1]] == pytest.approx([loss for _, loss in looks], rel=1e-4)
    assert first[2] == pytest.approx(total, rel=1e-3)


def test_kept_outcomes_teach_like_the_teacher(tmp_path: Path) -> None:
    full = run(steps=4)
    kept = run(steps=4, top_k=VOCABULARY, checkpoint=tmp_path)
    assert kept.losses == pytest.approx(full.losses, rel=1e-3)
    assert len(list(tmp_path.glob("teacher-*.safetensors"))) == 1
    few = run(steps=4, top_k=8)
    assert few.losses[0] < full.losses[0]
    with pytest.raises(TrainingError, match="asks it for more"):
        run(None, "gkd", top_k=8)


def test_logs_and_precision(tmp_path: Path) -> None:
    result = run(steps=3, precision="bf16", log_dir=str(tmp_path), evaluation=rows(2))
    assert len(result.losses) == 3
    assert list(tmp_path.rglob("events.out.tfevents.*"))


def test_samples_follow_the_distribution_and_not_the_batch() -> None:
    model = teacher()
    data = rows(4, 3)
    sampler = Sampler(model, None, 0, 7, None)
    options: dict[str, Any] = {"new_tokens": 2, "temperature": 1.0, "teacher_share": 0.0}
    drawn = sampler.sample(data.batch([0, 1, 2, 3]), **options)
    alone = sampler.sample(data.batch([2]), **options)
    assert torch.equal(drawn.tokens[2], alone.tokens[0])
    assert drawn.labels is not None
    assert drawn.labels[:, 0].tolist() == [-100] * 4  # half of three tokens are the prompt
    counts = torch.zeros(VOCABULARY)
    for step in range(300):
        one = Sampler(model, None, 0, step, None).sample(data.batch([0]), **{**options, "new_tokens": 1})
        counts[one.tokens[0, -1]] += 1
    with torch.no_grad():
        wanted = torch.softmax(model(call(drawn.tokens[:1, :1])).scores[0, -1], -1)
    assert float((counts / 300 - wanted).abs().max()) < 0.1
    with pytest.raises(TrainingError, match="leaves no room"):
        Sampler(model, None, 0, 0, 1).sample(data.batch([0]), **options)


def test_padding_and_labels_decide_what_is_learned() -> None:
    items = [{"input_ids": tokens(1, n, seed=n), "labels": tokens(1, n, seed=n)} for n in (4, 7)]
    items[0]["labels"][:, :2] = -100
    data = as_training(items, decoder())
    batch = data.batch([0, 1])
    assert batch.tokens.shape == (2, 7)
    assert batch.labels is not None
    assert (batch.labels[0] != -100).tolist() == [False, False, True, True, False, False, False]
    losses = [
        train(
            graph(compressed(W3)),
            None,
            as_training(items, decoder()),
            objective_from("ce"),
            TrainingOptions(steps=1, batch_size=2),
        ).losses[0]
    ]
    with torch.no_grad():
        total, count = 0.0, 0
        for item in items:
            logits = graph(compressed(W3))(call(item["input_ids"])).scores[0, :-1]
            labels = item["labels"][0, 1:]
            kept = labels != -100
            total += float(torch.nn.functional.cross_entropy(logits[kept], labels[kept], reduction="sum"))
            count += int(kept.sum())
    assert losses[0] == pytest.approx(total / count, rel=1e-4)


def test_bad_input_is_refused_before_any_work() -> None:
    with pytest.raises(CalibrationError, match="gave no batch"):
        as_training([], decoder())
    with pytest.raises(TrainingError, match="sequence of 12 tokens, the model takes at most 8"):
        as_training([tokens(1, 12)], decoder(), longest=8)
    with pytest.raises(CalibrationError, match="cannot be held out"):
        rows(1).split(0.5)
    with pytest.raises(TrainingError, match="batch_size=5"):
        run(batch_size=5, accumulation=2)
    with pytest.raises(TrainingError, match="needs a teacher"):
        train(graph(compressed(W3)), None, rows(), Kd(), TrainingOptions(steps=1))
    with pytest.raises(TrainingError, match="cannot generate"):
        SelfGenerated()(build(), None)
    small = Decoder().eval().requires_grad_(False)
    small.head = torch.nn.Linear(16, VOCABULARY - 3, bias=False)
    program = capture_model(small, kwargs={"input_ids": tokens()})
    other = TrainingGraph(Plan(program), CompressionState(program.weights), None)
    with pytest.raises(TrainingError, match=f"scores {VOCABULARY - 3} tokens, the student {VOCABULARY}"):
        train(graph(compressed(W3)), other, rows(), Cakld(), TrainingOptions(steps=1))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("steps", 0),
        ("learning_rate", -1.0),
        ("warmup", 1.0),
        ("schedule", "step"),
        ("patience", 0),
        ("top_k", -1),
    ],
)
def test_options_out_of_range_are_refused(option: str, value: Any) -> None:
    with pytest.raises(TrainingError, match=f"{option}="):
        TrainingOptions(**{option: value})


def test_rates_follow_their_schedule() -> None:
    options = TrainingOptions(steps=10, learning_rate=1.0, warmup=0.2, schedule="linear")
    assert [round(options.rate(s), 3) for s in range(10)] == [
        0.5,
        1.0,
        *(round(1 - i / 8, 3) for i in range(8)),
    ]
    cosine = TrainingOptions(steps=4, learning_rate=1.0, warmup=0.0)
    assert [round(cosine.rate(s), 3) for s in range(4)] == [1.0, 0.854, 0.5, 0.146]
