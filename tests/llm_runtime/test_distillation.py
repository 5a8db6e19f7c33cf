"""Distillation: the loss by hand, a weight of 0 that changes nothing, and runs that go on with their own teacher."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from live_runs import LLAMA, advance, case, live_run, same_bits, weights
from torch import Tensor
from torch.nn import functional as F

import trainpilot
from trainpilot.llm_runtime.config import RunConfig
from trainpilot.llm_runtime.data.text_sources import content_digest
from trainpilot.llm_runtime.distillation import Teacher, distillation_loss
from trainpilot.llm_runtime.models import load_model

LARGER = LLAMA | {"hidden_size": 32, "intermediate_size": 48}


@pytest.fixture(scope="module")
def school(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a model with new weights."""
    place = tmp_path_factory.mktemp("school")
    load_model(case(place, LARGER).model, 7).save(place / "teacher")
    return place / "teacher"


@pytest.fixture
def teacher(tmp_path: Path, school: Path) -> Path:
    """Return a copy of that folder, which a test may change."""
    return Path(shutil.copytree(school, tmp_path / "teacher"))


def logits(*rows: tuple[float, ...]) -> Tensor:
    return torch.tensor(rows, requires_grad=True)


def test_the_loss_by_hand() -> None:
    # The student says 1/2, 1/2 and the teacher 3/4, 1/4: KL = 3/4 ln(3/2) + 1/4 ln(1/2).
    student, teacher = logits((0.0, 0.0)), logits((math.log(3), 0.0))
    divergence = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)

    found = distillation_loss(student, teacher, torch.tensor([0]), weight=0.25)

    assert found.item() == pytest.approx(0.75 * math.log(2) + 0.25 * divergence)
    torch.autograd.backward(found)
    assert student.grad is not None
    assert student.grad[0, 0] == pytest.approx(0.75 * -0.5 + 0.25 * (0.5 - 0.75))
    assert teacher.grad is None


def test_temperature_softens_both_and_is_made_good_by_its_square() -> None:
    student, teacher = logits((0.0, 0.0)), logits((2 * math.log(3), 0.0))  # over 2: as above
    divergence = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)

    found = distillation_loss(student, teacher, torch.tensor([1]), weight=1.0, temperature=2.0)

    assert found.item() == pytest.approx(4 * divergence)


def test_positions_without_a_label_do_not_count() -> None:
    student, teacher = logits((1.0, 0.0), (0.0, 5.0)), logits((0.0, 1.0), (9.0, 0.0))
    first = distillation_loss(student[:1], teacher[:1], torch.tensor([1]))

    assert distillation_loss(student, teacher, torch.tensor([1, -100])).item() == pytest.approx(first.item())


