"""ssim against convolutions in float64; the same bits for any threads, planes, strips and instruction sets."""

import pytest
import torch

from tests.kernels.test_isa import has
from tokenizers_mm import kernels
from tokenizers_mm.functional.similarity import gaussian_line, uniform_line
from tokenizers_mm.kernels import _native

needs_native = pytest.mark.skipif(_native.cpu_or_none() is None, reason="the native library is not installed")
MODES = ["reference", pytest.param("native", marks=needs_native)]
C1, C2 = 1e-4, 9e-4


def pair(*shape: int, noise: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    """Planes with values in [0, 1], and the same with noise, float64."""
    g = torch.Generator().manual_seed(sum(shape))
    x = torch.rand(*shape, dtype=torch.float64, generator=g)
    return x, (x + noise * torch.randn(*shape, dtype=torch.float64, generator=g)).clamp(0, 1)


def by_convolution(x: torch.Tensor, y: torch.Tensor, line: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Equation 13 of Wang et al. 2004 with its means, variances and covariances by two-dimensional windows, [P]."""
    window = torch.outer(line, line)[None, None]
    maps = torch.stack([x, y, x * x, y * y, x * y], 1).flatten(0, 1)[:, None]
    mx, my, xx, yy, xy = torch.nn.functional.conv2d(maps, window)[:, 0].unflatten(0, (-1, 5)).unbind(1)
    contrast = (2 * (xy - mx * my) + C2) / (xx - mx**2 + yy - my**2 + C2)
    light = (2 * mx * my + C1) / (mx**2 + my**2 + C1)
    return (light * contrast).mean((1, 2)), contrast.mean((1, 2))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("height", "width", "line"),
    [
        (1, 1, uniform_line(1)),
        (1, 70, uniform_line(1)),
        (11, 11, gaussian_line()),
        (12, 75, gaussian_line()),
        (40, 139, gaussian_line()),
        (9, 72, uniform_line(8)),
        (70, 71, uniform_line(7)),
        (64, 128, uniform_line(64)),
        (30, 33, gaussian_line(16, 4.0)),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else f"k{len(value)}",
)
def test_means_over_windows(height: int, width: int, line: torch.Tensor, mode: str) -> None:
    x, y = pair(3, height, width)
    with kernels.use_kernels(mode):
        found = kernels.ssim(x, y, line, C1, C2)
        same = kernels.ssim(x, x, line, C1, C2)
    for value, expected in zip(found, by_convolution(x, y, line), strict=True):
        assert value.dtype == torch.float64
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)
    assert torch.equal(torch.stack(same), torch.ones(2, 3, dtype=torch.float64))


@needs_native
@pytest.mark.parametrize("line", [gaussian_line(), uniform_line(7), uniform_line(8)], ids=["gaussian", "7", "8"])
def test_native_equals_reference(line: torch.Tensor) -> None:
    """Also where values are large, planes are flat or the images have nothing in common."""
    x, y = pair(2, 75, 150)
    for a, b, scale in ((x, y, 1.0), (x, x.flip(2), 1.0), (255 * x, 255 * y, 255.0), (0 * x + 1, 0 * x, 1.0)):
        found = {}
        for mode in ("native", "reference"):
            with kernels.use_kernels(mode):
                found[mode] = torch.stack(kernels.ssim(a, b, line, C1 * scale**2, C2 * scale**2))
        torch.testing.assert_close(found["native"], found["reference"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_offset_is_added_to_both(mode: str) -> None:
    x, y = pair(2, 20, 90)
    with kernels.use_kernels(mode):
        found = torch.stack(kernels.ssim(2 * x - 1, 2 * y - 1, gaussian_line(), 4 * C1, 4 * C2, offset=1.0))
        expected = torch.stack(kernels.ssim(x, y, gaussian_line(), C1, C2))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_bits_everywhere(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = (t.to(dtype) for t in pair(2, 3, 83, 171))
    library = _native.cpu()
    before = library.isa
    for line in (gaussian_line(), uniform_line(7)):
        expected = torch.stack(kernels.ssim(x, y, line, C1, C2))
        assert expected.shape == (2, 2, 3)
        for threads in (1, 2, 5):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            assert torch.equal(torch.stack(kernels.ssim(x, y, line, C1, C2)), expected)
        for i in range(2):
            alone = torch.stack(kernels.ssim(x[i, 1], y[i, 1], line, C1, C2))
            assert torch.equal(alone, expected[:, i, 1])
        try:
            for name in filter(has, _native.ISAS):
                library.select_isa(name)
                assert torch.equal(torch.stack(kernels.ssim(x, y, line, C1, C2)), expected), name
        finally:
            library.select_isa(before)


@pytest.mark.parametrize("mode", MODES)
def test_dtypes_layouts_and_empty_batches(mode: str) -> None:
    x, y = pair(2, 20, 36)
    line = gaussian_line()
    with kernels.use_kernels(mode):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            a, b = x.to(dtype), y.to(dtype)
            expected = torch.stack(kernels.ssim(a.double(), b.double(), line, C1, C2))
            torch.testing.assert_close(torch.stack(kernels.ssim(a, b, line, C1, C2)), expected, rtol=0, atol=1e-12)
            torch.testing.assert_close(
                torch.stack(kernels.ssim(a, b.double(), line.float(), C1, C2)), expected, rtol=0, atol=1e-6
            )
        turned = torch.stack(kernels.ssim(x.mT, y.mT, line, C1, C2))
        assert torch.equal(turned, torch.stack(kernels.ssim(x.mT.contiguous(), y.mT.contiguous(), line, C1, C2)))
        assert kernels.ssim(x[:0], y[:0], line, C1, C2)[0].shape == (0,)
        both = torch.vmap(lambda a, b: kernels.ssim(a, b, line, C1, C2)[0])(x, y)
        assert torch.equal(both, kernels.ssim(x, y, line, C1, C2)[0])


def test_arguments() -> None:
    x, y = pair(1, 12, 12)
    line = gaussian_line()
    for arguments, message in (
        ((x[:, :10], y[:, :10], line), r"x: expected float \[\.\.\., H, W\], H and W >= 11"),
        ((x, y[:, :11], line), r"y: expected float \[1, 12, 12\]"),
        ((x.long(), y, line), "x: expected float"),
        ((x, y, line[None]), "line: expected 1 to 64 weights"),
        ((x, y, torch.ones(65) / 65), "line: expected 1 to 64 weights"),
        ((x, y, torch.tensor([0.2, 0.8])), "line: expected symmetric weights"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.ssim(*arguments, C1, C2)
    with pytest.raises(ValueError, match="c1, c2: expected above 0"):
        kernels.ssim(x, y, line, 0.0, C2)


def test_opcheck() -> None:
    x, y = pair(2, 12, 13)
    torch.library.opcheck(torch.ops.tokenizers_mm.ssim.default, (x, y, gaussian_line(), C1, C2, 0.5))


def test_it_compiles() -> None:
    x, y = pair(2, 12, 13)
    line = gaussian_line()

    def measure(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return kernels.ssim(a, b, line, C1, C2)[0] * 2

    assert torch.equal(torch.compile(measure, backend="eager", fullgraph=True)(x, y), measure(x, y))
