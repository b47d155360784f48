"""The operators of torch.ops.tokenizers_mm: schemas, fake kernels and rules of torch.vmap for what `_ops` does."""

import torch
from torch import Tensor

from tokenizers_mm.kernels import _ops

_namespace = torch.library.Library("tokenizers_mm", "DEF")


def define(schema: str, implementation, fake) -> None:
    """Define an operator of torch.ops.tokenizers_mm by its schema, code for all devices, and shapes of its outputs."""
    name = "tokenizers_mm::" + schema.partition("(")[0]
    _namespace.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _namespace.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(name, fake, lib=_namespace)


def _fake_ids(z: Tensor, codebook: Tensor, trust_version: bool = False, name: str = "z") -> Tensor:
    return z.new_empty(z.shape[:-1], dtype=torch.int64)


def _fake_distance(z: Tensor, codebook: Tensor, trust_version: bool = False, name: str = "z") -> tuple[Tensor, Tensor]:
    ids = z.new_empty(z.shape[:-1], dtype=torch.int64)
    return z.new_empty(z.shape[:-1], dtype=_ops.common_dtype((z, codebook))), ids


def _fake_margin(
    z: Tensor, codebook: Tensor, trust_version: bool = False, name: str = "z"
) -> tuple[Tensor, Tensor, Tensor]:
    distance, ids = _fake_distance(z, codebook)
    return distance, torch.empty_like(distance), ids


def _fake_shared(
    zs: list[Tensor],
    codebooks: list[Tensor],
    weights: list[float],
    normalize: bool,
    trust_version: bool = False,
    names: list[str] | None = None,
) -> Tensor:
    return zs[0].new_empty(zs[0].shape[:-1], dtype=torch.int64)


def _fake_shared_margin(
    zs: list[Tensor],
    codebooks: list[Tensor],
    weights: list[float],
    normalize: bool,
    trust_version: bool = False,
    names: list[str] | None = None,
) -> tuple[Tensor, Tensor]:
    ids = _fake_shared(zs, codebooks, weights, normalize)
    return zs[0].new_empty(ids.shape, dtype=_ops.common_dtype((*zs, *codebooks))), ids


def _fake_finite_ids(z: Tensor, ids: Tensor, name: str) -> Tensor:
    return torch.empty_like(ids)


def _fake_sums(vectors: Tensor, ids: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    sums = vectors.new_empty((num_codes, vectors.shape[1]), dtype=torch.float64)
    return sums, ids.new_empty((num_codes,))


def _fake_ssim(x: Tensor, y: Tensor, line: Tensor, c1: float, c2: float, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    whole = x.new_empty(x.shape[:-2], dtype=torch.float64)
    return whole, torch.empty_like(whole)


def _batched(op, row_arguments: int):
    """The rule of torch.vmap for an operator whose first arguments are rows of any leading shape: a batch of them alone
    is one more axis of rows. A batch of codebooks is searched one by one."""

    def rule(info, in_dims, *arguments):
        size = info.batch_size

        def select(argument, dims, index):
            if isinstance(argument, list):
                return [
                    select(part, dim, index) for part, dim in zip(argument, dims or [None] * len(argument), strict=True)
                ]
            return argument if dims is None else argument.select(dims, index)

        def lead(argument, dims):
            if isinstance(argument, list):
                return [lead(part, dim) for part, dim in zip(argument, dims or [None] * len(argument), strict=True)]
            return argument.expand(size, *argument.shape) if dims is None else argument.movedim(dims, 0)

        def unbatched(dims) -> bool:
            return dims is None or (isinstance(dims, list | tuple) and all(dim is None for dim in dims))

        if all(map(unbatched, in_dims[row_arguments:])):
            rows = [lead(*pair) for pair in zip(arguments[:row_arguments], in_dims[:row_arguments], strict=True)]
            result = op(*rows, *arguments[row_arguments:])
        else:
            results = [
                op(*(select(argument, dims, i) for argument, dims in zip(arguments, in_dims, strict=True)))
                for i in range(size)
            ]
            single = isinstance(results[0], Tensor)
            result = torch.stack(results) if single else tuple(map(torch.stack, zip(*results, strict=True)))
        return result, 0 if isinstance(result, Tensor) else (0,) * len(result)

    return rule


# A floating-point output comes first: with an int64 one there, torch's tracing of gradients fails.
_PLAIN = "Tensor z, Tensor codebook, bool trust_version=False, str name='z'"
_SHARED = (
    "Tensor[] zs, Tensor[] codebooks, float[] weights, bool normalize, bool trust_version=False, str[]? names=None"
)
define(f"nearest_code({_PLAIN}) -> Tensor", _ops.nearest_ids, _fake_ids)
define(f"nearest_code_distance({_PLAIN}) -> (Tensor, Tensor)", _ops.nearest_distance, _fake_distance)
define(f"nearest_code_margin({_PLAIN}) -> (Tensor, Tensor, Tensor)", _ops.nearest_margin, _fake_margin)
define(f"nearest_code_shared({_SHARED}) -> Tensor", _ops.nearest_shared, _fake_shared)
define(f"nearest_code_shared_margin({_SHARED}) -> (Tensor, Tensor)", _ops.shared_margin, _fake_shared_margin)
define("code_sums(Tensor vectors, Tensor ids, SymInt num_codes) -> (Tensor, Tensor)", _ops.code_sums, _fake_sums)
define("finite_ids(Tensor z, Tensor ids, str name) -> Tensor", _ops.finite_ids, _fake_finite_ids)
define(
    "ssim(Tensor x, Tensor y, Tensor line, float c1, float c2, float offset=0.0) -> (Tensor, Tensor)",
    _ops.ssim,
    _fake_ssim,
)
_ROW_ARGUMENTS = {
    "nearest_code": 1,
    "nearest_code_distance": 1,
    "nearest_code_margin": 1,
    "nearest_code_shared": 1,
    "nearest_code_shared_margin": 1,
    "code_sums": 0,
    "finite_ids": 2,
    "ssim": 2,
}
for _name, _count in _ROW_ARGUMENTS.items():
    _op = getattr(torch.ops.tokenizers_mm, _name).default
    torch.library.register_vmap(f"tokenizers_mm::{_name}", _batched(_op, _count), lib=_namespace)
