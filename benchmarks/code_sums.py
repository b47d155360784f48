"""code_sums against index_add and one-hot matrix products.

    python -m benchmarks.code_sums [--shapes 16384x8192x32] [--threads 1 2] [--rounds 9] [--record]

Shapes are N x K x D: vectors, codes, channels. Wall time.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from benchmarks import harness
from tokenizers_mm import kernels

SHAPES = [(16384, 8192, 32), (65536, 1024, 64), (4096, 32768, 800)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--shapes", nargs="+", type=harness.shape, default=SHAPES)
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args(arguments)
    about = harness.machine()
    for n, k, d in options.shapes:
        vectors, ids = torch.randn(n, d), torch.randint(0, k, (n,))
        for threads in options.threads:
            torch.set_num_threads(threads)
            methods = {
                "ours": lambda v=vectors, i=ids, k=k: kernels.code_sums(v, i, k),
                "index_add float64": lambda v=vectors, i=ids, k=k: torch.zeros(
                    k, v.shape[1], dtype=torch.float64
                ).index_add_(0, i, v.double()),
                "index_add float32": lambda v=vectors, i=ids, k=k: torch.zeros(k, v.shape[1]).index_add_(0, i, v),
            }
            if n * k * 4 < 1 << 30:
                methods["one-hot product"] = lambda v=vectors, i=ids, k=k: F.one_hot(i, k).float().T @ v
            times = harness.interleave(methods, options.rounds)
            print(f"\nN={n} K={k} D={d}, {threads} thread(s)\n{harness.table(harness.against_ours(times))}")
            if options.record:
                harness.record("code_sums", {"n": n, "k": k, "d": d, "threads": threads, "milliseconds": times}, about)


if __name__ == "__main__":
    main()
