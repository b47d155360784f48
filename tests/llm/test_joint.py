"""Joint tuning: where the caption's gradient goes, what the rows hold, how the two losses add up."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.llm.fakes import words
from tests.models import test_dualvitok, test_tokenflow
from tests.models.test_untrusted_configs import address_space
from tokenizers_mm.llm import FeatureProjector, ImageFeatures, MultimodalProcessor, ProjectorConfig, Segment
from tokenizers_mm.llm import VisualVocabulary as Vocabulary
from tokenizers_mm.llm.batch import IGNORED
from tokenizers_mm.llm.joint import caption_batch, caption_loss, joint_loss, num_labels, read_codes
from tokenizers_mm.llm.loss import num_predicted
from tokenizers_mm.llm.model import extend
from tokenizers_mm.models import DualViTok, ImageTokenizer, TokenFlow
from tokenizers_mm.quantizers.base import Quantizer
from tokenizers_mm.quantizers.fsq import FSQ, FSQConfig
from tokenizers_mm.quantizers.multiscale import MultiScaleQuantizer
from tokenizers_mm.quantizers.residual import ResidualConfig, ResidualQuantizer
from tokenizers_mm.quantizers.shared_index import SharedIndexConfig, SharedIndexQuantizer
from tokenizers_mm.quantizers.vq import VQ, SimVQ, SimVQConfig, VQConfig

CAPTIONS = ["a red circle", "a blue square on black"]
BUILD: dict[str, Any] = {
    "tokenflow": lambda: TokenFlow.from_config(test_tokenflow.tiny_config()),
    "dualvitok": lambda: DualViTok.from_config(test_dualvitok.tiny_config()),
}
REACHED = {
    "tokenflow": ("semantic_encoder.", "pixel_encoder.", "semantic_head.", "pixel_head."),
    "dualvitok": ("semantic_encoder.head.", "pixel_encoder.", "pixel_head."),
}


class Setting:
    """A tiny tokenizer, its pictures, a language model and a projector."""

    def __init__(self, family: str) -> None:
        torch.manual_seed(0)
        self.tokenizer: ImageTokenizer[Any] = BUILD[family]().train()
        side = self.tokenizer.image_size or (64, 64)
        self.x = torch.rand(2, 3, *side) * 2 - 1
        text = words(CAPTIONS)
        vocabulary = Vocabulary.for_tokenizer(self.tokenizer, text, sizes=[side])
        self.processor = MultimodalProcessor(self.tokenizer, text, vocabulary)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=len(text), **sizes))
        self.model = extend(model, vocabulary).eval()
        dim = read_codes(self.tokenizer, self.x).shape[-1]
        self.projector = FeatureProjector(ProjectorConfig((dim,), 32))

    def caption(self, vectors: torch.Tensor) -> torch.Tensor:
        batch = caption_batch(self.processor, vectors, tuple(self.x.shape[-2:]), CAPTIONS)  # type: ignore[arg-type]
        assert batch is not None
        return caption_loss(self.model, self.projector, batch)


@pytest.fixture(scope="module", params=sorted(BUILD))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def setting(family: str) -> Setting:
    return Setting(family)


def gradients(module: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
    return {name: grad for name, grad in zip(named, found, strict=True) if grad is not None}


def test_captions_reach_exactly_the_documented_parameters(family: str, setting: Setting) -> None:
    output = setting.tokenizer(setting.x)
    loss = setting.caption(read_codes(setting.tokenizer, setting.x, output))
    reached = gradients(setting.tokenizer, loss)
    learnable = [name for name, p in setting.tokenizer.named_parameters() if p.requires_grad]
    assert set(reached) == {name for name in learnable if name.startswith(REACHED[family])}
    for prefix in REACHED[family]:
        assert any(grad.abs().max() > 0 for name, grad in reached.items() if name.startswith(prefix)), prefix
    assert all(p.grad_fn is None for p in [read_codes(setting.tokenizer, setting.x)])
    frozen = setting.caption(read_codes(setting.tokenizer, setting.x))
    assert gradients(setting.tokenizer, frozen) == {}
    assert gradients(setting.projector, frozen).keys() == dict(setting.projector.named_parameters()).keys()


def test_what_is_tuned_is_what_is_read_later(setting: Setting) -> None:
    """The forward pass and `features` (and so the processor as it is after loading) agree but for rounding."""
    setting.tokenizer.eval()
    tuned = read_codes(setting.tokenizer, setting.x, setting.tokenizer(setting.x)).detach()
    torch.testing.assert_close(tuned, read_codes(setting.tokenizer, setting.x), atol=1e-5, rtol=0)
    row = [[Segment(setting.x[0], as_features=True), CAPTIONS[0]]]
    torch.testing.assert_close(setting.processor(row).features[0][0], tuned[0], atol=1e-5, rtol=0)
    setting.tokenizer.train()


def test_alpha_scales_the_tokenizers_own_loss(setting: Setting) -> None:
    """L = L_cap + alpha L_vq: values and gradients equal those of the two losses taken apart."""
    output = setting.tokenizer(setting.x)
    caption = setting.caption(read_codes(setting.tokenizer, setting.x, output))
    own = (output.image - setting.x).abs().mean()
    for alpha in (0.0, 0.25):
        loss = joint_loss(caption, own, alpha)
        expected = caption.detach() + alpha * own.detach()
        assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-6)
        together = gradients(setting.tokenizer, loss)
        first, second = gradients(setting.tokenizer, caption), gradients(setting.tokenizer, own)
        for name, grad in together.items():
            zero = torch.zeros_like(grad)
            apart = first.get(name, zero) + alpha * second.get(name, zero)
            torch.testing.assert_close(grad, apart, atol=1e-6, rtol=1e-4, msg=name)


QUANTIZERS: list[tuple[str, Quantizer, set[str]]] = [
    ("vq", VQ(VQConfig(32, 4)), set()),
    ("simvq", SimVQ(SimVQConfig(32, 4)), set()),
    ("simvq, rotation", SimVQ(SimVQConfig(32, 4, rotation=True)), set()),
    ("shared index", SharedIndexQuantizer(SharedIndexConfig(32, (2, 2))), set()),
    ("multi-scale", MultiScaleQuantizer(VQ(VQConfig(32, 4)), [(1, 1), (2, 2)]), set()),
    ("residual", ResidualQuantizer(ResidualConfig(VQConfig(32, 4), 2)), set()),
    (
        "fsq",
        FSQ(FSQConfig((5, 5), 4)),
        {"project_in.weight", "project_in.bias", "project_out.weight", "project_out.bias"},
    ),
]


@pytest.mark.parametrize(("quantizer", "reached"), [q[1:] for q in QUANTIZERS], ids=[q[0] for q in QUANTIZERS])
def test_what_each_quantizer_lets_through(quantizer: Quantizer, reached: set[str]) -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 2, 2, 4, generator=generator).requires_grad_()
    vectors = quantizer.train().quantize(z).vectors
    loss = (vectors * torch.randn(vectors.shape, generator=generator)).sum()
    assert set(gradients(quantizer, loss)) == reached
    assert (torch.autograd.grad(loss, z)[0].abs().sum(-1) > 0).all()


def test_only_captions_are_learned_and_empty_ones_are_left_out() -> None:
    setting = Setting("tokenflow")
    vectors = torch.randn(2, 16, 12, requires_grad=True)
    batch = caption_batch(setting.processor, vectors, (32, 32), ["", "a red"], "circle")
    assert batch is not None
    text = setting.processor.text_tokenizer
    assert batch.input_ids.shape == (1, 16 + 1 + 2 + 1)
    assert num_labels(setting.processor, ["", "a red"]) == num_predicted(batch.labels) == 3
    assert batch.is_feature[0].tolist() == [True] * 16 + [False] * 4
    assert batch.labels[0].tolist() == [IGNORED] * 17 + text("a red")["input_ids"] + [text.eos_token_id]
    assert batch.features[0][0].grad_fn is not None
    assert torch.equal(batch.features[0][0], vectors[1])
    assert caption_batch(setting.processor, vectors, (32, 32), ["", ""]) is None
    with pytest.raises(ValueError, match="captions: expected 2, one for each image, got 1"):
        caption_batch(setting.processor, vectors, (32, 32), ["a"])
    with pytest.raises(ValueError, match="ImageFeatures: expected a Segment with as_features=True"):
        setting.processor([[ImageFeatures((vectors[0],), 32, 32)]])


def test_a_projector_is_saved_and_loaded(tmp_path: Path) -> None:
    projector = FeatureProjector(ProjectorConfig((4, 3), 8, "silu"))
    projector.save(tmp_path)
    again = FeatureProjector.load(tmp_path)
    assert again.config == projector.config
    images = [(torch.randn(5, 4), torch.randn(2, 3))]
    assert torch.equal(again(images), projector(images))
    (tmp_path / "projector.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="expected a whole safetensors file"):
        FeatureProjector.load(tmp_path)
    projector.save(tmp_path)
    (tmp_path / "projector.json").write_text('{"dims": [65536, 65536], "width": 65536, "activation": "silu"}')
    with address_space(1 << 30), pytest.raises(ValueError, match="expected exactly the tensors of the model"):
        FeatureProjector.load(tmp_path)
