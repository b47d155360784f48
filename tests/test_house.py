"""The arrows, the one table of names, the kernel families, the paths that no file may name."""

import ast
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from tests.cases import ROOT

PACKAGE = ROOT / "tokenizers_mm"
LEAVES = {
    "types",
    "_ahead",
    "_check",
    "_origin",
    "config",
    "_files",
    "_images",
    "_display",
    "_summary",
    "_ranks",
    "_safetensors",
    "_transformers",
    "resolutions",
}
PARTS = {"encoders", "quantizers", "decoders"}
BELOW_MODELS = PARTS | {"layers", "functional", "kernels"} | LEAVES

ALLOWED = {
    "_ahead": set(),
    "_check": set(),
    "_files": {"_check"},
    "_summary": {"_files"},
    "_ranks": set(),
    "_safetensors": {"_check"},
    "_transformers": set(),
    "_interpolation": {"_check"},
    "config": {"_check", "_files", "_interpolation"},
    "config_reference": {"config"},
    "_origin": {"_check"},
    "types": {"_check", "_display", "_images"},
    "_display": {"_images"},
    "_images": {"_check", "_files", "resolutions"},
    "resolutions": {"_check", "config"},
    "kernels": {"types", "_check"},
    "functional": {"kernels", "types", "_check"},
    "layers": {"functional", "types", "_check", "config"},
    **{part: {part, "layers", "functional", "kernels"} | LEAVES for part in PARTS},
    "models": BELOW_MODELS,
    "losses": {"layers", "functional", "types", "_check", "config"},
    "data": LEAVES,
    "checkpoints": {"models"} | BELOW_MODELS,
    "eval": {"models", "losses", "data"} | BELOW_MODELS,
    "export": {"models"} | BELOW_MODELS,
    "llm": {"models", "data"} | BELOW_MODELS,
}
EVERYTHING = {*ALLOWED, "cli", "doctor", "registry"}
ALLOWED["doctor"] = EVERYTHING
ALLOWED["registry"] = EVERYTHING
ALLOWED["cli"] = EVERYTHING
ALLOWED["__init__"] = EVERYTHING


def room(path: Path) -> str:
    """The first part of a file's place in the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Everything a file imports, lazily or not."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or PACKAGE not in path.parents, f"{path}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_flow_downhill(path: Path) -> None:
    here = room(path)
    assert here in ALLOWED, f"{here}: a room without a place in the house"
    for name in imports(path):
        top, *rest = name.split(".")
        assert top not in {"train", "benchmarks", "tests"}, f"{path} imports {name}"
        if (
            top == "tokenizers_mm"
            and rest
            and (PACKAGE / rest[0]).with_suffix(".py").exists() | (PACKAGE / rest[0]).is_dir()
        ):
            assert rest[0] == here or rest[0] in ALLOWED[here], f"{here} may not import {rest[0]}"


def test_import_is_light() -> None:
    """Imports of `load`: no native library, transformers or timm; under twice the time of torch (best of three)."""
    code = (
        "import sys, tokenizers_mm; tokenizers_mm.load;"
        "heavy = {'transformers', 'timm', 'xformers', 'matplotlib', 'sklearn', 'skimage'} & set(sys.modules);"
        "maps = open('/proc/self/maps').read() if sys.platform == 'linux' else '';"
        "assert not heavy, heavy; assert 'libtokenizers_mm' not in maps"
    )

    def seconds(program: str) -> float:
        times = []
        for _ in range(3):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
            times.append(time.perf_counter() - start)
        return min(times)

    assert seconds(code) < 2 * seconds("import torch")


def test_top_level_is_the_plan() -> None:
    planned = {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "Makefile",
        "CMakeLists.txt",
        "tokenizers_mm",
        "configs",
        "csrc",
        "train",
        "tests",
        "benchmarks",
        "assets",
        "docs",
        "mkdocs.yml",
    }
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode != 0:
        pytest.skip("not a git checkout")
    names = {line.split("/")[0] for line in tracked.stdout.splitlines()}
    assert {name for name in names if not name.startswith(".")} <= planned


def test_no_file_is_unfinished() -> None:
    marks = ("TO" + "DO", "FIX" + "ME", "NotImplemented" + "Error", "weights_only=" + "False")
    forgiving = re.compile(r"load_state_dict\([^)]*strict=" + "False")
    for folder in ("tokenizers_mm", "train", "csrc", "benchmarks"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".py", ".cpp", ".h", ".cu", ".cuh"}:
                text = path.read_text()
                assert not [mark for mark in marks if mark in text], path
                assert not forgiving.search(text), path


EXPLAINED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef, ast.Assign, ast.AnnAssign)
"""Nodes that a string literal explains as their first statement or as the next one."""


def explanations(path: Path) -> Iterator[tuple[int, str]]:
    """Lines and texts of the docstrings of a file: of the module, its classes and functions, and below assignments."""
    for node in ast.walk(ast.parse(path.read_text())):
        body = getattr(node, "body", None)
        for before, each in pairwise([node, *body]) if isinstance(body, list) else ():
            match each:
                case ast.Expr(ast.Constant(str(text))) if isinstance(before, EXPLAINED):
                    yield each.lineno, text


@pytest.mark.parametrize("folder", ["tokenizers_mm", "train", "tests", "benchmarks"])
def test_no_docstring_opens_with_a_fragment(folder: str) -> None:
    """Refuse the words that make a question or a fragment of the first line."""
    opening = re.compile(r"\s*(What|Whether|Of|All that|How|Which|Where|When|Why)\s")
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text.strip().splitlines()[0]}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, text in explanations(path)
        if opening.match(text)
    ]
    assert not found, "docstrings that open with a fragment; begin them with a noun or a verb:\n" + "\n".join(found)


def test_any_error_ends_in_two_places_only() -> None:
    """`except Exception` stands at the boundary of decoding and at that of the command line."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        nodes = [node.type for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ExceptHandler)]
        if wide := [n for n in nodes if n is None or (isinstance(n, ast.Name) and "Exception" in n.id)]:
            found[path.name] = len(wide)
    assert found == {"_images.py": 3, "boundary.py": 1}


