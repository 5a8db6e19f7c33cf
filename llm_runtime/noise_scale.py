"""Estimate the gradient noise scale without a second pass: from Adam's buffers."""

from __future__ import annotations


def noise_scale_from_moments(
    gradient_norm_squared: float, moment_norm_squared: float, beta1: float, batch_size: float
) -> float | None:
    """Return the gradient noise scale tr(Sigma)/|G|^2 in sequences, or `None` where the estimate has no meaning.

    With m the exponential mean of gradients g of batch B, in a stationary stretch

        E|m|^2 = |G|^2 + (1 - b)/(1 + b) tr(Sigma)/B    and    E|g|^2 = |G|^2 + tr(Sigma)/B

    hence tr(Sigma)/B = (|g|^2 - |m|^2) (1 + b)/(2 b) and |G|^2 = |m|^2 - (1 - b)/(1 + b) tr(Sigma)/B.
    The noise scale itself: McCandlish et al. 2018, "An empirical model of large-batch training". Where the signal is
    lost in the noise the value saturates at some hundred batches; it is a trend, not a set-point.

    Args:
        gradient_norm_squared: Mean of |g|^2 over the last steps, of the gradients that Adam saw.
        moment_norm_squared: |m|^2 after the last of these steps, bias-corrected.
        beta1: Adam's first-moment decay, in (0, 1).
        batch_size: Sequences per step.
    """
    if not 0 < beta1 < 1 or moment_norm_squared <= 0:
        return None
    noise = (gradient_norm_squared - moment_norm_squared) * (1 + beta1) / (2 * beta1)
    signal = moment_norm_squared - (1 - beta1) / (1 + beta1) * noise
    if noise <= 0:
        return 0.0
    return noise / max(signal, 1e-2 * moment_norm_squared) * batch_size
