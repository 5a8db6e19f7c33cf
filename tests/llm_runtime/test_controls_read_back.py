"""Every control is read back where it works: in the optimiser, the stream, the matrix products and the weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from live_runs import GPT2, LLAMA, advance, case, live_run, same_bits, weights
from pruning_models import layers
from torch import Tensor, nn

from trainpilot.llm_runtime.config import Controls, Precision
from trainpilot.llm_runtime.data.batches import fixed_batch
from trainpilot.llm_runtime.live_run import LiveRun
from trainpilot.llm_runtime.optimizer import update_direction

PEAK = 1e-2  # of the base schedule
TOKENS, WARMUP = 3_200, 64  # budget, and 2 % of it


def position(run: LiveRun) -> int:
    """Return the sequences taken from the corpus."""
    return run.stream.state_dict()["position"]


def rate(run: LiveRun) -> float:
    (learning_rate,) = {group["lr"] for group in run.trainer.optimizer.param_groups}
    return float(learning_rate)


def decay(run: LiveRun) -> float:
    (beta2,) = {group["betas"][1] for group in run.trainer.optimizer.param_groups}
    return float(beta2)


def step_counts(run: LiveRun) -> set[float]:
    return {float(state["step"]) for state in run.trainer.optimizer.state.values()}


def matrices(run: LiveRun) -> list[Tensor]:
    """Return the matrices of the blocks, by the names that LLaMA gives them."""
    named = run.loaded.model.named_parameters()
    return [p.detach() for name, p in named if ".layers." in name and name.endswith("_proj.weight")]


def output_head(run: LiveRun) -> nn.Module:
    return run.loaded.model.get_submodule("lm_head")


def zero_share(run: LiveRun) -> float:
    zeros = sum(int((matrix == 0).sum()) for matrix in matrices(run))
    return zeros / sum(matrix.numel() for matrix in matrices(run))


# Learning rate ----------------------------------------------------------------------------------------------


def test_learning_rate_by_hand(tmp_path: Path) -> None:
    run = live_run(case(tmp_path))

    telemetry = advance(run, learning_rate_scale=0.5)

    # The tenth step of 32 tokens begins after 288: (288 - 64) / (3200 - 64) = 1/14 of the decay is gone.
    expected = PEAK * 0.5 * (1 - 1 / 14)
    assert rate(run) == pytest.approx(expected, rel=1e-12)
    assert telemetry.learning_rate == pytest.approx(expected, rel=1e-12)


def test_learning_rate_in_warm_up(tmp_path: Path) -> None:
    run = live_run(case(tmp_path, warmup_tokens=640))

    telemetry = advance(run)

    # The tenth step ends after 320 of 640 tokens of warm-up.
    assert rate(run) == pytest.approx(PEAK / 2)
    assert telemetry.learning_rate == pytest.approx(PEAK / 2)


def test_scale_zero_stands_still(tmp_path: Path) -> None:
    run = live_run(case(tmp_path))
    advance(run)
    before = weights(run)

    assert advance(run, learning_rate_scale=0.0).learning_rate == 0.0

    assert same_bits(weights(run), before)


# Batch ------------------------------------------------------------------------------------------------------


def test_batch_counted_in_consumed_tokens(tmp_path: Path) -> None:
    run = live_run(case(tmp_path))
    # Borders lie at every 20 of the 200 sequences. A batch that reaches beyond one is taken whole, and the next
    # interval gets less; only the end of the budget cuts a batch.
    # Batch, where its interval ends, steps in it.
    plan = [(5, 20, 4), (8, 44, 3), (4, 60, 4), (3, 81, 7), (1, 100, 19)]
    plan += [(2, 120, 10), (7, 141, 3), (6, 165, 4), (20, 185, 1), (16, 200, 1)]
    taken = 0
    for batch_size, end, steps in plan:
        telemetry = advance(run, batch_size=batch_size)

        assert position(run) == end
        assert telemetry.tokens == 16 * end
        assert telemetry.interval_tokens == 16 * (end - taken)
        assert telemetry.steps == steps
        assert telemetry.batch_size == pytest.approx((end - taken) / steps)
        assert telemetry.batch_size == (15 if end == 200 else batch_size)
        assert telemetry.requested.batch_size == batch_size
        assert telemetry.epochs_seen == pytest.approx(end / run.stream.n_sequences)
        taken = end
    assert telemetry.finished
    assert telemetry.budget_used == 1.0


@pytest.mark.parametrize("decisions", [3, 7, 10, 49])
def test_equal_shares_end_on_the_budget(decisions: int, tmp_path: Path) -> None:
    # Shares like 1/10 do not add up to 1 exactly.
    run = live_run(case(tmp_path, batch_size=1, decisions=decisions))
    seen = [advance(run) for _ in range(decisions)]

    assert [t.finished for t in seen] == [False] * (decisions - 1) + [True]
    assert [t.tokens for t in seen] == [16 * round(200 * (i + 1) / decisions) for i in range(decisions)]


def test_sequences_reach_the_model_in_the_corpus_order_whatever_the_batch(tmp_path: Path) -> None:
    run = live_run(case(tmp_path))
    seen: list[Tensor] = []

    def watch(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["input_ids"].clone())

    run.loaded.model.register_forward_pre_hook(watch, with_kwargs=True)
    expected = run.stream.peek(60)[:, :-1]
    for batch_size in (2, 5, 4):
        advance(run, batch_size=batch_size)

    assert [len(batch) for batch in seen] == [2] * 10 + [5] * 4 + [4] * 5
    assert torch.cat(seen).tolist() == expected.tolist()


def test_doubling_is_neutral_for_adam(tmp_path: Path) -> None:
    doubled, kept = live_run(case(tmp_path)), live_run(case(tmp_path))
    for run in (doubled, kept):
        advance(run)
        advance(run)
    assert step_counts(doubled) == {20.0}
    before = update_direction(doubled.trainer.optimizer)

    doubled.trainer.apply(Controls(batch_size=4))

    assert step_counts(doubled) == {10.0}
    assert decay(doubled) == pytest.approx(0.95**2, rel=1e-12)
    for (_, old), (_, new) in zip(before, update_direction(doubled.trainer.optimizer), strict=True):
        assert torch.allclose(old, new, rtol=1e-5, atol=1e-9)
    assert doubled.trainer.learning_rate(Controls(batch_size=4)) == pytest.approx(
        math.sqrt(2) * kept.trainer.learning_rate(Controls(batch_size=2)), rel=1e-12
    )


def test_doubling_in_an_advancing_run(tmp_path: Path) -> None:
    run = live_run(case(tmp_path))
    advance(run)
    advance(run, batch_size=4)

    # 10 steps of 2, halved to 5, and 5 steps of 4. The last begins after 576 tokens.
    assert step_counts(run) == {10.0}
    factor = 1 - (576 - WARMUP) / (TOKENS - WARMUP)
    assert rate(run) == pytest.approx(PEAK * factor * math.sqrt(2), rel=1e-12)
    assert decay(run) == pytest.approx(0.9025, rel=1e-12)

    advance(run, batch_size=1)

    # 10 steps of 4 count as 40 of 1, and 20 more follow. The last begins after 944 tokens.
    assert step_counts(run) == {60.0}
    assert decay(run) == pytest.approx(math.sqrt(0.95), rel=1e-12)
    factor = 1 - (944 - WARMUP) / (TOKENS - WARMUP)
    assert rate(run) == pytest.approx(PEAK * factor * math.sqrt(1 / 2), rel=1e-12)


# Precision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_precision_seen_in_a_matrix_product(model: dict[str, Any], tmp_path: Path) -> None:
    run = live_run(case(tmp_path, model), probe=True)
    seen: set[torch.dtype] = set()

    def watch(module: nn.Module, _inputs: Any, output: Tensor) -> None:
        if module.training:
            seen.add(output.dtype)

    output_head(run).register_forward_hook(watch)
    requests: list[tuple[Precision, torch.dtype]] = [("bf16", torch.bfloat16), ("fp32", torch.float32)]
    for precision, dtype in requests:
        seen.clear()
        telemetry = advance(run, precision=precision)
        run.evaluate()

        assert seen == {dtype}
        assert telemetry.precision == telemetry.requested.precision == precision
        assert {p.dtype for p in run.loaded.model.parameters()} == {torch.float32}
        assert not telemetry.diverged


def test_evaluation_is_in_float32_whatever_the_run_is_in(tmp_path: Path) -> None:
    run = live_run(case(tmp_path))
    advance(run, precision="bf16")
    seen: set[torch.dtype] = set()
    output_head(run).register_forward_hook(lambda _module, _inputs, output: seen.add(output.dtype))

    run.evaluate()

    assert seen == {torch.float32}


def test_tf32_is_read_back_after_a_probe_in_fp32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = live_run(case(tmp_path)).trainer
    monkeypatch.setattr(trainer, "device", torch.device("cuda"))
    product = next(module for module in trainer.model.base_model.modules() if isinstance(module, nn.Linear))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        product(torch.zeros(1, product.in_features))
        torch.set_float32_matmul_precision("highest")
    finally:
        torch.set_float32_matmul_precision(before)

    assert trainer.effective_precision() == "tf32"


@pytest.mark.parametrize("precision", ["tf32", "fp16"])
def test_precision_that_the_device_lacks(precision: Precision, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^precision {precision} cannot be used: .*cpu.*; try fp32$") as raised:
        live_run(case(tmp_path, precision=precision))
    assert "\n" not in str(raised.value)

    run, untouched = live_run(case(tmp_path)), live_run(case(tmp_path))
    for each in (run, untouched):
        advance(each)
    with pytest.raises(ValueError, match=f"^precision {precision} cannot be used"):
        advance(run, precision=precision, batch_size=4)

    # The refused controls left nothing behind.
    assert advance(run).train_loss == advance(untouched).train_loss


# Pruning ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["magnitude", "evolution"])
def test_sparsity_counted_in_the_weights(criterion: str, tmp_path: Path) -> None:
    run = live_run(case(tmp_path, pruning=criterion), probe=True)
    n_weights = sum(matrix.numel() for matrix in matrices(run))
    assert advance(run).sparsity == zero_share(run) == 0.0

    for wanted in (0.05, 0.3):
        telemetry = advance(run, sparsity=wanted)
        assert telemetry.sparsity == pytest.approx(zero_share(run), abs=1e-12)
        assert telemetry.sparsity == pytest.approx(wanted, abs=1 / n_weights)
        assert telemetry.requested.sparsity == wanted

    held = [matrix == 0 for matrix in matrices(run)]
    for wanted in (0.3, 0.1):  # a lower sparsity brings nothing back
        telemetry = advance(run, sparsity=wanted)
        assert telemetry.sparsity == pytest.approx(0.3, abs=1 / n_weights)
        assert all(torch.equal(matrix == 0, zero) for matrix, zero in zip(matrices(run), held, strict=True))
    embeddings = run.loaded.model.get_parameter("model.embed_tokens.weight")
    assert int(torch.count_nonzero(embeddings)) == embeddings.numel()


def test_masks_rise_in_five_cubic_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = live_run(case(tmp_path, pruning="magnitude"))
    shares: list[float] = []
    step = run.trainer.step

    def recorded(sequences: np.ndarray) -> Any:
        shares.append(zero_share(run))
        return step(sequences)

    monkeypatch.setattr(run.trainer, "step", recorded)
    advance(run, sparsity=0.5)

    # 0.5 (1 - (1 - p)^3) at p = 0.2, 0.4, ... 1, each for two of the ten steps.
    expected = [0.244, 0.392, 0.468, 0.496, 0.5]
    assert shares == pytest.approx([share for share in expected for _ in range(2)], abs=1e-3)


def test_width_counted_in_the_matrices(tmp_path: Path) -> None:
    run = live_run(case(tmp_path, pruning="width"), probe=True)
    # Of 32 channels, a quarter is 8 away; 40 % is 12.8 away, which the multiple of 8 makes 16.
    for wanted, width in [(0.0, 32), (0.25, 24), (0.4, 16), (0.1, 16)]:
        telemetry = advance(run, sparsity=wanted)

        shapes = {name: tuple(p.shape) for name, p in run.loaded.model.named_parameters() if ".mlp." in name}
        assert len(shapes) == 6  # three matrices in each of two layers
        for name, shape in shapes.items():
            assert shape == ((16, width) if "down_proj" in name else (width, 16)), name
        assert telemetry.sparsity == 1 - width / 32
        assert not telemetry.diverged


def test_activations_on_the_validation_text_choose_the_channels(tmp_path: Path) -> None:
    run, plain = (live_run(case(tmp_path, pruning="width", pruning_importance=by)) for by in ("activation", "weight"))
    for each in (run, plain):
        advance(each)
    assert same_bits(weights(run), weights(plain))  # nothing is measured before something is removed
    windows = fixed_batch(run.corpus.validation, 16, run.evaluation_sequences)
    inputs = torch.from_numpy(windows[:, :-1])
    before, kept = weights(run), {}
    for layer, block in enumerate(layers(run.loaded.model)):
        seen: list[Tensor] = []
        handle = block.mlp.down_proj.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0]))
        with torch.no_grad():
            run.loaded.model(input_ids=inputs)
        handle.remove()
        largest = seen[0].abs().mean(dim=(0, 1)).argsort(descending=True)[:16]
        kept[f"model.layers.{layer}.mlp.up_proj.weight"] = largest.sort().values

    for each in (run, plain):
        each.trainer.apply(Controls(batch_size=2, sparsity=0.5))

    after = weights(run)
    assert all(torch.equal(after[name], before[name][rows]) for name, rows in kept.items())
    assert not same_bits(after, weights(plain))
    assert not advance(run, sparsity=0.5).diverged


def test_sparsity_without_pruning_is_refused(tmp_path: Path) -> None:
    run = live_run(case(tmp_path))
    with pytest.raises(ValueError, match=r"sparsity must be 0 in a run whose pruning is 'none', got 0\.1"):
        advance(run, sparsity=0.1)


# Finish -----------------------------------------------------------------------------------------------------


def test_finish_cools_down_to_zero_over_a_fifth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = live_run(case(tmp_path))
    for _ in range(5):
        assert not advance(run).finishing
    used: list[float] = []
    step = run.trainer.step

    def recorded(sequences: np.ndarray) -> Any:
        record = step(sequences)
        used.append(rate(run))
        return record

    monkeypatch.setattr(run.trainer, "step", recorded)

    telemetry = advance(run, finish=True)

    assert telemetry.finishing
    assert telemetry.finished
    assert run.finished
    # 1600 tokens are gone: the base schedule stands at 0.5102, and ten steps of 32 tokens follow.
    start = PEAK * (1 - (1600 - WARMUP) / (TOKENS - WARMUP))
    assert used == pytest.approx([start * (1 - i / 10) for i in range(10)], rel=1e-9)
    assert telemetry.tokens == 1600 * 1.2
    assert telemetry.budget_used == pytest.approx(0.6)
    with pytest.raises(ValueError, match="advance needs a run that has not finished"):
        advance(run)


def test_finish_stays_and_never_outlasts_the_budget(tmp_path: Path) -> None:
    run = live_run(case(tmp_path, schedule="constant"))
    for _ in range(9):
        advance(run)

    telemetry = advance(run, finish=True)

    # A fifth of 2880 is 576, but 320 tokens are left: ten steps down to a tenth of the rate.
    assert telemetry.finished
    assert telemetry.tokens == TOKENS
    assert telemetry.learning_rate == pytest.approx(PEAK / 10)


def test_finish_asked_once_goes_on_over_several_intervals(tmp_path: Path) -> None:
    run = live_run(case(tmp_path, decisions=50))
    for _ in range(25):
        advance(run)
    shares = [advance(run, finish=i == 0).budget_used for i in range(5)]

    assert shares == pytest.approx([0.52, 0.54, 0.56, 0.58, 0.6])
    assert run.finished


def test_finish_at_the_very_start(tmp_path: Path) -> None:
    run = live_run(case(tmp_path))

    telemetry = advance(run, finish=True)

    assert telemetry.finished
    assert telemetry.steps == 1


# Bad values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"learning_rate_scale": -0.1}, "learning_rate_scale must be a finite number >= 0, got -0.1"),
        ({"learning_rate_scale": math.nan}, "learning_rate_scale must be a finite number >= 0, got nan"),
        ({"learning_rate_scale": math.inf}, "learning_rate_scale must be a finite number >= 0, got inf"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1 sequence, got 0"),
        ({"batch_size": 2.5}, "batch_size must be a whole number of at least 1 sequence, got 2.5"),
        ({"precision": "fp8"}, "precision must be one of fp32, tf32, bf16, fp16, got 'fp8'"),
        ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\), got 1.0"),
        ({"sparsity": -0.1}, r"sparsity must be in \[0, 1\), got -0.1"),
        ({"sparsity": math.nan}, r"sparsity must be in \[0, 1\), got nan"),
    ],
)
def test_controls_name_the_bad_value(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        Controls(**({"batch_size": 2} | bad))