def test_every_file_goes_through_the_one_writer() -> None:
    """Files are opened for writing in `_files.py`, at a place that `atomic_path` or `atomic_directory` gave, or in a
    temporary folder."""
    writing = re.compile(
        r"""open\([^)]*["'][wax]b?\+?["']|\.write_(text|bytes)\(|\bsave_file\(|torch\.save\(|savez\("""
    )
    for path in PACKAGE.rglob("*.py"):
        if path.name == "_files.py":
            continue
        text = path.read_text()
        for match in writing.finditer(text):
            before = text[: match.start()]
            place = before[before.rfind("\ndef ") :]
            assert re.search(r"with .*(atomic_path|(atomic|temporary)_directory)\(", place), f"{path}: {match[0]}"


@pytest.mark.parametrize(
    ("op", "native"),
    [
        ("nearest_code", "nearest_code"),
        ("nearest_code_shared", "nearest_code"),
        ("code_sums", "code_sums"),
        ("kmeans", "code_sums"),
        ("ssim", "ssim"),
    ],
)
def test_every_kernel_is_a_family_of_five(op: str, native: str) -> None:
    """Declaration, native code, reference twin, test, benchmark. The shared search is one search over joined parts;
    k-means is made of the search and the sums."""
    from tokenizers_mm import kernels

    assert callable(getattr(kernels, op))
    assert f"tmm_{native}(" in (ROOT / "csrc" / "tokenizers_mm.h").read_text()
    assert f"def {native}(" in (PACKAGE / "kernels" / "reference.py").read_text()
    assert (ROOT / "tests" / "kernels" / f"test_{op}.py").is_file()
    assert (ROOT / "benchmarks" / f"{op}.py").is_file()


@pytest.mark.parametrize(
    "path", sorted([*PACKAGE.rglob("*.py"), *(ROOT / "train").rglob("*.py")]), ids=lambda p: p.name
)
def test_files_keep_to_the_budget(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 450
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert (node.end_lineno or 0) - node.lineno < 80, node.name
            arguments = node.args
            count = len([*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs])
            assert count <= 9, f"{node.name} has {count} parameters"  # 8 and self
