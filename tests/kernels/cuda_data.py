"""Inputs for the tests of the CUDA search, and what a right answer is."""

import random

import torch
from torch import Tensor

CASES = (
    "gauss",
    "clustered",
    "anisotropic",
    "narrow",
    "duplicates",
    "identical",
    "log_normal_norms",
    "clump_at_mean",
    "far_clump",
    "offset",
    "token_offset",
    "tiny_codes",
    "heavy_tail",
    "scaled_dims",
    "not_finite",
    "no_finite_code",
    "overflow_float32",
    "overflow_float64",
    "underflow_float64",
    "half",
    "bfloat16",
    "mixed",
    "strided",
)
TWO_PART_WEIGHTS = ((1.0, 1.0), (0.3, 7.0), (0.0, 1.0), (1.0, 0.0))


def make_case(name: str, rows: int) -> tuple[Tensor, Tensor]:
    """Tokens and codebook of one of CASES, on the CPU."""
    g = torch.Generator().manual_seed(CASES.index(name))
    num_codes, dim = 1500, 32
    z, c = torch.randn(rows, dim, generator=g), torch.randn(num_codes, dim, generator=g)
    pick = torch.randint(num_codes, (rows,), generator=g)
    if name == "clustered":
        c = torch.nn.functional.normalize(c, dim=1)
        z = torch.nn.functional.normalize(c[pick] + 0.05 * z, dim=1)
    elif name == "anisotropic":
        turn = torch.linalg.qr(torch.randn(dim, dim, generator=g))[0] * torch.arange(1, dim + 1)[:, None] ** -1.0
        mean = 2 * torch.randn(dim, generator=g)
        z, c = z @ turn + mean, c @ turn + mean
    elif name == "narrow":
        z, c = z[:, :8].contiguous(), c[:, :8].contiguous()
    elif name == "duplicates":
        c = c[:300].repeat(5, 1)
    elif name == "identical":
        c = c[:1].expand(num_codes, dim)
    elif name == "log_normal_norms":
        c = c * torch.exp(1.5 * torch.randn(num_codes, 1, generator=g))
    elif name == "clump_at_mean":
        c[: num_codes * 9 // 10] *= 1e-4
    elif name == "far_clump":
        c[: num_codes // 2] = 300 + 1e-3 * c[: num_codes // 2]
    elif name == "offset":
        z, c = z + 1000, c + 1000
    elif name == "token_offset":
        z = z + 100
    elif name == "tiny_codes":
        c = (torch.rand(num_codes, dim, generator=g) * 2 - 1) / num_codes / 16
    elif name == "heavy_tail":
        z = z * torch.exp(3 * torch.randn(rows, 1, generator=g))
        z[0] = 0
    elif name == "scaled_dims":
        scale = torch.exp(1.5 * torch.randn(dim, generator=g))
        z, c = z * scale, c * scale
    elif name == "not_finite":
        c[3, 4], c[700, 0], c[1, 1] = torch.nan, torch.inf, -torch.inf
        z[0, 0], z[5, 3], z[6, 6] = torch.nan, torch.inf, -torch.inf
    elif name == "no_finite_code":
        c = torch.full((5, dim), torch.nan)
    elif name == "overflow_float32":
        z[1], z[2, 0], c[10] = 1e20 * z[1], 3e38, 2e38
    elif name == "overflow_float64":
        z, c = z.double(), c.double()
        z[1], c[10] = 1e160 * z[1], 1e170
    elif name == "underflow_float64":
        z, c = z.double() * 1e-150, c.double() * 1e-150
    elif name == "half":
        z, c = z.half(), c.half()
    elif name == "bfloat16":
        z, c = z.bfloat16(), c.bfloat16()
    elif name == "mixed":
        z, c = z.bfloat16(), c.double()
    elif name == "strided":
        z, c = z.T.contiguous().T, c.repeat(1, 2)[:, ::2]
    return z, c


def hidden_second_case() -> tuple[Tensor, Tensor]:
    """Tokens beside a group of equal codes; the pass leaves the rest of the tile, far away, out of its records."""
    g = torch.Generator().manual_seed(0)
    far = 10 * torch.nn.functional.normalize(torch.randn(120, 4, generator=g), dim=1)
    return 0.01 * torch.randn(9, 4, generator=g), torch.cat([torch.zeros(16, 4), far, -far])


def random_case(seed: int) -> tuple[Tensor, Tensor]:
    """Tokens and codebook of a random shape, put through random changes of scale, offset, norms and duplicates."""
    choose, g = random.Random(seed), torch.Generator().manual_seed(seed)
    num_codes, dim = (
        choose.choice([1, 3, 17, 100, 300, 700]),
        choose.choice([1, 2, 3, 5, 8, 9, 10, 11, 16, 33, 70, 200]),
    )

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    z, c = normal(16, dim), normal(num_codes, dim)
    for _ in range(choose.randint(0, 3)):
        power = 10.0 ** choose.uniform(-9, 6)
        spread = choose.uniform(0.5, 5.0)
        scale = torch.exp(spread * normal(dim))
        near = c[torch.randint(num_codes, (16,), generator=g)] + min(power, 1.0) * z
        z, c = choose.choice(
            [
                (z * power, c),
                (z, c * power),
                (z + power, c + power),
                (z, c * torch.exp(spread * normal(num_codes, 1))),
                (z * torch.exp(spread * normal(16, 1)), c),
                (near, c),
                (z, c[torch.randint(num_codes, (num_codes,), generator=g)]),
                (z * scale, c * scale),
                (torch.round(z * 2) / 2, torch.round(c)),
            ]
        )
    dtypes = [torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16]
    return z.to(choose.choice(dtypes)), c.to(choose.choice(dtypes))


def float64_distances(zs: tuple[Tensor, ...], codebooks: tuple[Tensor, ...], weights: tuple[float, ...]) -> Tensor:
    """Every distance in the difference form; unusable codes at NaN."""
    total = torch.zeros(zs[0].shape[0], codebooks[0].shape[0], dtype=torch.float64, device=zs[0].device)
    for z, codebook, weight in zip(zs, codebooks, weights, strict=True):
        for rows in torch.arange(z.shape[0], device=z.device).split(64):
            total[rows] += weight * (z[rows, None].double() - codebook.double()).square().sum(-1)
        total[:, ~torch.isfinite(codebook).all(1)] = torch.nan
    return total


def float64_margins(
    ids: Tensor, zs: tuple[Tensor, ...], codebooks: tuple[Tensor, ...], weights: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    """Margin by which the nearest code that differs from code ids[i] in some value is farther, not squared, and its
    squared distance. Infinity where no other code can be chosen, zero where nothing is at a finite distance, NaN at
    ids of -1.
    """
    table = float64_distances(zs, codebooks, weights)
    same = torch.ones(len(ids), table.shape[1], dtype=torch.bool, device=ids.device)
    for codebook in codebooks:
        for rows in torch.arange(len(ids), device=ids.device).split(64):
            same[rows] &= (codebook[ids[rows], None] == codebook).all(-1)
    others = torch.where(same | torch.isnan(table), torch.inf, table).amin(1)
    chosen = table[torch.arange(len(ids), device=ids.device), ids]
    chosen = torch.where(torch.isnan(chosen), torch.inf, chosen)
    margins = torch.where(others > chosen, others.sqrt() - chosen.sqrt(), 0.0)
    return torch.where(ids < 0, torch.nan, margins), others


def assert_margins(
    margins: Tensor,
    ids: Tensor,
    zs: tuple[Tensor, ...],
    codebooks: tuple[Tensor, ...],
    weights: tuple[float, ...],
) -> None:
    """Margins equal the float64 ones to 1e-12 of the roots of the distances they are made of."""
    expected, others = float64_margins(ids, zs, codebooks, weights)
    assert torch.equal(torch.isnan(margins), ids < 0)
    known = torch.isfinite(expected)
    assert (margins[expected == torch.inf] == torch.inf).all()
    assert (margins[known] >= 0).all()
    assert ((margins - expected).abs()[known] <= torch.nan_to_num(1e-12 * others[known].sqrt(), posinf=0.0)).all()


def assert_nearest(
    ids: Tensor, distances: Tensor, zs: tuple[Tensor, ...], codebooks: tuple[Tensor, ...], weights: tuple[float, ...]
) -> None:
    """Ids equal the float64 ones, save where two different codes are equally far to 1e-12 of the distance."""
    expected = float64_distances(zs, codebooks, weights)
    finite = torch.stack([torch.isfinite(z).all(1) for z in zs]).all(0)
    table = torch.where(torch.isfinite(expected), expected, torch.inf)
    best = table.argmin(1)
    far = finite & torch.isinf(table.amin(1))
    assert (ids[~finite] == -1).all()
    assert torch.isnan(distances[~finite]).all()
    assert (ids[far] == 0).all()
    assert (distances[far] == torch.inf).all()
    rows = torch.nonzero(finite & ~far)[:, 0]
    found, wanted = table[rows, ids[rows]], table[rows, best[rows]]
    same = ids[rows] == best[rows]
    near = (found - wanted).abs() <= 1e-12 * wanted
    differ = torch.stack([(c[ids[rows]] != c[best[rows]]).any(1) for c in codebooks]).any(0)
    assert (same | (near & differ)).all(), f"{int((~same).sum())} of {rows.numel()} ids differ"
    torch.testing.assert_close(distances[rows], wanted, rtol=1e-12, atol=0)
