"""Classes and captions by a text tower: towers whose answers are known, tiny models of transformers, the own tower."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import processors

from tests.eval.towers import ColourTower
from tests.llm.fakes import words
from tests.models.test_tokenflow import tiny_config
from tests.models.test_untrusted_configs import address_space
from tokenizers_mm._images import image_to_tensor
from tokenizers_mm.data.scenes import COLOURS, make_scene
from tokenizers_mm.eval.base import Batch, Setup
from tokenizers_mm.eval.candidates import CodecCandidate, Ours
from tokenizers_mm.eval.codecs import Codec
from tokenizers_mm.eval.images import ImageSource
from tokenizers_mm.eval.protocols import PROTOCOLS
from tokenizers_mm.eval.report import make_report
from tokenizers_mm.eval.run import begin, carry_out
from tokenizers_mm.eval.semantics import TEMPLATES, Retrieval, ZeroShot, recall_at
from tokenizers_mm.eval.towers import ImageTextModel, open_tower, save_contrast
from tokenizers_mm.losses.captions import CaptionConfig, CaptionContrast
from tokenizers_mm.models.tokenflow import TokenFlow

PROTOCOL = PROTOCOLS["default"]
NAMES = ("red", "green", "blue", "yellow")


def squares(colours: list[str]) -> torch.Tensor:
    """A coloured square on grey for each name, [N, 3, 32, 32]."""
    images = []
    for colour in colours:
        image = Image.new("RGB", (32, 32), (112, 112, 112))
        image.paste(COLOURS[colour], (4, 4, 28, 28))
        images.append(image_to_tensor(image))
    return torch.stack(images)


def test_known_answers() -> None:
    """Six of eight reconstructions keep their colour; one caption tells two images, one image has none."""
    truth: list[str] = [*NAMES, *NAMES]
    made = [*NAMES, "red", "green", "yellow", "blue"]
    captions = [*(f"a {name} square" for name in NAMES), "a red square", "", "a large blue thing", "the yellow one"]
    setup = Setup(PROTOCOL, tower=ColourTower(), classes=NAMES)
    zero_shot, retrieval = ZeroShot(setup), Retrieval(setup)
    labels = [NAMES.index(name) for name in truth]
    for part in (slice(0, 3), slice(3, 8)):
        batch = Batch(
            squares(truth[part]), squares(made[part]), labels=labels[part], captions=captions[part], features=None
        )
        zero_shot.update(batch)
        retrieval.update(batch)
    assert zero_shot.result() == {"mean": 6 / 8, "chance": 2 / 8, "originals": 1.0}
    assert list(zero_shot.per_image()) == [1, 1, 1, 1, 1, 1, 0, 0]
    # six different captions; those of blue and of yellow are two each, which the tower cannot tell apart
    found, each = retrieval.result(), list(retrieval.per_image())
    assert each[:5] == [1, 1, 0.5, 0.5, 1]
    assert math.isnan(each[5])
    assert each[6:] == [0, 0], "the wrong colour was made"
    assert found["mean"] == pytest.approx(4 / 7)
    assert found["chance"] == 1 / 6
    assert found["recall_5"] < found["recall_10"] == 1.0
    assert found["originals"] == pytest.approx((3 + 4 * 0.5) / 7)
    # one of two blue images is right, and one of two yellow ones; "a large blue thing" was made yellow
    assert found["text_to_image_recall_1"] == pytest.approx((1 + 1 + 0.5 + 0.5 + 0 + 0) / 6)


def test_recall_with_ties_is_that_of_a_random_order() -> None:
    similar = torch.tensor([[3.0, 2.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 1.0, 2.0], [1.0, 2.0, 2.0, 0.0]])
    right = torch.tensor([[0, 1, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 0, 1]]).bool()
    assert recall_at(similar, right, 1).tolist() == pytest.approx([0, 1 / 4, 2 / 3, 0])
    assert recall_at(similar, right, 2).tolist() == pytest.approx([1, 2 / 4, 1, 0])
    assert recall_at(similar, right, 3).tolist() == pytest.approx([1, 3 / 4, 1, 1])
    assert recall_at(similar, right, 9).tolist() == pytest.approx([1, 1, 1, 1])


def test_a_tower_that_knows_nothing_is_at_chance() -> None:
    class Blind(ColourTower):
        def images(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ones(len(x), 3)

        def texts(self, texts: Any) -> torch.Tensor:
            return torch.ones(len(texts), 3)

    source = ImageSource.at("scenes", limit=64, crop=32)
    codec = CodecCandidate(Codec.parse("jpeg", "q50"))
    run = begin([codec], source, Setup(PROTOCOL, tower=Blind()), ["zero_shot", "retrieval"])
    (row,) = make_report(carry_out(run))["tokenizers"]
    entry = row["metrics"]["retrieval"]
    assert entry["mean"] == pytest.approx(entry["chance"]) == pytest.approx(1 / 62), "two captions come twice"
    assert entry["recall_10"] == pytest.approx(10 / 62)
    assert row["metrics"]["zero_shot"]["mean"] <= row["metrics"]["zero_shot"]["chance"]


def test_scenes_are_the_built_in_data_and_values_have_intervals() -> None:
    """A tower that sees colours finds captions better than chance, and less well in reconstructions of few bits."""
    source = ImageSource.at("scenes", limit=64, crop=32)
    assert source.read(5).caption == make_scene(5, "heldout").caption
    assert source.classes[source.labels[5]] == "{0.colour} {0.shape}".format(make_scene(5, "heldout").objects[0])
    codecs = [CodecCandidate(Codec.parse("jpeg", f"q{quality}")) for quality in (1, 90)]
    setup = Setup(PROTOCOL, tower=ColourTower())
    report = make_report(carry_out(begin(codecs, source, setup, ["zero_shot", "retrieval"])))
    for name in ("zero_shot", "retrieval"):
        poor, good = (row["metrics"][name] for row in report["tokenizers"])
        assert good["low"] < good["mean"] < good["high"]
        assert good["mean"] > 1.5 * good["chance"] > 0
        assert good["originals"] >= poor["mean"]
        assert (good["images"], good["left_out"]) == (64, 0)
    assert {pair["metric"] for pair in report["pairs"]} == {"zero_shot", "retrieval"}
    assert len(ImageSource.at("scenes").names) == 256


def model_of_transformers(kind: str, place: Path) -> Any:
    """A tiny random model with a text tokenizer, saved."""
    transformers = pytest.importorskip("transformers", reason="an extra: models of images and texts")
    texts = [form.format(name) for form in TEMPLATES for name in NAMES]
    tokenizer = words(texts)
    end = (tokenizer.eos_token, tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(f"$A {end[0]}", special_tokens=[end])
    torch.manual_seed(0)
    common = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": 0}
    text = {**common, "vocab_size": len(tokenizer), "max_position_embeddings": 12, **special}
    vision = {**common, "image_size": 16, "patch_size": 8}
    name = {"clip": "CLIP", "siglip": "Siglip"}[kind]
    config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=vision)
    model = getattr(transformers, f"{name}Model")(config).eval()
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    (place / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]})
    )
    return model, tokenizer


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.filterwarnings("ignore")
def test_models_of_transformers(kind: str, tmp_path: Path) -> None:
    """The same answers as the model's own logits, from a directory and from objects."""
    model, tokenizer = model_of_transformers(kind, tmp_path)
    images = torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    labels = [index % 4 for index in range(12)]
    captions = [f"a photo of a {NAMES[label]}." for label in labels]
    found = []
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
    for tower in (open_tower(str(tmp_path)), ImageTextModel(model, tokenizer, mean, std)):
        setup = Setup(PROTOCOL, tower=tower, classes=NAMES)
        metrics = ZeroShot(setup), Retrieval(setup)
        for metric in metrics:
            metric.update(Batch(images, images, labels=labels, captions=captions))
        found.append([list(metric.per_image()) for metric in metrics])
        assert metrics[0].result()["mean"] == metrics[0].result()["originals"]
    assert found[0] == found[1]
    pixels = ((images + 1) / 2 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    padding = {"padding": "max_length", "max_length": 12} if kind == "siglip" else {"padding": True}
    told = tokenizer([f"a photo of a {name}." for name in NAMES], return_tensors="pt", **padding)
    told.pop("token_type_ids", None)
    with torch.no_grad():
        logits = model(pixel_values=pixels, **told).logits_per_image
    expected = (logits.argmax(1) == torch.tensor(labels)).double()
    assert found[0][1] == expected.tolist(), "a caption is the nearest of four where the model's logit is the highest"


def test_what_is_no_tower_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="zero_shot: expected a tower of images and texts, got none"):
        ZeroShot(Setup(PROTOCOL, classes=NAMES))
    with pytest.raises(ValueError, match=r"tower: expected a directory with a config\.json"):
        Retrieval(Setup(PROTOCOL, {"tower": str(tmp_path / "none")}))
    with pytest.raises(ValueError, match="zero_shot: expected images with classes"):
        ZeroShot(Setup(PROTOCOL, tower=ColourTower()))
    retrieval = Retrieval(Setup(PROTOCOL, tower=ColourTower()))
    retrieval.update(Batch(squares(["red"]), squares(["red"])))
    with pytest.raises(ValueError, match="retrieval: expected images with two or more different captions, got 0"):
        retrieval.result()


