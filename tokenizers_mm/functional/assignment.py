"""Soft assignment of vectors to codes without an N x K matrix: index backpropagation and the entropies.

Logits are s = z keys^T + bias. Tiles of whole rows are computed in the forward pass and again in the backward pass.

Sources: Shi et al., Scalable Image Tokenization with Index Backpropagation Quantization (IBQ, arXiv 2412.02692),
section 3.2; Yu et al., Language Model Beats Diffusion (arXiv 2310.05737), section 3.1 (entropies).
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokenizers_mm.kernels._register import define

TILE = 1 << 22
"""Logits of one tile: 16 MB in float32. Backward passes hold four such tiles."""


class Assignment(NamedTuple):
    """Codes with the largest logits, and the entropies of P = softmax(entropy_scale * s), zero where that is 0.

    propagated [N, D]: rows[ids] in value; the gradient is that of softmax(scale * s) times the values held constant,
    and of the rows chosen. rows [N, D]: the rows chosen, differentiable in `values` alone. ids int64 [N].
    sample_entropy: mean over rows of the entropy of P. batch_entropy: -sum(m log(m + eps)), m the mean of P over rows.
    """

    propagated: Tensor
    rows: Tensor
    ids: Tensor
    sample_entropy: Tensor
    batch_entropy: Tensor


def largest_logit(
    z: Float[Tensor, "n d"], keys: Float[Tensor, "k d"], bias: Float[Tensor, "k"] | None = None
) -> Int[Tensor, "n"]:
    """argmax_k of z . keys[k] + bias[k], exactly that of float64, the lowest index on ties; int64 [N]."""
    bias = None if bias is None else bias.detach()
    return torch.ops.tokenizers_mm.largest_logit(z.detach(), keys.detach(), bias)


@torch.no_grad()
def logit_margin(z: Float[Tensor, "n d"], keys: Float[Tensor, "k d"]) -> Float[Tensor, "n"]:
    """Margins: `largest_logit` gives the same for any change of z with a norm below margin / 2; float64.

    A change e of z moves the difference of two logits by at most |e| |key1 - key2|, which is at most twice the largest
    norm of a key.
    """
    wide, most = keys.double(), keys.double().norm(dim=1).max().clamp_min(1e-300)
    if len(wide) == 1:
        return torch.full((len(z),), torch.inf, dtype=torch.float64, device=z.device)
    tops = [(part.double() @ wide.T).topk(2, dim=1).values for part in z.split(max(1, TILE // len(wide)))]
    return (torch.cat([top[:, 0] - top[:, 1] for top in tops]) if tops else wide.new_empty(0)) / most


def assign(
    z: Float[Tensor, "n d"],
    keys: Float[Tensor, "k d"],
    values: Float[Tensor, "k v"] | None = None,
    *,
    scale: float = 1.0,
    entropy_scale: float = 0.0,
    eps: float = 1e-5,
) -> Assignment:
    """Codes of z with gradients through all logits (index backpropagation), and the entropies of the assignment.

    values: rows that are mixed and returned, the keys themselves where None (IBQ). Memory: a few tiles of `TILE`
    numbers beside inputs and gradients; inside torch.func and forward-mode differentiation N x K numbers.
    """
    if _transformed(z, keys):
        ids = largest_logit(z, keys)
        entropies = _plain_entropies(z, keys, None, entropy_scale, eps)
        rows = F.embedding(ids.clamp_min(0), keys if values is None else values)
        soft = (scale * (z @ keys.T)).softmax(-1) @ (keys if values is None else values).detach()
        return Assignment(rows + (soft - soft.detach()), rows, ids, *entropies)
    found = torch.ops.tokenizers_mm.assign(z.detach(), keys.detach(), None, True, entropy_scale, eps)
    outputs = _Assign.apply(z, keys, values, None, *found, (scale, entropy_scale, eps))
    propagated, rows, entropies = outputs  # type: ignore[misc]
    return Assignment(propagated, rows, found[2], entropies[0], entropies[1])


def assignment_entropies(
    z: Float[Tensor, "n d"],
    keys: Float[Tensor, "k d"],
    bias: Float[Tensor, "k"] | None = None,
    *,
    scale: float,
    eps: float = 1e-5,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """sample_entropy and batch_entropy of `Assignment` for P = softmax(scale * s), differentiable in all tensors."""
    if _transformed(z, keys):
        return _plain_entropies(z, keys, bias, scale, eps)
    constant = None if bias is None else bias.detach()
    found = torch.ops.tokenizers_mm.assign(z.detach(), keys.detach(), constant, False, scale, eps)
    entropies = _Assign.apply(z, keys, None, bias, *found, (0.0, scale, eps))[2]  # type: ignore[index]
    return entropies[0], entropies[1]


def _transformed(*tensors: Tensor) -> bool:
    """True if a transform of torch.func or forward-mode differentiation is at work, which `_Assign` does not serve."""
    return torch._C._are_functorch_transforms_active() or any(
        torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    )


def _plain_entropies(z: Tensor, keys: Tensor, bias: Tensor | None, scale: float, eps: float) -> tuple[Tensor, Tensor]:
    """The definition."""
    if scale == 0:
        return z.new_zeros(()), z.new_zeros(())
    logits = z @ keys.T if bias is None else z @ keys.T + bias
    log_p = (scale * logits).log_softmax(-1)
    p = log_p.exp()
    mean = p.sum(0) / max(1, len(z))
    return -(p * log_p).sum() / max(1, len(z)), -(mean * (mean + eps).log()).sum()


class _Assign(torch.autograd.Function):
    """Values that `tokenizers_mm::assign` has found, with their gradients."""

    @staticmethod
    def forward(ctx, z, keys, values, bias, entropies, mean, ids, scales):
        ctx.save_for_backward(z, keys, values, bias, mean, ids)
        ctx.scales = scales
        rows = F.embedding(ids.clamp_min(0), keys if values is None else values) if scales[0] else z.new_zeros(())
        return rows, rows.clone(), entropies.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        *inputs, mean, ids = ctx.saved_tensors
        found = torch.ops.tokenizers_mm.assign_backward(*inputs, mean, ids, list(gradients), list(ctx.scales))
        found = [tensor if needed else None for tensor, needed in zip(found, ctx.needs_input_grad[:4], strict=True)]
        return *found, None, None, None, None


def _tiles(z: Tensor, keys: Tensor, bias: Tensor | None):
    """Slices of rows and their logits, which the caller may overwrite."""
    step = max(1, TILE // keys.shape[0])
    for start in range(0, len(z), step):
        part = slice(start, start + step)
        yield part, z[part] @ keys.T if bias is None else torch.addmm(bias, z[part], keys.T)


def _search(logits: Tensor, z: Tensor, keys: Tensor, bias: Tensor | None, longest: Tensor) -> Tensor:
    """Indices of the largest of `logits` [n, K]; those that rounding leaves open are computed in float64."""
    best, ids = logits.max(1)
    slack = _rounding(z, keys.shape[1]) * z.norm(dim=1) * longest
    if bias is not None:
        slack = slack + 2 * torch.finfo(z.dtype).eps * (best.abs() + bias.abs().max())
    least = best - 2 * slack
    second = logits.scatter_(1, ids[:, None], -torch.inf).amax(1)
    logits.scatter_(1, ids[:, None], best[:, None])
    open_rows = (~(second < least)).nonzero()[:, 0]
    for row in open_rows.split(max(1, TILE // keys.numel())):
        near = (logits[row] >= least[row, None]) | ~torch.isfinite(slack[row])[:, None]
        ids[row] = _decide(near, z[row], keys, bias)
    return ids


def _rounding(z: Tensor, dim: int) -> float:
    """Bound of the error of a product of `dim` terms, relative to both norms; TF32 and bfloat16 round the factors."""
    if z.dtype == torch.float64:
        return (dim + 8) * 2.0**-53
    backend: Any = torch.backends.cuda if z.is_cuda else torch.backends.mkldnn
    matmul: Any = getattr(backend, "matmul", None)
    # The second form is that of torch before 2.9, which has no setting for each backend.
    setting = matmul.fp32_precision if hasattr(matmul, "fp32_precision") else torch.get_float32_matmul_precision()
    factors = {"tf32": 2.0**-10, "high": 2.0**-10, "bf16": 2.0**-7, "medium": 2.0**-7}
    return (dim + 8) * 2.0**-24 + factors.get(setting, 0.0)


def _decide(near: Tensor, z: Tensor, keys: Tensor, bias: Tensor | None) -> Tensor:
    """Lexicographic maximum of (float64 logit, -index) over the candidates `near` [n, K]."""
    rows, codes = near.nonzero(as_tuple=True)
    exact = torch.empty(len(rows), dtype=torch.float64, device=z.device)
    for part in torch.arange(len(rows), device=z.device).split(max(1, TILE // z.shape[1])):
        exact[part] = (z[rows[part]].double() * keys[codes[part]].double()).sum(1)
    if bias is not None:
        exact += bias[codes].double()
    largest = exact.new_full((len(z),), -torch.inf).scatter_reduce_(0, rows, exact, "amax")
    chosen = torch.where(exact == largest[rows], codes, len(keys))
    ids = codes.new_full((len(z),), len(keys)).scatter_reduce_(0, rows, chosen, "amin")
    return torch.where(ids < len(keys), ids, 0)


def _largest_logit(z: Tensor, keys: Tensor, bias: Tensor | None) -> Tensor:
    longest = keys.norm(dim=1).max()
    ids = torch.empty(len(z), dtype=torch.int64, device=z.device)
    for part, logits in _tiles(z, keys, bias):
        ids[part] = _search(logits, z[part], keys, bias, longest)
    return ids


def _fake_largest_logit(z, keys, bias):
    return z.new_empty(z.shape[:1], dtype=torch.int64)


def _batched_largest_logit(info, in_dims, z, keys, bias):
    def at(tensor, dim, index):
        return tensor if dim is None else tensor.select(dim, index)

    results = [
        _largest_logit(*(at(t, d, i) for t, d in zip((z, keys, bias), in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    return torch.stack(results), 0


def _assign(
    z: Tensor, keys: Tensor, bias: Tensor | None, search: bool, scale: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Both entropies [2], the mean of P [K], and with `search` the ids [N], in one pass over tiles."""
    ids = torch.zeros(len(z), dtype=torch.int64, device=z.device)
    mean, sample = z.new_zeros(len(keys) if scale else 0), z.new_zeros(())
    longest = keys.norm(dim=1).max()
    for part, logits in _tiles(z, keys, bias):
        if search:
            ids[part] = _search(logits, z[part], keys, bias, longest)
        if scale:
            p = _probabilities(logits, scale)
            mean += p.sum(0)
            sample -= logits.mul_(p).sum()
    mean /= max(1, len(z))
    batch = -(mean * (mean + eps).log()).sum()
    return torch.stack([sample / max(1, len(z)), batch]), mean, ids


