"""Stable ids: the same for every batch, number of threads, dtype and kind of machine, and those of float64."""

from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.tiny import TOKENIZERS, as_pil, dualvitok, images
from tests.cases import OWN
from tests.mar_cases import tiny_config as tiny_mar_config
from tests.quantizers.test_written_codes import (
    exchange,
    write_data,
    write_inference_mode,
    write_pointer,
    write_without_version,
)
from tokenizers_mm import kernels
from tokenizers_mm.functional.scalar import levels_to_ids, round_to_levels, rounding_margin
from tokenizers_mm.kernels.decisions import watch_decisions
from tokenizers_mm.models import MAR, base, stable
from tokenizers_mm.quantizers import FSQ, FSQConfig, VQConfig

COUNT = 12


def exact_ids(tokenizer: Any, x: torch.Tensor) -> torch.Tensor:
    """Ids of a float64 copy made here."""
    copy = stable._converted(tokenizer, torch.float64)
    with torch.no_grad():
        return torch.cat([copy.encode_tensor(part.double()).ids for part in x.split(1)])


def measured(tokenizer: Any) -> None:
    """Let a tokenizer believe that it has measured enough: from now on float32 counts."""
    encoder = stable.stable_encoder(tokenizer)
    encoder._counts = [stable.CALIBRATION] * len(encoder._counts)


@pytest.mark.parametrize("name", list(TOKENIZERS))
def test_ids_are_those_of_float64_and_of_another_kind_of_machine(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    x = images(tokenizer.image_size, COUNT)
    expected = torch.from_numpy(np.load(OWN / "stable" / "ids.npz")[name]).long()
    codes = tokenizer.encode(x, stable=True)
    assert torch.equal(codes.ids, expected)
    assert codes.margins is not None
    assert codes.margins.shape == codes.ids.shape
    assert bool((codes.margins > 0).all())
    assert (tokenizer.stability.images, tokenizer.stability.undecided) == (COUNT, 0)
    measured(tokenizer)
    threads = torch.get_num_threads()
    for size in (1, 5, COUNT):
        torch.set_num_threads(2 if (name, size) == ("demo-64", 5) else 1)
        assert torch.equal(torch.cat([tokenizer.encode(part, stable=True).ids for part in x.split(size)]), expected)
    torch.set_num_threads(threads)
    assert torch.equal(tokenizer.encode(as_pil(x), stable=True).ids, expected)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(tokenizer.encode(x.to(dtype), stable=True).ids, expected)
    assert tokenizer.stability.images > tokenizer.stability.again
    assert tokenizer.stability.largest <= 1.0
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tokenizer.encode(x, stable=True).ids, expected)
    assert torch.equal(exact_ids(tokenizer, x), expected)


def test_margins_follow_their_ids_through_every_form_of_codes() -> None:
    tokenizer = TOKENIZERS["demo-64"]()
    codes = tokenizer.encode(images(tokenizer.image_size, 3), stable=True)
    assert codes.margins is not None
    parts = codes.unbind()
    for index, part in enumerate(parts):
        assert part.margins is not None
        assert torch.equal(part.margins, codes.margins[index : index + 1])
    joined = tokenizer.encode(as_pil(images(tokenizer.image_size, 3)), stable=True)
    assert joined.margins is not None
    torch.testing.assert_close(joined.margins, codes.margins, rtol=0, atol=1e-5)
    assert tokenizer.encode(images(tokenizer.image_size, 1)).margins is None


