"""A run under its starting controls is nothing but a plain PyTorch loop, and looking at it changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from live_runs import GPT2, LLAMA, case, live_run
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from trainpilot.llm_runtime.live_run import LiveRun

SEED = 3
EPSILON = torch.finfo(torch.float32).eps
STEPS, BATCH, LENGTH = 200, 2, 16
PEAK, CLIP, DECAY = 1e-2, 0.5, 0.1
BUDGET = STEPS * BATCH * LENGTH  # tokens
WARMUP = BUDGET // 50  # 128 tokens: four steps

MODELS: dict[str, dict[str, Any]] = {"llama": LLAMA, "gpt2": GPT2}


def plain_model(family: str) -> nn.Module:
    options = {key: value for key, value in MODELS[family].items() if key != "model_type"}
    options |= {"vocab_size": 256, "bos_token_id": None, "eos_token_id": None}
    torch.manual_seed(SEED)
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**options))
    return GPT2LMHeadModel(GPT2Config(**options))


def plain_batches(ids: np.ndarray) -> list[torch.Tensor]:
    """Cut windows of T + 1 ids with stride T, and shuffle those of each epoch by (seed, epoch)."""
    windows = [ids[i : i + LENGTH + 1] for i in range(0, len(ids) - LENGTH, LENGTH)]
    assert len(windows) < STEPS * BATCH, "the run should see a second epoch"
    order: list[int] = []
    for epoch in range(2):
        order += np.random.default_rng([SEED, epoch]).permutation(len(windows)).tolist()
    rows = [torch.from_numpy(windows[i].astype(np.int64)) for i in order]
    return [torch.stack(rows[i : i + BATCH]) for i in range(0, STEPS * BATCH, BATCH)]


def plain_learning_rate(step: int) -> float:
    before, after = step * BATCH * LENGTH, (step + 1) * BATCH * LENGTH
    if after < WARMUP:
        return PEAK * after / WARMUP
    return PEAK * min(1.0, 1 - (before - WARMUP) / (BUDGET - WARMUP))


def plain_losses(family: str, ids: np.ndarray) -> list[float]:
    model = plain_model(family).train()
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.95), eps=1e-8)
    losses = []
    for step, batch in enumerate(plain_batches(ids)):
        for group in optimizer.param_groups:
            group["lr"] = plain_learning_rate(step)
        optimizer.zero_grad()
        logits = model(input_ids=batch[:, :-1]).logits
        loss = nn.functional.cross_entropy(logits.reshape(-1, 256), batch[:, 1:].reshape(-1))
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        losses.append(loss.item())
    return losses


def losses_of(run: LiveRun, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    losses: list[float] = []
    step = run.trainer.step

    def recorded(sequences: np.ndarray) -> Any:
        record = step(sequences)
        losses.append(record.loss.item())
        return record

    monkeypatch.setattr(run.trainer, "step", recorded)
    while not run.finished:
        run.advance(run.config.start(), 1 / run.config.decisions)
    return losses


@pytest.mark.parametrize("probe", [False, True], ids=["plain", "probed"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_neutral_run_is_the_plain_loop(
    family: str, probe: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"tokens": BUDGET, "batch_size": BATCH, "sequence_length": LENGTH, "base_learning_rate": PEAK}
    config = case(tmp_path, MODELS[family], seed=SEED, gradient_clip=CLIP, weight_decay=DECAY, **options)
    run = live_run(config, probe=probe)
    assert config.base_schedule().warmup_tokens == WARMUP

    losses = losses_of(run, monkeypatch)

    expected = plain_losses(family, np.array(run.corpus.train))
    assert len(losses) == STEPS
    for step, (loss, plain) in enumerate(zip(losses, expected, strict=True)):
        # Fused and looped AdamW round differently, each CPU in its own way: two float32 roundings per step.
        assert loss == pytest.approx(plain, rel=2 * (step + 1) * EPSILON), f"step {step}"
    assert losses[-1] < losses[0] - 1.0


def test_looking_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = case(tmp_path, GPT2 | {"resid_pdrop": 0.1})
    looked_at, left_alone = live_run(config, probe=True), live_run(config)
    looked_at.limits()
    losses = []
    while not looked_at.finished:
        torch.rand(3)  # someone else draws random numbers
        losses.append(looked_at.advance(config.start(), 0.1).train_loss)
        if len(losses) in (1, 5):
            looked_at.evaluate()
            looked_at.test()
        looked_at.limits()
        looked_at.snapshot()

    expected = [left_alone.advance(config.start(), 0.1).train_loss for _ in range(10)]

    assert losses == expected


def test_run_leaves_the_random_numbers_of_others_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(4)

    torch.manual_seed(5)
    run = live_run(case(tmp_path, GPT2 | {"resid_pdrop": 0.1}), probe=True)
    run.advance(run.config.start(), 0.1)
    run.limits()

    assert torch.equal(torch.rand(4), expected)
