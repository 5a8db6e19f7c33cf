"""Make the optimisers that ask for less tuning than AdamW, and look at the weights that schedule-free averages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import Optimizer

from trainpilot.llm_runtime.run_config import RunConfig

BETAS = (0.9, 0.999)
"""What both packages recommend; a beta2 as short as AdamW's 0.95 would also shorten Prodigy's estimate."""


def make_schedule_free(groups: list[dict[str, Any]], config: RunConfig) -> Optimizer:
    """Return schedule-free AdamW, ready to train.

    Gradients are taken at a point between the weights that take the steps and their running average; the average is
    what counts (`averaged_weights`). The package's own warm-up stays off: it is a factor on the learning rate, and
    that comes with every step. In the average a step weighs as the square of the largest rate so far.

    Defazio et al. 2024, "The road less scheduled", arXiv 2405.15682.
    """
    try:
        from schedulefree import AdamWScheduleFree
    except ImportError:
        raise _missing(config, "schedulefree") from None
    optimizer: Any = AdamWScheduleFree(groups, lr=config.base_learning_rate, betas=BETAS, eps=1e-8, warmup_steps=0)
    optimizer.train()
    return optimizer  # type: ignore[no-any-return]


def make_prodigy(groups: list[dict[str, Any]], config: RunConfig) -> Optimizer:
    """Return Prodigy, AdamW with a learning rate of its own estimate; the rate that is set is a factor on it.

    Warm-up would make it overestimate: it has a safeguard for that.

    Mishchenko and Defazio 2024, "Prodigy: an expeditiously adaptive parameter-free learner", arXiv 2306.06101.
    """
    try:
        from prodigyopt import Prodigy
    except ImportError:
        raise _missing(config, "prodigyopt") from None
    optimizer: Optimizer = Prodigy(
        groups,
        lr=config.base_learning_rate,
        betas=BETAS,
        eps=1e-8,
        decouple=True,
        use_bias_correction=True,
        safeguard_warmup=config.warmup() > 0,
    )
    return optimizer


@contextmanager
def averaged_weights(optimizer: Optimizer) -> Iterator[None]:
    """Put schedule-free's averaged weights into the model; afterwards the training weights are back, bit for bit.

    The package would compute the training weights anew, which rounds: a look would change the run. So they are kept
    aside. With any other optimiser, and inside another such block, nothing happens.
    """
    switch: Any = optimizer
    if not optimizer.param_groups[0].get("train_mode", False):
        yield
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    saved = [p.detach().clone() for p in parameters]
    switch.eval()
    try:
        yield
    finally:
        switch.train()
        with torch.no_grad():
            torch._foreach_copy_(parameters, saved)


def _missing(config: RunConfig, package: str) -> ValueError:
    return ValueError(f"optimizer {config.optimizer!r} needs the package {package}; run: pip install {package}")