@pytest.mark.parametrize("name", ["tokenflow", "residual"])
def test_doubtful_images_are_decided_again_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With float32 features that are far off, the ids are still those of float64, and the report counts them."""
    tokenizer = TOKENIZERS[name]()
    x = images(tokenizer.image_size, COUNT)
    expected = exact_ids(tokenizer, x)
    method = getattr(type(tokenizer), "encode_features")  # noqa: B009 (families name it alike, the base class does not)
    share = 0.05

    def off(self: Any, x: torch.Tensor) -> Any:
        found = method(self, x)
        if x.dtype == torch.float64:
            return found
        parts = found if isinstance(found, tuple) else (found,)
        moved = tuple(part * (1 + share * torch.sin(37.0 * part)) for part in parts)
        return moved if isinstance(found, tuple) else moved[0]

    monkeypatch.setattr(type(tokenizer), "encode_features", off)
    monkeypatch.setattr(stable, "CALIBRATION", 4 * expected.shape[1])
    assert not torch.equal(tokenizer.encode(x).ids, expected)
    assert torch.equal(tokenizer.encode(x, stable=True).ids, expected)
    report = tokenizer.stability
    assert report.changed > 0
    assert 4 <= report.again <= COUNT
    assert max(report.bounds) > 1e-4
    assert "decided again in float64" in str(report)
    found: dict[int, torch.Tensor] = {}
    for indices, codes in tokenizer.encode_batches(as_pil(x), stable=True, batch_size=5):
        found.update(zip(indices, codes.ids, strict=True))
    assert torch.equal(torch.stack([found[index] for index in range(COUNT)]), expected)


@pytest.mark.parametrize("most", [1, 2, 100])
def test_doubtful_images_of_several_sizes_wait_within_a_limit(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every image is decided again once, in its size, never more than `most` of 32 x 32 pixels at a time."""
    tokenizer = TOKENIZERS["vq"]()
    sizes = [(32, 32), (32, 64), (32, 32), (64, 64), (32, 32), (32, 64), (32, 32)]
    pictures = [as_pil(images(size, 1 + index))[-1] for index, size in enumerate(sizes)]
    tokenizer.encode(pictures[0], stable=True)
    measured(tokenizer)
    encoder = stable.stable_encoder(tokenizer)
    monkeypatch.setattr(encoder, "_bound", lambda number: float("inf"))
    monkeypatch.setitem(base.BATCH_PIXELS, "cpu", most * 32 * 32)
    again, decided = encoder._decide_again, []

    def counted(first: Any) -> Any:
        decided.append(first.x.shape[0] * first.x[0, 0].numel() // 1024)
        return again(first)

    monkeypatch.setattr(encoder, "_decide_again", counted)
    found: dict[int, Any] = {}
    for indices, codes in tokenizer.encode_batches(pictures, stable=True):
        assert not found.keys() & set(indices)
        found.update(zip(indices, codes, strict=True))
    for index, picture in enumerate(pictures):
        wide = exact_ids(tokenizer, tokenizer.prepare(picture))
        assert (found[index].height, found[index].width) == (picture.height, picture.width)
        assert torch.equal(found[index].ids, wide)
    assert sum(decided) == 4 + 2 * 2 + 4
    assert max(decided) <= max(most, 4)  # one of 64 x 64 pixels is never parted


def test_other_weights_are_measured_anew() -> None:
    tokenizer = TOKENIZERS["tokenflow"]()
    x = images(tokenizer.image_size, 2)
    first = tokenizer.encode(x, stable=True).ids
    with torch.no_grad():
        for codebook in tokenizer.quantizer.quantizer.codebooks:  # type: ignore[union-attr]
            codebook.copy_(codebook.flip(0))
    assert tokenizer.stability.images == 2
    second = tokenizer.encode(x, stable=True).ids
    assert torch.equal(second, exact_ids(tokenizer, x))
    assert not torch.equal(first, second)
    assert tokenizer.stability.images == 2
    tokenizer.bfloat16()
    assert torch.equal(tokenizer.encode(x, stable=True).ids, exact_ids(tokenizer, x))
    assert next(tokenizer.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_ids_follow_weights_that_are_written_without_a_trace(mode: str, dtype: torch.dtype) -> None:
    """The copies are of what is in memory now, whatever versions and addresses say."""
    tokenizer = TOKENIZERS["tokenflow"]().to(dtype)
    x = images(tokenizer.image_size, 2)
    writers = (write_data, write_pointer, write_inference_mode, write_without_version, exchange)
    with kernels.use_kernels(mode):
        tokenizer.encode(x, stable=True)
        for seed, writer in enumerate(writers):
            torch.manual_seed(seed)
            for tensor in (*tokenizer.parameters(), *tokenizer.buffers()):
                if tensor.is_floating_point():
                    writer(tensor, (tensor.detach() * (1 + 0.5 * torch.randn(tensor.shape))).to(dtype))
            assert torch.equal(tokenizer.encode(x, stable=True).ids, exact_ids(tokenizer, x)), writer.__name__


def test_stable_ids_in_inference_mode_are_the_same() -> None:
    """A dropout that is off draws no numbers, whether or not operations are taken apart before they are looked at."""
    tokenizer, other = TOKENIZERS["tokenflow"](), TOKENIZERS["tokenflow"]()
    assert any(isinstance(module, torch.nn.Dropout) for module in tokenizer.modules())
    x = images(tokenizer.image_size, 2)
    with torch.inference_mode():
        inside = tokenizer.encode(x, stable=True).ids
    assert torch.equal(inside, other.encode(x, stable=True).ids)
    assert torch.equal(tokenizer.encode(x, stable=True).ids, inside)


def test_compiled_parts_and_training_mode_give_the_same() -> None:
    tokenizer = TOKENIZERS["dualvitok"]()
    x = images(tokenizer.image_size, 2)
    expected = exact_ids(tokenizer, x)
    tokenizer.train()
    tokenizer.pixel_encoder = torch.compile(tokenizer.pixel_encoder, backend="eager")  # type: ignore[assignment]
    tokenizer.semantic_encoder.compile(backend="eager")  # type: ignore[operator]
    assert torch.equal(tokenizer.encode(x, stable=True).ids, expected)
    assert tokenizer.training
    assert all(part.training for part in tokenizer.modules())


def test_what_cannot_promise_says_so() -> None:
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="stable: expected a tokenizer with ids, got a continuous one"):
        MAR.from_config(tiny_mar_config()).eval().encode(torch.zeros(1, 3, 32, 32), stable=True)
    for change, message in [
        (lambda z: z.float().to(z.dtype), "to_copy"),
        (lambda z: z + 0 * torch.rand_like(z), "rand"),
    ]:
        tokenizer = dualvitok(VQConfig(64, 8))
        head: Any = tokenizer.pixel_head
        head.register_forward_hook(lambda module, args, out, change=change: change(out))
        with pytest.raises(ValueError, match=f"stable: expected an encoder that computes in float64.*{message}"):
            tokenizer.encode(torch.zeros(1, 3, 32, 32), stable=True)
    tokenizer = dualvitok(FSQConfig((4, 4), 8))
    plain = kernels.finite_ids
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "finite_ids", lambda z, ids, name, *rest: plain(z, ids, name))
        with pytest.raises(ValueError, match="stable: expected a margin for each of"):
            tokenizer.encode(torch.zeros(1, 3, 32, 32), stable=True)


