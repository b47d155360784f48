"""nearest_code_shared against the joint distance matrix of plain torch: python -m benchmarks.nearest_code_shared."""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from tokenizers_mm import kernels

N, K, DIMS = 4096, 32768, (768, 32)


def plain(zs: list[Tensor], codebooks: list[Tensor]) -> Tensor:
    """The published form: normalise, add the two distance matrices, argmin."""
    total: Tensor | float = 0.0
    for z, c in zip(zs, codebooks, strict=True):
        z, c = F.normalize(z, dim=-1), F.normalize(c, dim=-1)
        total = total + z.square().sum(1, keepdim=True) + c.square().sum(1) - 2 * z @ c.T
    assert isinstance(total, Tensor)
    return total.argmin(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    about = harness.machine()
    zs, codebooks = [torch.randn(N, d) for d in DIMS], [torch.randn(K, d) for d in DIMS]

    def ours(pack: bool) -> Tensor:
        if pack:
            kernels.invalidate()
        ids = kernels.nearest_code_shared(zs, codebooks, normalize=True)
        assert isinstance(ids, Tensor)
        return ids

    for threads in options.threads:
        torch.set_num_threads(threads)
        methods = {
            "ours": lambda: ours(True),
            "ours, packed": lambda: ours(False),
            "distance matrices": lambda: plain(zs, codebooks),
        }
        times = harness.interleave(methods, options.rounds)
        rows = [[name, f"{value:.1f} ms", f"{value / times['ours']:.2f}"] for name, value in times.items()]
        print(f"\nN={N} K={K} D={DIMS}, {threads} thread(s)\n{harness.table(rows)}")
        row = {"n": N, "k": K, "dims": DIMS, "threads": threads, "milliseconds": times}
        harness.record("nearest_code_shared", row, about)


if __name__ == "__main__":
    main()
