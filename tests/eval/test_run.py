"""One pass over images: batches do not matter, an interrupt loses nothing, memory is flat, NaN is an error."""

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.eval.towers import ColourTower
from tokenizers_mm.eval import METRICS
from tokenizers_mm.eval import run as running
from tokenizers_mm.eval.base import Batch, Metric, PerImage, Setup
from tokenizers_mm.eval.candidates import Candidate, CodecCandidate, Encoded
from tokenizers_mm.eval.codecs import Codec
from tokenizers_mm.eval.images import ImageSource
from tokenizers_mm.eval.metrics import METRICS as TABLE
from tokenizers_mm.eval.protocols import PROTOCOLS, protocol_by_name
from tokenizers_mm.eval.report import make_report
from tokenizers_mm.eval.run import PARTIAL, Run, begin, carry_out
from tokenizers_mm.types import ImageCodes, Stream

METRICS_HERE = ("bits", "bits_per_pixel", "psnr", "ssim", "ssim_uniform", "codebook")


class Means(Candidate):
    """A tokenizer for tests: every block of 8 x 8 pixels becomes one of 16 greys."""

    kind = "test"
    size_multiple = 8

    def encode(self, x: torch.Tensor, target: Sequence[float] | None = None) -> Encoded:
        means = torch.nn.functional.avg_pool2d(x.mean(1, keepdim=True), 8)
        ids = ((means + 1) * 8).long().clamp(0, 15)
        rows, columns = ids.shape[-2:]
        streams = (Stream("grey", 16, ((rows, columns),)),)
        return Encoded(
            ids, [4.0 * rows * columns] * len(x), ImageCodes(ids.flatten(1), x.shape[-2], x.shape[-1], streams)
        )

    def decode(self, encoded: Encoded) -> torch.Tensor:
        grey = (encoded.value.float() + 0.5) / 8 - 1
        return torch.nn.functional.interpolate(grey, scale_factor=8).expand(-1, 3, -1, -1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for index in range(13):
        sides = (32, 48) if index in (4, 5, 6) else (40, 40)
        base = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(base).resize(sides, Image.Resampling.BICUBIC).save(place / f"{index:02d}.png")
    (place / "07x.png").write_bytes(b"junk")
    return place


def a_run(folder: Path, *more: Candidate, protocol: str = "native") -> Run:
    candidates = [Means("means", "1"), *more]
    return begin(candidates, ImageSource.at(str(folder)), Setup(PROTOCOLS[protocol]), METRICS_HERE)


def without_times(report: dict[str, Any]) -> dict[str, Any]:
    report = {key: value for key, value in report.items() if key != "seconds"}
    return report | {"tokenizers": [{k: v for k, v in row.items() if k != "speed"} for row in report["tokenizers"]]}


def test_batches_do_not_matter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reports = []
    for pixels in (1, 5 * 40 * 40, 1 << 20):
        monkeypatch.setattr(running, "BATCH_PIXELS", {"cpu": pixels, "cuda": pixels})
        reports.append(without_times(make_report(carry_out(a_run(folder)))))
    first, *others = reports
    assert first["images"]["count"] == 13
    assert "07x.png" in first["images"]["skipped"][0]
    assert others == [first, first]


def test_an_interrupted_run_goes_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "BATCH_PIXELS", {"cpu": 1, "cuda": 1})
    codec = CodecCandidate(Codec.parse("jpeg", "match"))
    whole = without_times(make_report(carry_out(a_run(folder, codec))))

    def stop(done: int, total: int) -> None:
        if done >= 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        carry_out(a_run(folder, codec), tmp_path, stop, save_every=0)
    assert (tmp_path / PARTIAL).is_file()
    seen: list[int] = []
    again = carry_out(a_run(folder, codec), tmp_path, lambda done, total: seen.append(done), save_every=0)
    assert seen[0] > 5, "it begins where it was"
    assert without_times(make_report(again)) == whole

    seen.clear()  # of another protocol, another tokenizer, a broken file: from the beginning
    carry_out(a_run(folder, codec, protocol="default"), tmp_path, lambda done, total: seen.append(done))
    assert seen[0] == 1
    (tmp_path / PARTIAL).write_bytes(b"junk")
    seen.clear()
    carry_out(a_run(folder, codec), tmp_path, lambda done, total: seen.append(done))
    assert seen[0] == 1


def test_images_are_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "BATCH_PIXELS", {"cpu": 1, "cuda": 1})
    alive: list[weakref.ref[torch.Tensor]] = []

    class Watch(Means):
        def encode(self, x: torch.Tensor, target: Sequence[float] | None = None) -> Encoded:
            assert sum(reference() is not None for reference in alive) <= 2
            alive.append(weakref.ref(x))
            return super().encode(x, target)

    setup = Setup(PROTOCOLS["native"])
    carry_out(begin([Watch("watch")], ImageSource.at(str(folder)), setup, METRICS_HERE))
    assert len(alive) == 13


