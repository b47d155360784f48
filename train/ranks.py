"""What several ranks say to each other. Each rank holds the whole model; with one rank nothing here does anything."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

BUCKET = 1 << 24
"""Elements of gradients that travel together: 64 MB in float32."""


def several() -> bool:
    """Whether there is anybody to talk to."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def average_gradients(parameters: Iterable[Parameter]) -> None:
    """The mean of the gradients over the ranks; one that some ranks lack counts as zero there.

    What no rank has stays None, so that the optimizer leaves the parameter alone, as with one rank.
    """
    if not several():
        return
    parameters = list(parameters)
    bucket: list[Tensor] = []
    for parameter, somewhere in zip(parameters, _anywhere(parameters), strict=True):
        if not somewhere:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        bucket.append(parameter.grad)
        if sum(grad.numel() for grad in bucket) >= BUCKET:
            _average(bucket)
            bucket = []
    _average(bucket)


def sum_counts(counts: Tensor) -> Tensor:
    """The sum over the ranks."""
    if several():
        dist.all_reduce(counts)
    return counts


def share_from_first(tensor: Tensor) -> Tensor:
    """What rank 0 has."""
    if several():
        dist.broadcast(tensor, 0)
    return tensor


def _anywhere(parameters: list[Parameter]) -> list[bool]:
    """For each parameter, whether any rank has a gradient of it."""
    if not parameters:
        return []
    has = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.int32)
    return (sum_counts(has.to(parameters[0].device)) > 0).tolist()


def _average(gradients: list[Tensor]) -> None:
    if not gradients:
        return
    flat = torch.cat([grad.flatten() for grad in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for grad, part in zip(gradients, flat.split([grad.numel() for grad in gradients]), strict=True):
        grad.copy_(part.view_as(grad))