def test_tensors_that_are_no_8_bit_images_are_taken_as_they_are() -> None:
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    levels = torch.randint(256, (1, 3, 8, 8), generator=torch.Generator().manual_seed(1)).float()
    image = levels.div(127.5).sub(1)
    assert torch.equal(stable.eight_bit(x), x)
    half = x.bfloat16()
    assert torch.equal(stable.eight_bit(half), half.float())
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        assert torch.equal(stable.eight_bit(image.to(dtype)), image)
    assert torch.equal(stable.eight_bit((levels / 255 - 0.5) / 0.5), image)  # as others normalise
    assert torch.equal(stable.eight_bit(torch.cat([x, image])), torch.cat([x, image]))


def test_the_margin_of_rounding_is_the_way_to_the_next_border() -> None:
    """No change below half of the margin changes an id; one a little above it does, in the direction that is worst."""
    levels, generator = (8, 5, 4), torch.Generator().manual_seed(0)
    z = torch.randn(200, 3, generator=generator, dtype=torch.float64)
    ids, margin = levels_to_ids(round_to_levels(z, levels), levels), rounding_margin(z, levels)
    for direction in torch.randn(50, 200, 3, generator=generator, dtype=torch.float64):
        moved = z + torch.nn.functional.normalize(direction, dim=-1) * (0.4999 * margin)[:, None]
        assert torch.equal(levels_to_ids(round_to_levels(moved, levels), levels), ids)
    quantizer = FSQ(FSQConfig(levels, 3)).double()
    with watch_decisions() as found:
        quantizer.quantize(z)
    assert len(found) == 1
    assert found[0].margin is not None
    assert found[0].margin.shape == (200,)
    near = torch.zeros(1, 3, dtype=torch.float64)
    steps = torch.linspace(-3, 3, 4001, dtype=torch.float64)
    line = near + torch.stack([steps, 0 * steps, 0 * steps], 1)
    jumps = levels_to_ids(round_to_levels(line, levels), levels).diff().nonzero().flatten()
    assert float(rounding_margin(line, levels)[jumps].max()) < 2 * 6 / 4000 * 2
