"""Every page of docs/ is true: its blocks run in order, its links lead somewhere, and it builds without a warning."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cases import ROOT
from tests.documents import blocks, make_language_model, make_workplace, pages, quick_compile, run_page
from tests.tables import kept_tables

pytestmark = pytest.mark.usefixtures("one_thread")

TASKS = {
    "quickstart.md": ["A folder to a file of ids"],
    "training.md": ["One command", "Fine-tune"],
    "choosing.md": ["Compare two"],
    "quantizers.md": ["Swap it"],
    "zoo.md": ["Convert"],
    "trainer.md": ["Hugging Face Trainer"],
    "records.md": ["Tokenize a data set"],
    "kernels.md": ["In your own VQ layer, compiled"],
    "onnx.md": ["ONNX without torch"],
    "extending.md": ["Your own loss"],
    "notebook.md": ["A notebook"],
    "language_models.md": ["Understanding and generation"],
}
"""Pages and headings of what a newcomer does first."""

LANGUAGE_MODELS = {"trainer.md", "language_models.md"}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    make_workplace(folder)
    return folder


@pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore::torch.jit.TracerWarning")  # of exporters and trainers
@pytest.mark.parametrize("path", pages(), ids=lambda path: path.stem)
def test_a_page_runs(path: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TORCH_HOME", str(workplace / "torch"))  # no weights of other programs on this machine
    quick_compile(monkeypatch)
    if path.name in LANGUAGE_MODELS and not (workplace / "Qwen").exists():
        make_language_model(workplace)
    with kept_tables():
        run_page(path)


def test_a_newcomers_tasks_are_short() -> None:
    """One command, or at most 30 lines of Python, under a heading that the first page links."""
    index = (ROOT / "docs" / "index.md").read_text()
    for name, headings in TASKS.items():
        page = (ROOT / "docs" / name).read_text()
        assert f"]({name}" in index, name
        for heading in headings:
            assert re.search(rf"^#+ {re.escape(heading)}$", page, re.M), (name, heading)
            parts = [block for block in blocks(page) if block.heading == heading]
            assert parts or name == "notebook.md", (name, heading)
            for block in parts:
                lines = [line for line in block.text.splitlines() if line.strip() and not line.startswith("#")]
                assert len(lines) <= 30, (name, heading)


def test_the_notebook_runs_and_shows_what_it_keeps(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    program = runpy.run_path(str(ROOT / "docs" / "notebook_outputs.py"))
    notebook = json.loads((ROOT / "docs" / "notebook.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) == 10
    for cell, outputs in zip(cells, program["execute"](notebook), strict=True):
        assert [sorted(o.get("data", [])) for o in outputs] == [sorted(o.get("data", [])) for o in cell["outputs"]]
    pictures = [o for cell in cells for o in cell["outputs"] if "image/png" in o.get("data", {})]
    assert len(pictures) >= 4


def test_it_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="the extra `docs` is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    site = tmp_path / "site"
    assert {path.with_suffix(".html").name for path in pages()} <= {path.name for path in site.glob("*.html")}
    reference = (site / "configuration.html").read_text(encoding="utf-8")
    assert "samples of a micro-batch" in reference
    assert "tokenflow_clipb_32k_enhanced.pt</td>" in (site / "zoo.html").read_text(encoding="utf-8")
    for page in site.glob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:link|script|img)[^>]+(?:href|src)="(https?://[^"]+)"', text)
        assert not loaded, f"{page.name} loads {loaded} from the network"