def _fake_assign(z, keys, bias, search, scale, eps):
    return z.new_empty(2), z.new_empty(len(keys) if scale else 0), z.new_empty(z.shape[:1], dtype=torch.int64)


def _assign_backward(
    z: Tensor,
    keys: Tensor,
    values: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    ids: Tensor,
    gradients: list[Tensor],
    scales: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of z, keys, values and bias (empty where there are none) from those of `_Assign`'s outputs."""
    to_propagated, to_rows, to_entropies = gradients
    scale, entropy_scale, eps = scales
    to_z, to_keys = torch.zeros_like(z), torch.zeros_like(keys)
    to_values = z.new_zeros(0) if values is None else torch.zeros_like(values)
    to_bias = z.new_zeros(0 if bias is None else len(keys))
    if scale:
        (to_keys if values is None else to_values).index_add_(0, ids.clamp_min(0), to_propagated + to_rows)
    count = max(1, len(z))
    slope = (mean + eps).log() + mean / (mean + eps)  # of -batch_entropy in the mean
    for part, logits in _tiles(z, keys, bias):
        to_logits = torch.zeros((), dtype=z.dtype, device=z.device)
        if scale:
            to_logits = to_propagated[part] @ (keys if values is None else values).T
            p = (logits * scale if scale != 1 else logits).softmax(1)
            _softmax_backward(p, to_logits).mul_(scale)
            del p
        if entropy_scale:
            p = _probabilities(logits, entropy_scale)
            _softmax_backward(p, logits.mul_(to_entropies[0]).add_(slope * to_entropies[1]))
            del p
            to_logits = logits.mul_(-entropy_scale / count).add_(to_logits)
        to_z[part] = to_logits @ keys
        to_keys.addmm_(to_logits.T, z[part])
        if bias is not None:
            to_bias += to_logits.sum(0)
    return to_z, to_keys, to_values, to_bias


def _fake_assign_backward(z, keys, values, bias, *rest):
    empty = z.new_empty(0)
    return (
        torch.empty_like(z),
        torch.empty_like(keys),
        empty if values is None else torch.empty_like(values),
        empty.clone() if bias is None else torch.empty_like(bias),
    )


def _probabilities(logits: Tensor, scale: float) -> Tensor:
    """softmax(scale * logits); its logarithm takes the place of the logits.

    The largest logit is taken off before the scale: the difference is exact, and small where the probability is not.
    """
    p = logits.sub_(logits.amax(1, keepdim=True)).mul_(scale).softmax(1)
    logits.add_(p.amax(1, keepdim=True).log())
    return p


def _softmax_backward(p: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of logits from that of p = softmax(logits), in its place."""
    total = gradient.mul_(p).sum(1, keepdim=True)
    return gradient.addcmul_(p, total, value=-1)


define("largest_logit(Tensor z, Tensor keys, Tensor? bias) -> Tensor", _largest_logit, _fake_largest_logit)
define(
    "assign(Tensor z, Tensor keys, Tensor? bias, bool search, float scale, float eps) -> (Tensor, Tensor, Tensor)",
    _assign,
    _fake_assign,
)
define(
    "assign_backward(Tensor z, Tensor keys, Tensor? values, Tensor? bias, Tensor mean, Tensor ids, "
    "Tensor[] gradients, float[] scales) -> (Tensor, Tensor, Tensor, Tensor)",
    _assign_backward,
    _fake_assign_backward,
)
torch.library.register_vmap("tokenizers_mm::largest_logit", _batched_largest_logit)
