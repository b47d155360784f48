"""Captions: text files beside images."""

from pathlib import Path

MAX_CAPTION = 1 << 20
"""Limit of a caption in bytes."""


def read_caption(image: Path, skipped: list[str]) -> str:
    """The caption of an image file: the text file of the same name beside it, "" for none.

    skipped: takes a sentence that names a caption that cannot be read; the image is then used without one.
    """
    path = image.with_suffix(".txt")
    if not path.is_file():
        return ""
    try:
        size = path.stat().st_size
        if size > MAX_CAPTION:
            skipped.append(f"caption {path}: expected at most {MAX_CAPTION} bytes, got {size}")
            return ""
        return path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        got = f"byte 0x{error.object[error.start]:02x} at {error.start}"
        skipped.append(f"caption {path}: expected UTF-8, got {got}")
    except OSError as error:
        skipped.append(f"caption {path}: expected a text file, got {error.strerror}")
    return ""
