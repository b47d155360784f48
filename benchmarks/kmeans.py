"""kmeans against FAISS and scikit-learn, per iteration from one start.

    python -m benchmarks.kmeans [--shapes 20000x1024x16] [--threads 1 2] [--rounds 3] [--record]

Shapes are N x K x D: vectors, codes, channels. CPU time of one thread, wall time of several. "inertia" is the sum of
squared distances to the nearest code after six iterations.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from benchmarks import harness
from tokenizers_mm import kernels

Maker: TypeAlias = Callable[[Tensor, Tensor, int], Tensor]

SHAPES = [(20000, 1024, 16), (200000, 4096, 32)]
FEW, MANY = 2, 6
"""Iterations of the two runs whose difference is the time of the iterations between: starts and ends do not count."""


def ours(z: Tensor, start: Tensor, iterations: int) -> Tensor:
    return kernels.kmeans(z, len(start), init=start, iterations=iterations, tolerance=-1.0).codebook


def by_sklearn(z: Tensor, start: Tensor, iterations: int) -> Tensor:
    from sklearn.cluster import KMeans

    options: dict[str, Any] = {"n_init": 1, "max_iter": iterations, "tol": 0.0, "algorithm": "lloyd"}
    found = KMeans(len(start), init=start.numpy(), **options).fit(z.numpy())  # pyright: ignore[reportArgumentType]
    return torch.from_numpy(found.cluster_centers_)


def by_faiss(z: Tensor, start: Tensor, iterations: int) -> Tensor:
    import faiss

    options = {"niter": iterations, "max_points_per_centroid": len(z), "min_points_per_centroid": 1, "seed": 0}
    found = faiss.Kmeans(z.shape[1], len(start), **options)
    found.train(z.numpy(), init_centroids=start.numpy())
    return torch.from_numpy(found.centroids)


def set_threads(threads: int) -> None:
    import faiss
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(threads)
    threadpool_limits(threads)
    faiss.omp_set_num_threads(threads)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--shapes", nargs="+", type=harness.shape, default=SHAPES)
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    about = harness.machine()
    for n, k, d in options.shapes:
        z = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
        z += 2 * torch.randn(64, d)[torch.randint(0, 64, (n,))]
        start = z[torch.randperm(n)[:k]].contiguous()
        for threads in options.threads:
            set_threads(threads)
            makers: dict[str, Maker] = {"ours": ours, "faiss": by_faiss, "scikit-learn": by_sklearn}
            runs = {
                f"{name} {count}": partial(maker, z, start, count)
                for name, maker in makers.items()
                for count in (FEW, MANY)
            }
            clock = "cpu" if threads == 1 else "wall"
            whole = harness.interleave(runs, options.rounds, clock=clock)
            times = {name: (whole[f"{name} {MANY}"] - whole[f"{name} {FEW}"]) / (MANY - FEW) for name in makers}
            inertia = {
                name: float(kernels.nearest_code(z, maker(z, start, MANY), return_distance=True)[1].double().sum())
                for name, maker in makers.items()
            }
            rows = [[*row, f"{inertia[row[0]]:.2f}"] for row in harness.against_ours(times)]
            print(f"\nN={n} K={k} D={d}, {threads} thread(s), {clock} clock, per iteration\n{harness.table(rows)}")
            result = {"n": n, "k": k, "d": d, "threads": threads, "clock": clock}
            if options.record:
                harness.record("kmeans", {**result, "milliseconds": times, "inertia": inertia}, about)


if __name__ == "__main__":
    main()
