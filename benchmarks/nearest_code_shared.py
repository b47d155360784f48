"""nearest_code_shared against the joint distance matrix of plain torch.

    python -m benchmarks.nearest_code_shared [--shape 4096x32768x768x32] [--threads 1 2] [--rounds 5] [--record]

The shape is N x K x D1 x D2: vectors, codes, channels of each part. Wall time. "ours" packs the codebooks inside the
timed call; "ours, packed" finds them in the cache.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from tokenizers_mm import kernels

SHAPE = (4096, 32768, 768, 32)


def plain(zs: list[Tensor], codebooks: list[Tensor]) -> Tensor:
    """The published form: normalise, add the two distance matrices, argmin."""
    total: Tensor | float = 0.0
    for z, c in zip(zs, codebooks, strict=True):
        z, c = F.normalize(z, dim=-1), F.normalize(c, dim=-1)
        total = total + z.square().sum(1, keepdim=True) + c.square().sum(1) - 2 * z @ c.T
    assert isinstance(total, Tensor)
    return total.argmin(1)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--shape", type=harness.shape, default=SHAPE)
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    about = harness.machine()
    n, k, *dims = options.shape
    zs, codebooks = [torch.randn(n, d) for d in dims], [torch.randn(k, d) for d in dims]

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
        print(f"\nN={n} K={k} D={dims}, {threads} thread(s)\n{harness.table(harness.against_ours(times))}")
        if options.record:
            row = {"n": n, "k": k, "dims": dims, "threads": threads, "milliseconds": times}
            harness.record("nearest_code_shared", row, about)


if __name__ == "__main__":
    main()
