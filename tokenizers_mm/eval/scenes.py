"""A fixed rule that reads the colour of the largest object off a picture of a rendered scene."""

import torch
from torch import Tensor

from tokenizers_mm._images import check_images
from tokenizers_mm.data.scenes import COLOURS, GROUNDS


def largest_colours(images: Tensor) -> list[str]:
    """Names of the colours of the largest objects in images [B, 3, H, W] in [-1, 1].

    Every pixel takes the nearest, in RGB, of the eight colours and the three grounds; of the colours the most frequent
    wins. "" where no pixel has one. The rule knows nothing of shapes, and scenes have one object that is clearly the
    largest.
    """
    images = images.float().clamp(-1, 1)
    check_images(images)
    palette = torch.tensor([*COLOURS.values(), *GROUNDS.values()], device=images.device).float() / 127.5 - 1
    nearest = torch.cdist(images.permute(0, 2, 3, 1).flatten(1, 2), palette).argmin(-1)
    counts = torch.stack([(nearest == index).sum(1) for index in range(len(COLOURS))], dim=1)
    names = list(COLOURS)
    return [names[int(row.argmax())] if int(row.sum()) else "" for row in counts]
