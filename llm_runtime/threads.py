"""Set how many threads torch uses in this process."""

from __future__ import annotations

import os

import torch


def use_threads(n_threads: int) -> int:
    """Use `n_threads` for matrix products, 0 for all cores, and return the number. Raises `ValueError` below 0."""
    if n_threads < 0:
        raise ValueError(f"threads must be 0 (all cores) or more, got {n_threads}")
    count = n_threads or available_cores()
    torch.set_num_threads(count)
    return count


def available_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads_in_use() -> int:
    """Return how many threads torch uses in this process."""
    return torch.get_num_threads()
