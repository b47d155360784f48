"""Our operators in terms of ONNX: what the exporter puts where it meets one of them."""

from collections.abc import Callable, Sequence
from typing import Any

import onnxscript
import torch

from tokenizers_mm.functional import assignment  # noqa: F401 (defines torch.ops.tokenizers_mm.largest_logit)

_OP: Any = onnxscript.opset18  # its operators take values of a graph that is being traced, which its types do not say


def _nearest(z: Any, codebook: Any, *_: Any) -> Any:
    """argmin of |c|^2 - 2 z.c, the lowest index on ties. Options of caching and naming have no meaning in a graph."""
    norms = _OP.ReduceSum(_OP.Mul(codebook, codebook), _OP.Constant(value_ints=[1]), keepdims=0)
    products = _OP.MatMul(z, _OP.Transpose(codebook, perm=[1, 0]))
    two = _OP.CastLike(_OP.Constant(value_float=2.0), z)
    return _OP.ArgMin(_OP.Sub(norms, _OP.Mul(two, products)), axis=-1, keepdims=0)


def _nearest_shared(
    zs: Sequence[Any], codebooks: Sequence[Any], weights: Sequence[float], normalize: bool, *_: Any
) -> Any:
    """The same over parts laid side by side, each scaled by the root of its weight."""
    scaled_z, scaled_codes = [], []
    for z, codebook, weight in zip(zs, codebooks, weights, strict=True):
        if normalize:
            z, codebook = (_OP.LpNormalization(x, axis=-1, p=2) for x in (z, codebook))
        root = _OP.CastLike(_OP.Constant(value_float=float(weight) ** 0.5), z)
        scaled_z.append(_OP.Mul(z, root))
        scaled_codes.append(_OP.Mul(codebook, root))
    return _nearest(_OP.Concat(*scaled_z, axis=-1), _OP.Concat(*scaled_codes, axis=-1))


def _largest_logit(z: Any, keys: Any, bias: Any) -> Any:
    """argmax of z.c (+ bias), the lowest index on ties."""
    logits = _OP.MatMul(z, _OP.Transpose(keys, perm=[1, 0]))
    return _OP.ArgMax(logits if bias is None else _OP.Add(logits, bias), axis=-1, keepdims=0)


def _finite_ids(z: Any, ids: Any, *_: Any) -> Any:
    """The ids as they are: a graph raises no error."""
    return _OP.Identity(ids)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.tokenizers_mm.nearest_code.default: _nearest,
    torch.ops.tokenizers_mm.nearest_code_shared.default: _nearest_shared,
    torch.ops.tokenizers_mm.finite_ids.default: _finite_ids,
    torch.ops.tokenizers_mm.largest_logit.default: _largest_logit,
}
