"""Engines of training: gradient averaging (DDP), sharding (FSDP2), compiled networks, recomputed activations.

Accelerate makes the process group, autocast and the gradient scaler. It has FSDP2 for accelerators alone and for one
model with its optimizers at a time, so torch's own `fully_shard` and DDP are called here, on the same process group.

In the order of a run: `state.build_state` recomputes and compiles; at the first step `State.module` shards (`shard`,
and the moments and the average alike) and wraps (`average_gradients`); `step` holds gradients back between
micro-batches; whoever measures, shows or saves reads `whole` tensors or `filled` copies.
"""

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from tokenizers_mm._ranks import several
from tokenizers_mm.encoders.captions import CaptionEmbedding
from tokenizers_mm.llm import transformers_api
from tokenizers_mm.losses.captions import CaptionContrast
from tokenizers_mm.models import ImageTokenizer
from tokenizers_mm.quantizers.base import Quantizer

BLOCK_NAMES = ("Block", "Layer")
"""Ends of the class names of the blocks that are sharded, and recomputed, one by one."""


def blocks(network: nn.Module) -> Iterator[nn.Module]:
    """Outermost residual and transformer blocks of a network, whoever wrote it: members of lists, by class name."""
    for module in network.children():
        listed = isinstance(network, (nn.ModuleList, nn.Sequential))
        if listed and type(module).__name__.endswith(BLOCK_NAMES):
            yield module
        else:
            yield from blocks(module)


def compile_networks(networks: Iterable[nn.Module], backend: str) -> int:
    """Compile, in place, every part that runs through its `forward`: encoders, decoders, language models. Returns how
    many there are.

    A tokenizer runs through other methods, so its parts are compiled one by one. A quantizer reads back its ids, and
    the networks of captions read texts: these are not compiled, nor are single layers.
    """
    found = 0
    for network in networks:
        if isinstance(network, (Quantizer, CaptionContrast, CaptionEmbedding)):
            continue
        if isinstance(network, ImageTokenizer) or type(network).forward is nn.Module.forward:
            found += compile_networks(network.children(), backend)
        elif not type(network).__module__.startswith("torch."):
            network.compile(backend=backend)
            found += 1
    return found


def recompute_activations(network: nn.Module) -> int:
    """Keep the inputs of blocks alone and compute the rest again in the backward pass. Returns the number of blocks.

    Language models of transformers switch it on themselves, since their caches must be off. timm's towers and the
    package's own blocks are wrapped alike, but for those with batch norm, whose statistics would move twice.
    """
    if transformers_api.recompute_activations(network):
        return 1
    batch_norm = nn.modules.batchnorm._BatchNorm
    found = [block for block in blocks(network) if not any(isinstance(part, batch_norm) for part in block.modules())]
    for block in found:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return len(found)


def average_gradients(module: nn.Module, device: torch.device) -> nn.Module:
    """A module whose gradients are averaged over the processes (DDP); those of sharded parameters already are."""
    if not several():
        return module
    sharded = [name for name, p in module.named_parameters() if isinstance(p, DTensor)]
    if sharded and all(isinstance(p, DTensor) for p in module.parameters() if p.requires_grad):
        return module
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, sharded)
    own = None if device.type == "cpu" else [device.index]
    return DistributedDataParallel(module, own, find_unused_parameters=True, broadcast_buffers=False)


@contextlib.contextmanager
def gradients_stay_here(module: nn.Module) -> Iterator[None]:
    """No exchange of gradients in the backward passes inside, but for the last micro-batch of a step."""
    sharded = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for part in sharded:
        part.set_requires_gradient_sync(False, recurse=False)
    try:
        with module.no_sync() if isinstance(module, DistributedDataParallel) else contextlib.nullcontext():
            yield
    finally:
        for part in sharded:
            part.set_requires_gradient_sync(True, recurse=False)


def shard(module: nn.Module, device: torch.device) -> None:
    """Shard the parameters of a module over all processes (FSDP2), block by block.

    Kept whole: the parameters of quantizers, whose codes are read and moved outside of `forward`, and scalars.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    whole = {p for part in module.modules() if isinstance(part, Quantizer) for p in part.parameters()}
    whole |= {p for p in module.parameters() if p.ndim == 0}
    tied = _tied(module)
    for block in blocks(module):
        if not any(p in tied for p in block.parameters()):
            fully_shard(block, mesh=mesh, ignored_params=whole)
    fully_shard(module, mesh=mesh, ignored_params=whole)


def _tied(module: nn.Module) -> set[nn.Parameter]:
    """Parameters that have several names."""
    seen: set[nn.Parameter] = set()
    again = set()
    for _, parameter in module.named_parameters(remove_duplicate=False):
        (again if parameter in seen else seen).add(parameter)
    return again


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """The shard of this process of a whole tensor, laid out as another; the tensor itself where that is whole."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def shard_optimizer(optimizer: torch.optim.Optimizer, sharded: Mapping[Any, nn.Parameter]) -> None:
    """Let an optimizer step the sharded parameters, given by the whole ones they replaced, with its moments sharded."""
    for group in optimizer.param_groups:
        group["params"] = [sharded.get(p, p) for p in group["params"]]
    for old, state in list(optimizer.state.items()):
        parameter = sharded.get(old, old)
        del optimizer.state[old]
        optimizer.state[parameter] = {name: shard_like(value, parameter) for name, value in state.items()}


def shard_average(average: nn.Module, network: nn.Module) -> None:
    """Shard the parameters of a moving average as those of the network that it follows."""
    like, made = dict(network.named_parameters(remove_duplicate=False)), dict[nn.Parameter, nn.Parameter]()
    for name, parameter in list(average.named_parameters(remove_duplicate=False)):
        if parameter not in made:
            made[parameter] = nn.Parameter(shard_like(parameter.detach(), like[name]), parameter.requires_grad)
        place, _, last = name.rpartition(".")
        setattr(average.get_submodule(place), last, made[parameter])


def skeleton(network: nn.Module) -> nn.Module:
    """A copy of a network whose parameters have shapes and no values."""
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in network.parameters()}
    return copy.deepcopy(network, empty)


def filled(structure: nn.Module, network: nn.Module) -> nn.Module:
    """A copy of a skeleton with the whole values of a sharded network. Called on every rank: shards are gathered."""
    values = dict(network.named_parameters())
    memo: dict[int, Any] = {}
    for name, parameter in structure.named_parameters():
        memo[id(parameter)] = nn.Parameter(whole(values[name]).detach().clone(), parameter.requires_grad)
    current = dict(network.named_buffers())
    for name, buffer in structure.named_buffers():
        memo[id(buffer)] = current[name].clone()
    return copy.deepcopy(structure, memo)


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all of its shards. Called on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds; changes to it are changes to the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def on_local_shards(average: Callable[..., None]) -> Callable[..., None]:
    """An update of lists of averaged and current tensors, applied to the part of each that this process holds."""

    def update(averaged: Iterable[Tensor], current: Iterable[Tensor], count: Any) -> None:
        average([local(tensor) for tensor in averaged], [local(tensor) for tensor in current], count)

    return update
