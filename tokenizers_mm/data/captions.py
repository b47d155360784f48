"""Captions: text files beside images."""

from pathlib import Path


def read_caption(image: Path, skipped: list[str]) -> str:
    """The caption of an image file: the text file of the same name beside it, "" for none.

    skipped: takes a sentence that names a caption that cannot be read; the image is then used without one.
    """
    path = image.with_suffix(".txt")
    if not path.is_file():
        return ""
    try:
        return path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        got = f"byte 0x{error.object[error.start]:02x} at {error.start}"
        skipped.append(f"caption {path}: expected UTF-8, got {got}")
    except OSError as error:
        skipped.append(f"caption {path}: expected a text file, got {error.strerror}")
    return ""