def test_what_is_not_finite_is_an_error(folder: Path) -> None:
    class Broken(Means):
        def decode(self, encoded: Encoded) -> torch.Tensor:
            return super().decode(encoded) * torch.tensor(torch.nan)

    with pytest.raises(ValueError, match="reconstruction by broken: expected finite values, got NaN or infinity"):
        carry_out(begin([Broken("broken")], ImageSource.at(str(folder)), Setup(PROTOCOLS["native"]), ["psnr"]))

    class Odd(PerImage):
        name, label = "odd", "odd"

        def scores(self, batch: Batch) -> torch.Tensor:
            return torch.full((len(batch.originals),), torch.nan)

    with pytest.raises(ValueError, match="odd: expected finite values"):
        Odd(Setup(PROTOCOLS["native"])).update(Batch(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8)))


def test_sizes_that_do_not_go_together(folder: Path) -> None:
    class Fixed(Means):
        image_size = (48, 48)

    source = ImageSource.at(str(folder))
    with pytest.raises(ValueError, match="protocol imagenet-val-256: expected 48 x 48 pixels, which fixed takes"):
        begin([Fixed("fixed")], source, Setup(PROTOCOLS["imagenet-val-256"]))
    run = begin([Fixed("fixed"), Means("means")], source, Setup(PROTOCOLS["default"]), ["psnr"])
    assert (run.size, run.multiple) == ((48, 48), 8)
    scaled = begin([Fixed("fixed")], source, Setup(protocol_by_name("paper:llamagen", size=64)), ["psnr"])
    report = make_report(carry_out(scaled))
    assert report["images"]["size"] == [64, 64]
    with pytest.raises(ValueError, match=r"metrics: expected one of bits, .*, got sharpness"):
        begin([Means("means")], source, Setup(PROTOCOLS["native"]), ["sharpness"])


def test_codecs_match_the_bits_of_the_first_tokenizer(folder: Path) -> None:
    codecs = [CodecCandidate(Codec.parse("jpeg", "match")), CodecCandidate(Codec.parse("webp", "match"))]
    setup = Setup(PROTOCOLS["native"])
    runs = [
        carry_out(begin(order, ImageSource.at(str(folder)), setup, METRICS_HERE))
        for order in ([Means("means", "1"), *codecs], [*codecs, Means("means", "1")])
    ]
    values = [make_report(run)["per_image"]["values"] for run in runs]
    assert values[0] == values[1], "wherever the tokenizer stands"
    for run in runs:
        for measured in run.measured:
            if isinstance(measured.candidate, CodecCandidate):
                wanted = values[0]["means"]["bits"]
                used = values[0][measured.candidate.name]["bits"]
                over = sum(a > b for a, b in zip(used, wanted, strict=True))
                assert measured.over == over


def outcome(metric: Metric) -> Any:
    """The result of a metric, or the sentence that says why there is none."""
    try:
        return metric.result()
    except ValueError as error:
        return str(error)


def test_the_table_of_metrics() -> None:
    """Every metric has what the report reads of it, and its state restores it; one test for all lines of the table."""
    assert METRICS is TABLE
    setup = Setup(PROTOCOLS["native"], tower=ColourTower(), classes=("red", "blue"))
    generator = torch.Generator().manual_seed(0)
    missing: dict[str, str] = {}
    for name, cls in TABLE.items():
        assert cls.name == name
        assert cls.label
        assert cls.better in ("higher", "lower", "")
        try:
            metric, again = cls(setup), cls(setup)
        except (ValueError, ImportError) as error:
            missing[name] = str(error)
            continue
        streams = (Stream("a", 8, ((1, 2), (2, 2))),)
        for _ in range(2):
            a, b = torch.rand(2, 2, 3, 48, 48, generator=generator) * 2 - 1
            ids = torch.randint(0, 8, (2, 6), generator=generator)
            codes = ImageCodes(ids, 48, 48, streams)
            features = torch.randn(2, 5, generator=generator)
            metric.update(Batch(a, b, codes, [18.0] * 2, features, [0, 1], ["a red one", "a blue one"]))
            again = cls(setup)
            again.restore(metric.state())
        before, after = metric.state(), again.state()
        assert before.keys() == after.keys()
        for key, tensor in before.items():
            torch.testing.assert_close(after[key], tensor, rtol=0, atol=0, equal_nan=True)
        assert outcome(again) == outcome(metric)
        if cls.least > 48:
            assert outcome(metric).startswith(f"{name}: expected images of at least")
        elif not getattr(cls, "partial", False):  # noise may have text or faces, or none
            assert metric.result() is not None
    assert all(TABLE[name].needs for name in missing), missing
