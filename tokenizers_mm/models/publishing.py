"""A tokenizer on the Hugging Face hub: its files, a card with its measurements, and an app for a Space."""

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tokenizers_mm._check import fail, require, shorten
from tokenizers_mm._files import temporary_directory, write_text
from tokenizers_mm.models.card import card
from tokenizers_mm.models.saving import CARD, write

if TYPE_CHECKING:
    from tokenizers_mm.models.base import ImageTokenizer

APP = '''"""A Space that shows what a tokenizer keeps of an image."""

import gradio as gr
import tokenizers_mm as tmm

tok = tmm.load("{source}")


def reconstruct(image):
    codes = tok.encode(image, fit="{fit}")
    return tok.to_pil(codes)[0], repr(codes)


gr.Interface(
    reconstruct,
    gr.Image(type="pil", label="Image"),
    [gr.Image(label="Reconstruction"), gr.Textbox(label="What it was made from")],
    title="{title}",
).launch()
'''

REQUIREMENTS = "tokenizers_mm\ngradio\n"


def push(
    tokenizer: "ImageTokenizer[Any]",
    repo_id: str,
    *,
    report: Mapping[str, Any] | None = None,
    license: str | None = None,
    private: bool | None = None,
    space: str | None = None,
    **options: Any,
) -> str:
    """Upload a tokenizer to the hub as one commit; returns the address of the commit.

    The commit holds the files of `save`, the card with the numbers of `report` (of `tokenizers-mm eval`), and `app.py`
    with `requirements.txt`, which a Space runs. license: replaces the one that the tokenizer states. space: hub id of a
    Gradio Space that is made too and shows the tokenizer. options: of `HfApi` (`endpoint`, `token`) and of its
    `upload_folder` (`revision`, `create_pr`, `commit_message`).

    Raises: ValueError with one sentence where the hub cannot be reached or refuses (an HTTPError of requests or of
    httpx, by the version of huggingface_hub).
    """
    from huggingface_hub import HfApi, errors  # network code: loaded when asked for

    _check_names(repo_id, *([] if space is None else [space]))
    api = HfApi(**{name: options.pop(name) for name in ("endpoint", "token") if name in options})
    options = {"commit_message": "Upload tokenizer"} | options
    try:
        with temporary_directory() as folder:
            directory = folder / "tokenizer"
            save(tokenizer, directory, report, license, repo_id)
            api.create_repo(repo_id, private=private, exist_ok=True)
            address = api.upload_folder(repo_id=repo_id, folder_path=directory, **options).commit_url
            if space is not None:
                place = folder / "space"
                for name, text in _app_files(tokenizer, repo_id).items():
                    write_text(place / name, text)
                write_text(place / CARD, f"---\ntitle: {repo_id.split('/')[-1]}\nsdk: gradio\napp_file: app.py\n---\n")
                api.create_repo(space, private=private, exist_ok=True, repo_type="space", space_sdk="gradio")
                api.upload_folder(repo_id=space, folder_path=place, repo_type="space", commit_message="Upload app")
            return address
    except (OSError, errors.HFValidationError, errors.HTTPError) as error:  # pyright: ignore[reportPrivateImportUsage]
        text = f"{type(error).__name__}: {shorten(str(error), 150)}"
        fail("repo", "a hub that can be reached and a repository that you may write to", f"{repo_id!r} ({text})", 400)


def save(
    tokenizer: "ImageTokenizer[Any]",
    directory: str | os.PathLike[str],
    report: Mapping[str, Any] | None = None,
    license: str | None = None,
    repo_id: str = "",
) -> None:
    """Write what `push` uploads into a directory. repo_id: what app.py loads; the directory itself by default."""
    _check_names(*([repo_id] if repo_id else []))
    before = tokenizer.provenance
    if license is not None:
        tokenizer.provenance = dataclasses.replace(before, license=license)
    try:
        write(tokenizer, directory, {CARD: card(tokenizer, report), **_app_files(tokenizer, repo_id or ".")})
    finally:
        tokenizer.provenance = before


def _check_names(*names: str) -> None:
    """Refuse what is no name on the hub; a name also goes into app.py."""
    for name in names:
        plain = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name, re.ASCII) is not None
        require(plain, "repo", "a name such as owner/name", repr(name))


def _app_files(tokenizer: "ImageTokenizer[Any]", source: str) -> dict[str, str]:
    """app.py and requirements.txt of a Space."""
    app = APP.format(source=source, fit="crop", title=f"{tokenizer.family} image tokenizer")
    return {"app.py": app, "requirements.txt": REQUIREMENTS}
