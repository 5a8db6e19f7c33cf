"""Gather and lay out tensors of which each process may hold only its shard (FSDP2); plain tensors pass through."""

from __future__ import annotations

from torch import Tensor


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor; where it is sharded, all processes must ask together."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


def laid_out_like(pattern: Tensor, tensor: Tensor) -> Tensor:
    """Return `tensor`, which every process holds whole, sharded as `pattern` is."""
    if not hasattr(pattern, "full_tensor"):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(pattern, DTensor)
    return distribute_tensor(tensor, pattern.device_mesh, pattern.placements, src_data_rank=None)
