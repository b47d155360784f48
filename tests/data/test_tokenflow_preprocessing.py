"""Crops, padding, pixels and metrics against TokenFlow's original, bit for bit where they are bytes."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from tests.cases import Case, case
from tokenizers_mm._images import fit_image, image_to_tensor, tensor_to_images
from tokenizers_mm.data.transforms import center_crop, random_crop
from tokenizers_mm.eval import image as metric


@pytest.fixture(scope="module")
def reference() -> Case:
    return case("tokenflow/preprocess_metrics")


@pytest.mark.parametrize(("name", "size"), [("a", 224), ("b", 256), ("c", 224), ("d", 256), ("e", 384)])
def test_crops_and_padding(name: str, size: int, reference: Case) -> None:
    outputs = reference.outputs
    picture = Image.fromarray(reference.inputs[f"{name}.rgb"].numpy())
    centre = center_crop(picture, size)
    assert np.array_equal(np.asarray(centre), outputs[f"{name}.center_crop_{size}"])
    drawn = random_crop(picture, size, random.Random(7))
    assert np.array_equal(np.asarray(drawn), outputs[f"{name}.random_crop_{size}_pyseed7"])
    corner = image_to_tensor(centre)[:, :16, :16]
    torch.testing.assert_close(corner, outputs[f"{name}.tensor_corner"], atol=2e-7, rtol=0)

    square = fit_image(picture, 384, 384, "pad")  # what a language model's image tower gets
    assert np.array_equal(np.asarray(square).transpose(2, 0, 1), outputs[f"{name}.i2t_uint8"])
    patch = image_to_tensor(square)[:, 100:116, 100:116]
    torch.testing.assert_close(patch, outputs[f"{name}.i2t_corner"], atol=2e-7, rtol=0)

    # the original writes its ground truth with a cast that cuts: many values come out lower by one; ours do not
    cut = (image_to_tensor(centre) * 0.5 + 0.5).mul(255).to(torch.uint8)
    lower = int((torch.from_numpy(np.array(centre)).permute(2, 0, 1) != cut).sum())
    assert lower == pytest.approx(int(outputs[f"{name}.gt_png_minus_crop"].abs()), rel=0.02)
    assert np.array_equal(np.asarray(tensor_to_images(image_to_tensor(centre)[None])[0]), np.asarray(centre))


def test_pixels_and_metrics(reference: Case) -> None:
    inputs, outputs = reference.inputs, reference.outputs
    written = np.stack([np.asarray(image) for image in tensor_to_images(inputs["metric.rec"])])
    assert np.array_equal(written, outputs["metric.png"])
    truth = inputs["metric.gt"]
    as_written = torch.from_numpy(written.copy()).permute(0, 3, 1, 2).float() / 127.5 - 1
    torch.testing.assert_close(metric.psnr(truth, as_written), outputs["metric.psnr"], atol=1e-4, rtol=0)


def test_the_published_ssim_is_another_measure(reference: Case) -> None:
    """The original's SSIM has a uniform window and a data range of 2 for images in [0, 1], which inflates it."""
    skimage = pytest.importorskip("skimage.metrics", reason="the original's SSIM is scikit-image's")
    inputs, outputs = reference.inputs, reference.outputs
    truth = ((inputs["metric.gt"] + 1) / 2).permute(0, 2, 3, 1).numpy()
    written = outputs["metric.png"].numpy().astype(np.float32) / 255
    for data_range, name in [(1.0, "metric.ssim_data_range_1"), (2.0, "metric.ssim_data_range_2_as_released")]:
        scores = [
            skimage.structural_similarity(a, b, data_range=data_range, channel_axis=-1)
            for a, b in zip(truth, written, strict=True)
        ]
        np.testing.assert_allclose(scores, outputs[name].numpy(), atol=1e-4)
    ours = metric.ssim(inputs["metric.gt"], outputs["metric.png"].permute(0, 3, 1, 2).float() / 127.5 - 1)
    assert bool((ours < outputs["metric.ssim_data_range_2_as_released"]).all())
