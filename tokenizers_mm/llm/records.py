"""Interleaved records on disk: JSONL, one row per line, read at any place and mixed by weight.

A line is `{"content": [PART, ...]}`; a part is one of

    {"text": "a red circle"}
    {"image": "images/0.png"}                                    a path, inside of the folder of the file
    {"codes": {"height": 64, "width": 64, "ids": [3, 17, ...]}}  an image that went through the tokenizer already;
                                                                 "tokenizer" says which one that was (see `_origin`)

and may also say `"learn": false` (its tokens are no labels) and, for images, `"features": true` (shown as continuous
features). Other keys of a line, such as an id, are not read; `pretokenize` keeps them. A path that leads out of the
folder (absolute, with "..", or by a symbolic link) is refused unless `outside=True` says that the file may name any
image of this machine.
"""

import json
import os
import random
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import IO, Any, cast

import torch

from tokenizers_mm._check import fail, require
from tokenizers_mm._files import atomic_path
from tokenizers_mm._origin import KEY as ORIGIN
from tokenizers_mm._origin import OriginCheck, read_origin
from tokenizers_mm.data.token_shards import MAX_MEMBER, Row
from tokenizers_mm.data.tokenizing import Encoding, Failure, encode_pairs, largest_id
from tokenizers_mm.llm.batch import Segment
from tokenizers_mm.llm.vocabulary import MAX_ROWS, MAX_SIZE
from tokenizers_mm.models.base import ImageTokenizer
from tokenizers_mm.types import ImageCodes

RANGE = 256
"""Rows whose images `pretokenize` encodes together."""


