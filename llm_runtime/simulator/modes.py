"""Step the modes of a power-law noisy quadratic exactly: how signal fades and noise builds up over many steps.

A loss is written as a sum over modes i, each with a relaxation rate u_i in units of the fastest one:

    L = L0 + A sum_i c_i a_i + N sum_i k_i 2 u_i q_i,    c_i ~ u_i^s,  k_i ~ u_i^kappa,  each summing to 1

a_i is what is left of the signal in mode i (1 at the start), q_i the noise gathered in it (0 at the start). Finitely
many modes stand for the power laws of the functional scaling law (Li et al. 2025, arXiv 2509.19189), whose signal
fades as t^-s and whose memory of past noise fades as t^-(1 + kappa); unlike these integrals they make a state that can
be stepped under any controls. Noisy quadratic model: Zhang et al. 2019, arXiv 1907.04164.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from trainpilot.llm_runtime.simulator.records import Floats

N_MODES = 48
"""Modes: about seven in each decade, enough for smooth power laws."""
DECADES = 7
"""The slowest mode is this many decades below the fastest."""

_TINY = 1e-300  # stands for a rate of zero, where (1 - e^-r) / r has the limit 1


def mode_rates(n_modes: int = N_MODES, decades: float = DECADES) -> Floats:
    """Return the relaxation rates u_i, spaced evenly in the logarithm and falling from 1, of shape (n_modes,)."""
    return np.logspace(0.0, -decades, n_modes)


def mode_weights(rates: Floats, exponent: ArrayLike) -> Floats:
    """Return u^exponent over its sum.

    Args:
        rates: Relaxation rates, of shape (n_modes,).
        exponent: One number, or one for each run, of shape (n_runs,).

    Returns:
        Weights that sum to 1, of shape (n_modes,) or (n_runs, n_modes).
    """
    weights: Floats = rates ** np.asarray(exponent, dtype=np.float64)[..., None]
    weights /= weights.sum(axis=-1, keepdims=True)
    return weights


def step_modes(signal: Floats, noise: Floats, rates: Floats, path: ArrayLike, injected: ArrayLike) -> None:
    """Let signal and noise go on over a stretch of constant learning rate, exactly and in place.

    With r = 2 u x path the stretch's n single steps, in the limit of small steps, come to

        a <- a e^-r    and    q <- q e^-r + injected (1 - e^-r) / r

    Args:
        signal: a, of shape (n_runs, n_modes); or (n_modes,) for one run.
        noise: q, of the same shape.
        rates: u, of shape (n_modes,) or (n_runs, n_modes).
        path: Learning rate times steps, the learning rate in units of the inverse rate of the fastest mode; 0 leaves
            the signal as it is. Of shape (n_runs,), or a number.
        injected: Noise that the stretch would add if none faded: that of a step times the steps. Of the same shape.
    """
    r = np.asarray(path, dtype=np.float64)[..., None] * (2.0 * rates)
    np.maximum(r, _TINY, out=r)
    faded = np.expm1(-r)  # e^-r - 1, exact where r is small
    gain = np.asarray(injected, dtype=np.float64)[..., None] / r
    gain *= faded
    faded += 1.0
    signal *= faded
    noise *= faded
    noise -= gain
