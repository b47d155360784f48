"""Codes and reconstructions as people use them: indexing, iteration, comparison, arrays, short forms."""

from typing import Any

import numpy as np
import pytest
import torch

from tokenizers_mm.types import ImageCodes, ImageLatents, Reconstruction, Stream

STREAMS = (Stream("semantic", 16, ((1, 1), (2, 2))), Stream("pixel", 64, ((4, 4),)))


def codes(count: int = 3) -> ImageCodes:
    ids = torch.cat(
        [torch.arange(5).repeat(count, 1), torch.arange(16).repeat(count, 1) + torch.arange(count)[:, None]], 1
    )
    return ImageCodes(ids, 32, 32, STREAMS)


@pytest.mark.parametrize(
    ("index", "rows"),
    [
        (0, [0]),
        (-1, [2]),
        (np.int64(1), [1]),
        (torch.tensor(1), [1]),
        (slice(1, None), [1, 2]),
        (slice(None, None, 2), [0, 2]),
        ([2, 0], [2, 0]),
        (torch.tensor([True, False, True]), [0, 2]),
        (np.array([1, 1]), [1, 1]),
    ],
)
def test_an_index_is_a_batch(index: object, rows: list[int]) -> None:
    whole = codes()
    part = whole[index]
    assert isinstance(part, ImageCodes)
    assert torch.equal(part.ids, whole.ids[rows])
    assert (part.height, part.width, part.streams) == (32, 32, STREAMS)


def test_indices_that_are_none() -> None:
    with pytest.raises(IndexError, match="expected -3 to 2, got 3"):
        codes()[3]
    for index in ("pixel", None, 1.5, True):
        with pytest.raises(ValueError, match="index: expected a number, a slice"):
            codes()[index]


def test_iteration_gives_batches_of_one() -> None:
    whole = codes()
    assert [part.ids.tolist() for part in whole] == [row[None].tolist() for row in whole.ids]
    assert list(whole) == whole.unbind()
    first, *rest = whole
    assert (len(first), len(rest)) == (1, 2)


def test_equality_is_of_values_and_places() -> None:
    assert codes() == codes()
    assert codes() != codes(2)
    assert codes() != ImageCodes(codes().ids, 32, 64, STREAMS)
    assert codes() != ImageCodes(codes().ids, 32, 32, (STREAMS[0], Stream("other", 64, ((4, 4),))))
    changed = codes().ids.clone()
    changed[1, 7] += 1
    assert codes() != ImageCodes(changed, 32, 32, STREAMS)
    assert codes() != "codes"
    values = torch.zeros(2, 4, 3)
    assert ImageLatents(values, 16, 16, (2, 2)) == ImageLatents(values.clone(), 16, 16, (2, 2))
    assert ImageLatents(values, 16, 16, (2, 2)) != ImageLatents(values + 1, 16, 16, (2, 2))
    assert ImageLatents(values, 16, 16, (2, 2)) != codes()
    with pytest.raises(TypeError, match="unhashable"):
        hash(codes())


def test_arrays() -> None:
    whole = codes()
    assert whole.numpy().dtype == np.int64
    np.testing.assert_array_equal(np.asarray(whole), whole.ids.numpy())
    assert np.asarray(whole, dtype=np.int32).dtype == np.int32
    latents = ImageLatents(torch.full((1, 4, 3), 0.5, dtype=torch.bfloat16, requires_grad=True), 16, 16, (2, 2))
    assert latents.numpy().dtype == np.float32
    assert float(latents.numpy()[0, 0, 0]) == 0.5
    assert latents[0].values.shape == (1, 4, 3)


def test_short_forms() -> None:
    assert repr(codes()) == "ImageCodes(3 of 32x32 pixels, ids 3x21: semantic 5 ids of 16, pixel 16 ids of 64)"
    latents = ImageLatents(torch.zeros(2, 4, 3), 16, 16, (2, 2))
    assert repr(latents) == "ImageLatents(2 of 16x16 pixels, float32 2x4x3, grid 2x2)"


def test_a_notebook_shows_a_map_for_each_stream() -> None:
    page = codes()._repr_html_()
    assert page.count("<img ") == 2 * 3
    assert "grids 1x1 2x2" in page
    only_first_scales = ImageCodes(codes().ids[:, :5], 32, 32, (STREAMS[0],))
    assert only_first_scales._repr_html_().count("<img ") == 3
    one_scale = ImageCodes(codes().ids[:, :1], 32, 32, (STREAMS[0],))
    assert one_scale._repr_html_().count("<img ") == 3


def test_a_map_of_ids_has_one_colour_for_each_id() -> None:
    from tokenizers_mm._display import CELL, id_map

    image = id_map(torch.tensor([0, 1, 1, 2]), (2, 2))
    assert image.size == (2 * CELL, 2 * CELL)
    corners = [image.getpixel((x, y)) for y in (0, CELL) for x in (0, CELL)]
    assert corners[1] == corners[2]
    assert len(set(corners)) == 3
    everything = np.asarray(id_map(torch.arange(4096), (64, 64)))[::CELL, ::CELL].reshape(-1, 3)
    assert len(np.unique(everything, axis=0)) > 4000


def test_a_reconstruction_shows_its_images() -> None:
    found = Reconstruction(torch.zeros(2, 3, 16, 16), None, None, {}, torch.zeros(2, 4, 4, 8))
    assert [image.size for image in found.to_pil()] == [(16, 16)] * 2
    assert (found._repr_png_() or b"").startswith(b"\x89PNG")
    assert repr(found) == "Reconstruction(image [2, 3, 16, 16], vectors [2, 4, 4, 8], quantized [])"
    without: Any = Reconstruction(None, None, None, {}, torch.zeros(2, 4, 4, 8))  # type: ignore[arg-type]
    assert repr(without) == "Reconstruction(vectors [2, 4, 4, 8], quantized [])"
    assert without._repr_png_() is None
    with pytest.raises(ValueError, match="image: expected a tokenizer with a pixel decoder"):
        without.to_pil()


def test_margins_follow_their_ids() -> None:
    ids = codes().ids
    whole = ImageCodes(ids, 32, 32, STREAMS, torch.arange(ids.numel()).view_as(ids).float())
    part = whole[[2, 0]]
    assert part.margins is not None
    assert whole.margins is not None
    assert torch.equal(part.margins, whole.margins[[2, 0]])
    assert [one.margins.shape for one in whole if one.margins is not None] == [(1, 21)] * 3
    assert whole == codes(), "the ids and their places count"