class Records:
    """The rows of a file, by number; only the places of the lines are held in memory.

    outside: whether images may lie anywhere, not only in the folder of the file. any_tokenizer: whether codes that
    another tokenizer made are taken, too.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        tokenizer: ImageTokenizer,
        outside: bool = False,
        any_tokenizer: bool = False,
    ) -> None:
        self.path, self.outside, self.any_tokenizer = Path(path), outside, any_tokenizer
        self.use(tokenizer)
        require(self.path.is_file(), "records", "a JSONL file", str(path))
        self._starts: list[int] = []
        start = 0
        with self.path.open("rb") as file:
            self._version = _version(file)
            while line := file.readline(MAX_MEMBER):
                require(len(line) < MAX_MEMBER, f"records {self.path}", f"lines of under {MAX_MEMBER} bytes", "more")
                self._starts += [start] if line.strip() else []
                start += len(line)
        require(len(self._starts) > 0, f"records {self.path}", "at least one row", "none")

    def use(self, tokenizer: ImageTokenizer) -> None:
        """Take a tokenizer for the codes and images of the rows."""
        self.tokenizer = tokenizer
        self._check_origin = OriginCheck(tokenizer, self.any_tokenizer)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> list[Segment]:
        """The segments of one row; ValueError says which row is wrong and how."""
        return [self.segment(part, index) for part in self.content(index)]

    def content(self, index: int) -> list[dict[str, Any]]:
        """The parts of one row as they are written."""
        return self.record(index)["content"]

    def record(self, index: int) -> dict[str, Any]:
        """One row as it is written, with all of its keys."""
        name = f"{self.path} row {index}"
        with self.path.open("rb") as file:
            require(_version(file) == self._version, name, "the file as it was opened", "another one")
            file.seek(self._starts[index])
            line = file.readline(MAX_MEMBER)
        try:
            record = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, a number of too many digits
            fail(name, "valid JSON", str(error))
        parts = record.get("content") if isinstance(record, dict) else None
        if not isinstance(parts, list) or not parts or not all(isinstance(part, dict) for part in parts):
            fail(name, "a list of parts under 'content'", line[:40].decode(errors="replace"))
        assert isinstance(record, dict)
        return record

    def segment(self, part: dict[str, Any], index: int) -> Segment:
        """A part of row `index`, checked."""
        name = f"{self.path} row {index}"
        kinds = [key for key in ("text", "image", "codes") if key in part]
        unknown = sorted(set(part) - {"text", "image", "codes", "learn", "features"})
        require(len(kinds) == 1 and not unknown, name, "parts with one of text, image, codes", sorted(part))
        learn, features = part.get("learn", True), part.get("features", False)
        require(isinstance(learn, bool) and isinstance(features, bool), name, "learn and features true or false", part)
        if kinds == ["text"]:
            require(_is_text(part["text"]), name, "a text", part["text"])
            return Segment(part["text"], learn)
        if kinds == ["image"]:
            return Segment(self._image(part["image"], name), learn, features)
        return Segment(self._codes(part["codes"], name), learn, features)

    def _image(self, image: Any, name: str) -> Path:
        """The path of an image, inside of the folder of the file unless others are allowed."""
        require(_is_text(image) and 0 < len(image) <= 4096, name, "the path of an image", image)
        folder = self.path.parent
        try:
            inside = (folder / image).resolve().is_relative_to(folder.resolve())
        except (OSError, RuntimeError) as error:  # links that lead to themselves, names that are too long
            fail(name, "the path of an image", str(error))
        require(inside or self.outside, name, f"an image inside of {folder} (or outside=True)", image)
        return folder / image

    def _codes(self, codes: Any, name: str) -> ImageCodes:
        keys = {"height", "width", "ids"}
        right = isinstance(codes, dict) and keys <= set(codes) <= keys | {ORIGIN} and isinstance(codes["ids"], list)
        if not right or not all(type(value) is int for value in (codes["height"], codes["width"], *codes["ids"])):
            fail(name, "codes with height, width and ids, whole numbers", codes)
        self._check_origin(str(self.path), read_origin(codes))
        sides = min(codes["height"], codes["width"]) > 0 and max(codes["height"], codes["width"]) <= MAX_SIZE
        require(sides, name, f"a height and a width from 1 to {MAX_SIZE}", (codes["height"], codes["width"]))
        small = all(0 <= number < MAX_ROWS for number in codes["ids"])
        require(small, name, f"ids from 0 to {MAX_ROWS - 1}", codes["ids"])
        try:
            streams = self.tokenizer.streams(codes["height"], codes["width"])
            return ImageCodes(torch.tensor([codes["ids"]], dtype=torch.int64), codes["height"], codes["width"], streams)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def _is_text(value: Any) -> bool:
    """True if a value is a text that can be written as UTF-8, without a zero byte."""
    return isinstance(value, str) and "\0" not in value and not any("\ud800" <= char <= "\udfff" for char in value)


def _version(file: IO[bytes]) -> tuple[int, int, int]:
    """Values that tell that an open file is still the same."""
    status = os.fstat(file.fileno())
    return status.st_ino, status.st_size, status.st_mtime_ns


class RecordMixture:
    """Rows from several files by weight. A position decides everything, so training can go on at any step."""

    def __init__(self, sources: Sequence[tuple[Records, float]], seed: int = 0) -> None:
        require(len(sources) > 0, "sources", "at least one file of records", "none")
        weights = [weight for _, weight in sources]
        require(min(weights) >= 0 and sum(weights) > 0, "weights", "numbers from 0 on, not all 0", weights)
        self.sources, self.weights, self.seed = [records for records, _ in sources], weights, seed

    def __getitem__(self, position: int) -> list[Segment]:
        """The row of a position, from 0 without an end."""
        rng = random.Random(f"{self.seed} {position}")
        records = rng.choices(self.sources, self.weights)[0]
        return records[rng.randrange(len(records))]


def pretokenize(records: Records, path: str | os.PathLike[str], stable: bool = False) -> int:
    """Write the same rows, all of their keys kept, with codes in place of images; returns how many images there were.

    Images that are to be shown as features stay images; give the new file the folder of the old one for their paths.
    stable: see `ImageTokenizer.encode`.
    """
    done = 0
    how = Encoding(stable=stable, strict=True)
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for start in range(0, len(records), RANGE):
            numbers = range(start, min(len(records), start + RANGE))
            found, _, images, _ = RecordRows(records).encode(records.tokenizer, numbers, how, lambda _: None)
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for _, row in found)
            done += images
    return done


class RecordRows:
    """Records as an input of `data.tokenizing`: their images become codes, every other key of a row is kept.

    A row with an image that cannot be encoded fails as a whole.
    """

    def __init__(self, records: Records) -> None:
        self.records = records

    @classmethod
    def open(cls, path: Path) -> "RecordRows":
        """The records of a file."""
        return cls(Records(path, cast(Any, None)))  # the tokenizer comes with `encode`

    def __len__(self) -> int:
        return len(self.records)

    def fingerprint(self) -> str:
        """A digest of the file."""
        found = sha256()
        with self.records.path.open("rb") as file:
            while block := file.read(1 << 20):
                found.update(block)
        return found.hexdigest()

    def encode(
        self, tokenizer: ImageTokenizer[Any], numbers: range, how: Encoding, step: Callable[[int], None]
    ) -> tuple[list[tuple[int, Row]], list[Failure], int, int]:
        """See `data.tokenizing.Rows`."""
        if tokenizer is not self.records.tokenizer:
            self.records.use(tokenizer)
        rows: dict[int, Row] = {}
        failures: dict[int, Failure] = {}
        work: list[tuple[int, dict[str, Any], Path]] = []

        def fails(number: int, error: ValueError) -> None:
            if how.strict:
                raise error
            failures.setdefault(number, Failure.of(number, f"row {number}", error))

        for number in numbers:
            try:
                record = self.records.record(number)
                parts = record["content"]
                for part in parts:
                    segment = self.records.segment(part, number)
                    if isinstance(segment.content, Path) and not segment.as_features:
                        work.append((number, part, segment.content))
                rows[number] = record
            except ValueError as error:
                fails(number, error)
        pairs = ((f"image {path}", path) for _, _, path in work)
        largest = images = 0
        for indices, codes in encode_pairs(tokenizer, pairs, how, lambda index, error: fails(work[index][0], error)):
            if not isinstance(codes, ImageCodes):
                fail("tokenizer", "one with ids", "a continuous one")
            largest, images = max(largest, largest_id(codes)), images + len(indices)
            for index, ids in zip(indices, codes.ids.tolist(), strict=True):
                part = work[index][1]
                del part["image"]
                made = {"height": codes.height, "width": codes.width, "ids": ids}
                part["codes"] = {**made, ORIGIN: tokenizer.fingerprint()}
        step(len(numbers))
        whole = [(number, row) for number, row in rows.items() if number not in failures]
        return whole, sorted(failures.values(), key=lambda failure: failure.row), images, largest
