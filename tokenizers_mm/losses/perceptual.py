"""Perceptual distances over VGG16, from local files of weights: LPIPS (arXiv 1801.03924, through the `lpips` package),
also a training term, and DISTS (arXiv 2004.07728)."""

import importlib.util
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_mm._check import fail
from tokenizers_mm.functional.similarity import structure_and_texture

VGG_FILE = "vgg16-397923af.pth"
"""torchvision's ImageNet VGG16, as torch.hub stores it."""

VGG_WEIGHTS = f"the VGG16 weights {VGG_FILE} of torchvision"


class LPIPS(nn.Module):
    """Perceptual distance of images in [-1, 1]: x, y [B, 3, H, W] -> [B]. Always in evaluation mode, never trained."""

    def __init__(self) -> None:
        super().__init__()
        import lpips  # an extra: loaded when the term is used

        with warnings.catch_warnings():  # it builds VGG16 with an argument that torchvision has renamed
            warnings.simplefilter("ignore", UserWarning)
            self.net = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "LPIPS":
        """Stays in evaluation mode: its dropout must not act in training."""
        return super().train(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.net(x, y).flatten()


class DISTS(nn.Module):
    """Distance of structure and texture of images in [-1, 1]: x, y [B, 3, H, W] -> [B]. Never trained.

    VGG16's five stages, its max-pooling replaced by the root of Hann-weighted means of squares.
    """

    STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

    def __init__(self) -> None:
        super().__init__()
        layers, width = [], 3
        for stage in self.STAGES:
            for channels in stage:
                layers.append(nn.Conv2d(width, channels, 3, padding=1))
                width = channels
        self.convolutions = nn.ModuleList(layers)
        total = 3 + sum(stage[-1] for stage in self.STAGES)
        self.alpha, self.beta = (nn.Parameter(torch.zeros(total)) for _ in range(2))
        line = torch.hann_window(5, periodic=False)[1:-1]
        self.register_buffer("window", torch.outer(line, line) / line.sum().square(), persistent=False)
        self.requires_grad_(False).eval()

    def maps(self, x: Tensor) -> list[Tensor]:
        """The image in [0, 1], and the maps after the last activation of every stage."""
        x = (x + 1) / 2
        found = [x]
        mean, std = x.new_tensor((0.485, 0.456, 0.406)), x.new_tensor((0.229, 0.224, 0.225))
        x = (x - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        layers = iter(self.convolutions)
        for index, stage in enumerate(self.STAGES):
            if index > 0:
                kernel = self.window.to(x).expand(x.shape[1], 1, -1, -1)  # type: ignore[operator]
                x = (F.conv2d(x.square(), kernel, stride=2, padding=1, groups=x.shape[1]) + 1e-12).sqrt()
            for _ in stage:
                x = next(layers)(x).relu()
            found.append(x)
        return found

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return structure_and_texture(self.maps(x), self.maps(y), self.alpha, self.beta)


def load_lpips(weights: str | Path | None = None) -> LPIPS:
    """LPIPS with VGG16 weights from a file: the given one, or the one in torch.hub's cache. Nothing is downloaded."""
    state, path = _vgg_state(weights)
    model = LPIPS()
    names = {name: f"features.{name.split('.')[1]}.{name.split('.')[2]}" for name in model.net.net.state_dict()}
    with _reading(path):
        model.net.net.load_state_dict({name: state[theirs] for name, theirs in names.items()})
    return model


def load_dists(weights: str | Path | None = None, vgg: str | Path | None = None) -> DISTS:
    """DISTS with its published weights (a dict of `alpha` and `beta`) and VGG16's, from files.

    weights: by default the file that the package DISTS-pytorch carries. vgg: as of `load_lpips`.
    """
    expected = "a file with alpha and beta, such as weights.pt of the package DISTS-pytorch"
    path = Path(weights) if weights else _package_file("DISTS_pytorch", "weights.pt")
    if path is None or not path.is_file():
        fail("DISTS weights", expected, f"no file {path or ''}".strip())
    state, vgg_path = _vgg_state(vgg)
    model = DISTS()
    with _reading(path, "DISTS weights", expected):
        own = torch.load(path, map_location="cpu", weights_only=True)
        for key in ("alpha", "beta"):
            getattr(model, key).copy_(own[key].flatten())
    names = sorted({int(name.split(".")[1]) for name in state if name.startswith("features.")})
    with _reading(vgg_path):
        for number, layer in zip(names, model.convolutions, strict=True):
            layer.load_state_dict({kind: state[f"features.{number}.{kind}"] for kind in ("weight", "bias")})
    return model


def _package_file(package: str, file: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    places = spec.submodule_search_locations if spec is not None else None
    return Path(places[0]) / file if places else None


def _vgg_state(weights: str | Path | None) -> tuple[dict[str, Tensor], Path]:
    """Tensors of the file of VGG16 weights, and its path."""
    path = Path(weights) if weights else Path(torch.hub.get_dir()) / "checkpoints" / VGG_FILE
    if not path.is_file():
        fail("perceptual weights", VGG_WEIGHTS, f"no file {path}")
    with _reading(path):
        return dict(torch.load(path, map_location="cpu", weights_only=True)), path


@contextmanager
def _reading(path: Path, name: str = "perceptual weights", expected: str = VGG_WEIGHTS) -> Iterator[None]:
    """Errors of a file with other contents become one sentence."""
    try:
        yield
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, TypeError, LookupError) as error:
        fail(name, expected, f"{path} ({type(error).__name__})")
