"""Options in any order, configurations that are listed and copied, completion in a real shell."""

import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.cases import ROOT
from tokenizers_mm.cli import VERBS, completion, configs, main, program


def test_help_is_quick() -> None:
    """Half a second of a core at most, best of three; a part of it is Python itself."""
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "tokenizers_mm.cli", "--help"], check=True, capture_output=True, cwd=ROOT)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) <= 0.5


def test_a_shipped_tokenizer_is_told_without_torch() -> None:
    code = "import sys; from tokenizers_mm.cli import main; main(['info', 'tokenizers_mm/demo-64'])\n"
    code += "assert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "tests")
    assert result.returncode == 0, result.stderr
    assert "shared: 121 ids, 4096 codes" in result.stdout


def test_every_verb_has_its_own_help(capsys: pytest.CaptureFixture[str]) -> None:
    for verb, module in VERBS.items():
        if verb == "train":  # tests/train: it lists all keys
            continue
        with pytest.raises(SystemExit) as end:
            main([verb, "--help"])
        assert end.value.code == 0
        said = capsys.readouterr().out
        assert said.startswith(f"usage: tokenizers-mm {verb}")
        assert module.SUMMARY.split()[0] in said


def test_arguments_come_in_any_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Positional ones before, between and after options; an unknown option is a usage error."""
    copy = str(tmp_path / "my.yaml")
    assert main(["configs", "--copy", copy, "debug"]) == 0
    assert yaml.safe_load(Path(copy).read_text()) == yaml.safe_load((ROOT / "configs" / "debug.yaml").read_text())
    convert = ["convert", "--out", str(tmp_path / "o"), "tokenflow", str(tmp_path / "no.pt"), "image_size=64"]
    assert main(convert) == 2
    assert "no.pt" in capsys.readouterr().err
    assert main(["convert", "tokenflow", "--out", str(tmp_path / "o"), str(tmp_path / "no.pt"), "novalue"]) == 2
    assert "option: expected key=value, got novalue" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main(["configs", "--nonsense"])
    assert end.value.code == 2


def test_configurations_are_listed_shown_and_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    assert main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} == names
    assert all(len(line.split()) > 3 for line in lines), "each has a summary"
    assert main(["configs", "debug.yaml"]) == 0
    assert capsys.readouterr().out == (ROOT / "configs" / "debug.yaml").read_text()
    (tmp_path / "there.yaml").write_text("mine")
    for arguments, message in [
        (["nothing"], "NAME: expected one of"),
        (["../configs/debug"], "NAME: expected one of"),
        (["bridge_debug"], "NAME: expected language_debug, its present name, got bridge_debug"),
        (["debug", "--copy", str(tmp_path / "there.yaml")], "--copy: expected a new file, got a file"),
        (["--copy", str(tmp_path / "new.yaml")], "NAME: expected the configuration to copy, got none"),
    ]:
        assert main(["configs", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "there.yaml").read_text() == "mine"


def test_configurations_are_beside_the_program_of_an_installed_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wheel puts `train` and `configs` into the package: the folder beside the program is the one."""
    from importlib.machinery import ModuleSpec

    (tmp_path / "tokenizers_mm" / "configs").mkdir(parents=True)
    (tmp_path / "tokenizers_mm" / "configs" / "mine.yaml").write_text("# Mine.\nout: runs/mine\n")
    place = str(tmp_path / "tokenizers_mm" / "train" / "__init__.py")
    monkeypatch.setattr(program, "find_spec", lambda _: ModuleSpec("tokenizers_mm.train", None, origin=place))
    assert configs.folder() == tmp_path / "tokenizers_mm" / "configs"
    assert configs.summary(configs.find("mine")) == "Mine"
    packages = (ROOT / "pyproject.toml").read_text()
    assert '"tokenizers_mm/configs" = "configs"' in packages
    assert '"tokenizers_mm/train" = "train"' in packages
    monkeypatch.setattr(program, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match="training program: expected an installed tokenizers_mm"):
        program.run_program(program.PROGRAM, ["debug"])


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash on this machine")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (["tokenizers-mm", "en"], {"encode"}),
        (["tokenizers-mm", "encode", "--fi"], {"--fit"}),
        (["tokenizers-mm", "train", "--pre"], {"--preset"}),
        (["tokenizers-mm", "completion", ""], {"bash", "zsh", "--help", "-h", "a_file.png"}),
        (["tokenizers-mm", "info", "a_f"], {"a_file.png"}),
    ],
)
def test_bash_completes(line: list[str], expected: set[str], tmp_path: Path) -> None:
    (tmp_path / "a_file.png").touch()
    words = " ".join(f"'{word}'" for word in line)
    program = completion.script("bash") + f"COMP_WORDS=({words}); COMP_CWORD={len(line) - 1}; _tokenizers_mm\n"
    program += 'printf "%s\\n" "${COMPREPLY[@]}"'
    found = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert set(found.stdout.split()) == expected
    assert found.stderr == ""


def test_zsh_runs_the_same_function() -> None:
    script = completion.script("zsh")
    assert script.endswith(completion.script("bash"))
    assert "bashcompinit" in script