def test_the_own_tower_reads_semantic_features(tmp_path: Path) -> None:
    """A text tower trained by captions, saved and read back, gives the similarities of its own forward pass."""
    torch.manual_seed(0)
    tokenizer = TokenFlow.from_config(tiny_config()).eval()
    ours = Ours("ours", tokenizer)
    source = ImageSource.at("scenes", limit=12, crop=32)
    images = torch.stack([image_to_tensor(source.read(index).image) for index in range(12)])
    semantic = ours.semantic(images)
    assert semantic is not None
    contrast = CaptionContrast(semantic.shape[-1], CaptionConfig(16, 1, 2, 64, 30)).eval()
    save_contrast(contrast, tmp_path / "captions")
    setup = Setup(PROTOCOL, {"tower": str(tmp_path / "captions")})
    codec = CodecCandidate(Codec.parse("jpeg", "q50"))
    run = carry_out(begin([ours, codec], source, setup, ["psnr", "zero_shot", "retrieval"]))
    first, second = make_report(run)["tokenizers"]
    with torch.no_grad():
        seen = contrast.encode_images(semantic)
        told = contrast.encode_text([source.read(index).caption for index in range(12)])
    best = torch.nn.functional.cosine_similarity(seen[:, None], told[None], dim=2).argmax(1)
    assert first["metrics"]["retrieval"]["mean"] == float((best == torch.arange(12)).double().mean())
    assert "originals" not in first["metrics"]["retrieval"], "nothing was reconstructed in pixels"
    assert second["missing"]["retrieval"] == "retrieval: expected a tokenizer with a semantic decoder, got jpeg q50"
    assert "psnr" in second["metrics"]
    (tmp_path / "captions" / "model.safetensors").write_bytes(b"junk")
    open_tower.cache_clear()
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        open_tower(str(tmp_path / "captions"))
    save_contrast(contrast, tmp_path / "captions")
    config = tmp_path / "captions" / "config.json"
    config.write_text(config.read_text().replace('"width": 16', '"width": 65536').replace('"depth": 1', '"depth": 256'))
    with address_space(1 << 30), pytest.raises(ValueError, match="expected exactly the tensors of the model"):
        open_tower(str(tmp_path / "captions"))