def test_a_weight_of_zero_is_the_cross_entropy_to_the_last_bit() -> None:
    student = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[0, 1, 2], [3, 4, 0]])

    found = trainpilot.distillation_loss(student, torch.full_like(student, math.nan), labels, weight=0)

    assert torch.equal(found, F.cross_entropy(student.flatten(0, 1), labels.flatten()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": 1.5}, r"weight must be in \[0, 1\], got 1.5"),
        ({"temperature": 0.0}, "temperature must be a positive number, got 0.0"),
        ({"teacher_logits": torch.zeros(4, 6)}, r"shape of student_logits \(4, 5\), got \(4, 6\).*same vocabulary"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, r"labels must have the shape \(4,\).*got \(3,\)"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], message: str) -> None:
    fitting: dict[str, Any] = {
        "student_logits": torch.zeros(4, 5),
        "teacher_logits": torch.zeros(4, 5),
        "labels": torch.zeros(4, dtype=torch.long),
    }
    with pytest.raises(ValueError, match=message):
        distillation_loss(**(fitting | changes))


def test_a_run_with_weight_zero_is_one_without_teacher(tmp_path: Path, teacher: Path) -> None:
    plain = live_run(case(tmp_path))
    without = live_run(case(tmp_path, teacher=str(teacher), distillation_weight=0.0))
    for run in (plain, without):
        advance(run)
    assert same_bits(weights(plain), weights(without))


def test_a_step_follows_the_mixture_and_reports_cross_entropy(tmp_path: Path, teacher: Path) -> None:
    run = live_run(case(tmp_path, teacher=str(teacher), distillation_weight=0.25, distillation_temperature=2.0))
    sequences = run.stream.peek(4)
    run.trainer.micro_batch_size = 3  # parts of different sizes
    batch = torch.from_numpy(sequences)
    model, inputs, labels = run.loaded.model, batch[:, :-1], batch[:, 1:]
    asked = run.trainer.teacher
    assert asked is not None
    given = model(input_ids=inputs).logits
    expected = distillation_loss(given, asked.model(input_ids=inputs).logits, labels, 0.25, 2.0)
    torch.autograd.backward(expected)
    wanted = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()

    loss = run.trainer._gradient(batch, "fp32")

    found = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    cross_entropy = F.cross_entropy(given.flatten(0, 1), labels.flatten())
    assert loss.item() == pytest.approx(cross_entropy.item(), rel=1e-5)
    assert run.trainer.evaluate(sequences) == pytest.approx(cross_entropy.item(), rel=1e-5)


def test_the_teacher_stays_as_it_is_without_dropout_or_gradients(tmp_path: Path, teacher: Path) -> None:
    run = live_run(case(tmp_path, teacher=str(teacher)))
    asked = run.trainer.teacher
    assert asked is not None
    before = {name: tensor.clone() for name, tensor in asked.model.state_dict().items()}
    plain = live_run(case(tmp_path))
    assert same_bits(weights(plain), weights(run))  # reading it draws no random numbers of the run

    advance(run)
    advance(plain)

    assert same_bits(before, asked.model.state_dict())
    assert not asked.model.training
    assert all(p.grad is None and not p.requires_grad for p in asked.model.parameters())
    assert not same_bits(weights(plain), weights(run))


def test_the_teacher_keeps_its_own_number_format(tmp_path: Path, teacher: Path) -> None:
    student = load_model(case(tmp_path).model, 0)
    loaded = Teacher.load(str(teacher), student, torch.device("cpu"), 0.5, 1.0)
    loaded.model.bfloat16().save_pretrained(teacher)

    again = Teacher.load(str(teacher), student, torch.device("cpu"), 0.5, 1.0)

    with torch.autocast("cpu", dtype=torch.float16):
        assert again.logits(torch.zeros((1, 3), dtype=torch.long)).dtype == torch.bfloat16
    assert again.digest != loaded.digest


def test_a_restored_run_goes_on_bit_for_bit_with_its_teacher(tmp_path: Path, teacher: Path) -> None:
    config = case(tmp_path, teacher=str(teacher))
    whole = live_run(config)
    advance(whole)
    snapshot = whole.snapshot()
    advance(whole)

    moved = tmp_path / "moved"
    shutil.copytree(teacher, moved / "model")  # as a finished run leaves it
    resumed = live_run(replace(config, teacher=str(moved)))
    resumed.check_snapshot(snapshot)
    resumed.restore(snapshot)
    advance(resumed)

    assert same_bits(weights(whole), weights(resumed))
    assert content_digest(config) == content_digest(replace(config, teacher=str(moved)))


def test_a_run_does_not_go_on_with_another_teacher(tmp_path: Path, teacher: Path) -> None:
    config = case(tmp_path, teacher=str(teacher))
    run = live_run(config)
    snapshot, digest = run.snapshot(), content_digest(config)
    with pytest.raises(ValueError, match=r"teacher must be the one that the run began with, '.*', got None"):
        live_run(case(tmp_path)).check_snapshot(snapshot)
    assert run.trainer.teacher is not None
    with torch.no_grad():
        next(run.trainer.teacher.model.parameters()).mul_(2)
    run.trainer.teacher.model.save_pretrained(teacher)

    with pytest.raises(ValueError, match="teacher must be the one"):
        live_run(config).check_snapshot(snapshot)
    assert content_digest(config) != digest


def test_teachers_that_cannot_teach_are_refused_in_one_line(tmp_path: Path, teacher: Path) -> None:
    def refused(name: str, **options: Any) -> str:
        with pytest.raises(ValueError, match=r"^teacher") as caught:
            live_run(case(tmp_path, teacher=name, **options))
        return str(caught.value)

    assert "must be a model folder with weights" in refused(str(tmp_path / "nowhere"))
    assert "must be a model folder with weights" in refused(str(tmp_path))
    assert "vocabulary of the model that learns from it, 300 tokens, got 256" in refused(str(teacher), vocabulary=300)
    (teacher / "config.json").write_text("{")
    assert "not readable JSON" in refused(str(teacher))


def test_a_trained_vocabulary_must_be_the_same(tmp_path: Path) -> None:
    learned = live_run(case(tmp_path, LARGER, vocabulary=300))
    learned.save(tmp_path / "teacher")

    run = live_run(case(tmp_path, teacher=str(tmp_path / "teacher"), vocabulary=300))
    assert np.isfinite(advance(run).train_loss)

    other = tmp_path / "other.txt"
    other.write_text("another text with other words for other pairs of letters 0123456789\n" * 300, encoding="utf-8")
    config = replace(run.config, text=(str(other),))
    with pytest.raises(ValueError, match="teacher must have the tokenizer of the model"):
        live_run(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": " "}, "teacher must name a folder, got ' '"),
        ({"distillation_weight": 0.2}, "distillation_weight must be left out without a teacher, got 0.2"),
        ({"distillation_temperature": 2.0}, "distillation_temperature must be left out without a teacher, got 2.0"),
        ({"teacher": "x", "distillation_weight": 1.1}, r"distillation_weight must be in \[0, 1\], got 1.1"),
        ({"teacher": "x", "distillation_temperature": 0.0}, "distillation_temperature must be a positive number"),
    ],
)
def test_settings_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunConfig(**options)


def test_runs_without_teacher_are_written_as_before() -> None:
    assert not {"teacher", "distillation_weight", "distillation_temperature"} & RunConfig().settings().keys()
    assert RunConfig(teacher="x").settings()["teacher"] == "x"
