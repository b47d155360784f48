"""Small calls of every kernel, checked: what the sanitizers run over. `python -m tests.kernels.cuda_small [DEVICE]`.

With DEVICE cpu, TOKENIZERS_MM_CUDA_LIBRARY names the library compiled for the host.
"""

import os
import sys

import torch

from tests.kernels.cuda_data import assert_margins, assert_nearest, hidden_second_case, make_case
from tokenizers_mm.kernels import _cuda, reference


def main(device: str) -> None:
    passes = ["exact", "portable"]
    if device == "cpu" or torch.cuda.get_device_capability() == (9, 0):
        passes.append("hopper")
    generator = torch.Generator().manual_seed(0)
    pairs = [
        (torch.randn(rows, dim, generator=generator), torch.randn(codes, dim, generator=generator))
        for rows, codes, dim in ((1, 1, 1), (130, 300, 10), (3, 520, 70))
    ]
    pairs += [hidden_second_case(), tuple(tensor[:300] for tensor in make_case("not_finite", 8))]
    if device == "cpu":
        pairs = pairs[:1] + pairs[3:4]
    for name in passes:
        os.environ["TOKENIZERS_MM_CUDA_PASS"] = name
        for pair in pairs:
            z, codebook = (tensor.to(device) for tensor in pair)
            for _ in range(2):  # packs, then finds it packed and checks
                ids, distances, margins = _cuda.search((z,), (codebook,), (1.0,), margin=True)
                plain, _ = _cuda.nearest_code(z, codebook)
                assert margins is not None
                assert torch.equal(ids, plain)
                assert_nearest(ids, distances, (z,), (codebook,), (1.0,))
                assert_margins(margins, ids, (z,), (codebook,), (1.0,))
            codebook.data.mul_(0.5)  # noticed on the device: the exact path for all
            assert_nearest(*_cuda.nearest_code(z, codebook), (z,), (codebook,), (1.0,))
        z, codebook = (tensor.to(device) for tensor in pairs[-1])
        z = torch.nan_to_num(z, 0.0)
        zs, codes = z.split(2, 1)[:2], codebook.split(2, 1)[:2]
        assert_nearest(*_cuda.nearest_shared(zs, codes, (1.0, 0.3), False)[:2], zs, codes, (1.0, 0.3))
    vectors, ids = torch.randn(130, 10, generator=generator), torch.randint(0, 9, (130,), generator=generator)
    counts, sums = _cuda.code_sums(vectors.to(device), ids.to(device), 10)
    expected = reference.code_sums(vectors, ids, 10)
    assert torch.equal(counts.cpu(), expected[0])
    torch.testing.assert_close(sums.cpu(), expected[1])
    print(f"small calls: {', '.join(passes)} right")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "cuda")
