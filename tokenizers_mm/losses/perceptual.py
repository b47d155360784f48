"""LPIPS (arXiv 1801.03924) as a training term, through the `lpips` package and a local file of VGG16 weights."""

import pickle
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from tokenizers_mm._check import fail

VGG_FILE = "vgg16-397923af.pth"
"""torchvision's ImageNet VGG16, as torch.hub stores it."""


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


def load_lpips(weights: str | Path | None = None) -> LPIPS:
    """LPIPS with VGG16 weights from a file: the given one, or the one in torch.hub's cache. Nothing is downloaded."""
    path = Path(weights) if weights else Path(torch.hub.get_dir()) / "checkpoints" / VGG_FILE
    if not path.is_file():
        fail("perceptual weights", f"the VGG16 weights {VGG_FILE} of torchvision", f"no file {path}")
    model = LPIPS()
    try:
        state = torch.load(path, weights_only=True)
        names = {name: f"features.{name.split('.')[1]}.{name.split('.')[2]}" for name in model.net.net.state_dict()}
        model.net.net.load_state_dict({name: state[theirs] for name, theirs in names.items()})
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, TypeError, LookupError) as error:
        fail("perceptual weights", f"the VGG16 weights {VGG_FILE} of torchvision", f"{path} ({type(error).__name__})")
    return model
