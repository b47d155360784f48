"""A tower of images and texts whose answers are known: it sees mean colours and reads names of colours."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from tokenizers_mm.data.scenes import COLOURS


class ColourTower:
    """Images as their mean colour less the mean of the border; texts as the colour that is named first."""

    reads_semantic = False

    def images(self, x: torch.Tensor) -> torch.Tensor:
        """[B, 3], of images [B, 3, H, W]."""
        border = torch.cat([x[..., 0, :], x[..., -1, :], x[..., 0], x[..., -1]], -1).median(-1).values
        return F.normalize(x.mean((2, 3)) - border, dim=1)

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """[N, 3]."""
        found = [next((word for word in text.replace(".", "").split() if word in COLOURS), "white") for text in texts]
        return F.normalize(torch.tensor([COLOURS[name] for name in found]).float() - 112, dim=1)
