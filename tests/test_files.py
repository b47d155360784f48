"""The one writer of files: places, modes, links, kills at every step, full disks, what dead writers leave."""

import itertools
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cases import ROOT
from tests.models.test_saving import fork
from tokenizers_mm import _files
from tokenizers_mm._files import (
    LOCK,
    REPLACING,
    STAGING,
    atomic_directory,
    atomic_path,
    one_writer,
    settle,
    temporary_directory,
    write_json,
    write_text,
)
from tokenizers_mm.models.saving import save_tensors


def write(path: Path, text: str = "new") -> None:
    write_text(path, text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)


def test_a_failure_leaves_nothing_and_harms_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")

    def fail_after_writing(context: AbstractContextManager[Path], name: str) -> None:
        with context as place:
            (place / name if name else place).write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_after_writing(atomic_path(tmp_path / "file"), "")
    with pytest.raises(RuntimeError):
        fail_after_writing(atomic_directory(tmp_path / "new"), "a")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_directories_appear_whole_and_keep_what_is_not_theirs(tmp_path: Path) -> None:
    for text in ("one", "two"):
        with atomic_directory(tmp_path / "d") as folder:
            (folder / "a").write_text(text)
            (folder / "deep").mkdir()
            write(folder / "deep" / "b", text)
        (tmp_path / "d" / "mine").write_text("kept")
    assert (tmp_path / "d" / "a").read_text() == "two"
    assert (tmp_path / "d" / "deep" / "b").read_text() == "two"
    assert (tmp_path / "d" / "mine").read_text() == "kept"
    assert sorted(p.name for p in (tmp_path / "d").iterdir()) == ["a", "deep", "mine"]
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def special(tmp_path: Path) -> dict[str, Path]:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "to_fifo").symlink_to("fifo")
    (tmp_path / "file").write_text("old")
    places = {"a device": Path("/dev/null"), "a FIFO": tmp_path / "fifo", "a folder": tmp_path / "folder"}
    return places | {
        "a FIFO ": tmp_path / "to_fifo",
        "Too many levels": tmp_path / "loop",
        "Not a directory": tmp_path / "file" / "x",
    }


def test_what_is_no_regular_file_is_refused_and_stays(tmp_path: Path) -> None:
    for kind, path in special(tmp_path).items():
        before = os.lstat(path).st_mode if os.path.lexists(path) else None
        with pytest.raises(ValueError, match=f"output .*expected a file or a new name, got {kind.strip()}"):
            write(path)
        assert (os.lstat(path).st_mode if os.path.lexists(path) else None) == before
    with (
        pytest.raises(ValueError, match="expected a folder or a new name, got a FIFO"),
        atomic_directory(tmp_path / "fifo"),
    ):
        pass
    (tmp_path / "folder" / "config.json").symlink_to(tmp_path / "fifo")
    (tmp_path / "folder" / "a").write_text("old")

    def replace() -> None:
        with atomic_directory(tmp_path / "folder") as folder:
            for name in ("a", "config.json"):
                (folder / name).write_text("new")

    with pytest.raises(ValueError, match="got a FIFO"):
        replace()
    assert (tmp_path / "folder" / "a").read_text() == "old"


def test_links_stay_and_their_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "d").mkdir()
    for place in (tmp_path / "link", tmp_path / "d" / "a"):
        target = tmp_path / "store" / place.name
        target.write_text("old")
        place.symlink_to(target)
    (tmp_path / "to_d").symlink_to("d")
    (tmp_path / "dangling").symlink_to("store/fresh")
    write(tmp_path / "link")
    write(tmp_path / "dangling")
    with atomic_directory(tmp_path / "to_d") as folder:
        (folder / "a").write_text("new")
    assert all((tmp_path / name).is_symlink() for name in ("link", "dangling", "d/a", "to_d"))
    assert {p.name: p.read_text() for p in (tmp_path / "store").iterdir()} == dict.fromkeys(
        ("link", "a", "fresh"), "new"
    )


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_are_kept_and_the_umask_is_honoured(tmp_path: Path, umask: int) -> None:
    old, new, folder = tmp_path / "old", tmp_path / "new", tmp_path / "folder"
    old.touch()
    old.chmod(0o600)
    before = os.umask(umask)
    try:
        for path in (old, new):
            save_tensors({"x": torch.zeros(2)}, path)
        with atomic_directory(folder) as made:
            write(made / "a")
        (folder / "a").chmod(0o640)
        with atomic_directory(folder) as made:
            write(made / "a")
            (made / "b").write_text("new")
    finally:
        os.umask(before)
    assert (mode(old), mode(new), mode(folder)) == (0o600, 0o666 & ~umask, 0o777 & ~umask)
    assert (mode(folder / "a"), mode(folder / "b")) == (0o640, 0o666 & ~umask)


KILL = """
import os, sys
from pathlib import Path
from tokenizers_mm import _files
left, replace = int(sys.argv[2]), os.replace
def counted(*arguments):
    global left
    if left == 0:
        os._exit(9)
    left -= 1
    replace(*arguments)
os.replace = counted
with _files.atomic_directory(sys.argv[1]) as folder:
    for name in ("a", "b", "c"):
        _files.write_text(folder / name, sys.argv[3])
"""


def test_a_set_is_old_or_new_after_a_kill_at_every_move(tmp_path: Path) -> None:
    seen = []
    for moves in range(8):
        folder = tmp_path / "d"
        with atomic_directory(folder) as made:
            for name in "abc":
                write(made / name, "old")
        assert names(folder) == ["a", "b", "c"], "a dead writer's leftovers"
        ended = run(KILL, str(folder), str(moves), "new").returncode
        settle(folder)
        assert not (folder / REPLACING).exists()
        found = {(folder / name).read_text() for name in ("a", "b", "c")}
        assert len(found) == 1
        seen.append((ended, found.pop()))
    assert seen == [(9, "old")] * 4 + [(9, "new")] * 3 + [(0, "new")]


def test_a_set_that_cannot_be_completed_is_one_sentence(tmp_path: Path) -> None:
    for folder in (tmp_path / "d" / REPLACING, tmp_path / "d" / "a"):
        folder.mkdir(parents=True)
    (tmp_path / "d" / REPLACING / "a").write_text("new")
    with pytest.raises(ValueError, match="expected a whole set of files, or leave to complete the save"):
        settle(tmp_path / "d")


HANG = """
import sys, time
from tokenizers_mm import _files
with getattr(_files, sys.argv[1])(sys.argv[2]) as place:
    print("writing", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("kind", ["atomic_path", "atomic_directory"])
def test_the_next_writer_removes_what_a_dead_one_left_and_nothing_else(tmp_path: Path, kind: str) -> None:
    writers = [
        subprocess.Popen([sys.executable, "-c", HANG, kind, str(tmp_path / "x")], cwd=ROOT, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    for writer in writers:
        assert writer.stdout is not None
        writer.stdout.readline()

    def left() -> int:
        return sum(name.endswith(STAGING) for name in names(tmp_path))

    _files._next_sweep.clear()
    write(tmp_path / "y")
    assert left() == 2, "both live"
    for alive, writer in zip((1, 0), writers, strict=True):
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        assert writer.stdout is not None
        writer.stdout.close()
        _files._next_sweep.clear()
        write(tmp_path / "y")
        assert left() == alive
    assert names(tmp_path) == ["y"]


CHANGES = ("replace", "unlink", "rmdir", "mkdir", "open", "fsync")
"""Functions of `os` that change the file system, or stand between two changes."""


def die_at(number: int, work: Callable[[], None]) -> bool:
    """Do work in a child that dies before change `number` of the file system; True where it came to its end."""
    child = fork()
    if child == 0:
        left = itertools.count(number, -1)

        def counting(whole: Any) -> Any:
            return lambda *given, **named: whole(*given, **named) if next(left) > 0 else os._exit(9)

        for name in CHANGES:
            setattr(os, name, counting(getattr(os, name)))
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 0


@pytest.mark.parametrize("kind", ["file", "new set", "set", "temporary"])
def test_nothing_is_left_after_a_kill_at_every_change(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The very next writer removes it, even where it died before it had a lock or while it removed its own folder."""
    monkeypatch.setattr(_files.tempfile, "tempdir", str(tmp_path))

    def work() -> None:
        if kind == "file":
            write(tmp_path / "a")
            return
        place = temporary_directory() if kind == "temporary" else atomic_directory(tmp_path / "a")
        with place as folder:
            (folder / "inner").mkdir()
            (folder / "inner" / "b").write_text("new")

    for number in range(100):
        if kind == "set":
            (tmp_path / "a").mkdir(exist_ok=True)
        ended = die_at(number, work)
        _files._next_sweep.clear()
        work()
        assert not [path for path in tmp_path.rglob("*") if STAGING in path.name or path.name == REPLACING], number
        if ended:
            break
        if kind == "new set":
            shutil.rmtree(tmp_path / "a")
    assert 3 < number < 99


def test_a_link_with_the_name_of_a_leftover_is_not_followed(tmp_path: Path) -> None:
    """Anybody may have put it into a folder for temporary files, or into one that was unpacked."""
    precious = tmp_path / "precious"
    precious.mkdir()
    for name in ("lock", "file"):
        (precious / name).write_text("mine")
    out = tmp_path / "out"
    out.mkdir()
    (out / f".x{STAGING}").symlink_to(precious)
    _files._next_sweep.clear()
    write(out / "a")
    assert names(precious) == ["file", "lock"]


def test_a_lock_on_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    before, limit = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limit[1]))
    try:
        with pytest.raises(OSError) as raised, one_writer(tmp_path, "out"):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert raised.value.filename == str(tmp_path / LOCK)
    assert names(tmp_path) == []


def test_writers_of_one_set_take_turns(tmp_path: Path) -> None:
    """Eight threads replace a set of three files again and again: it is of one of them at the end."""

    def replace(number: int) -> None:
        for _ in range(10):
            with atomic_directory(tmp_path / "d") as folder:
                for name in ("a", "b", "c"):
                    (folder / name).write_text(str(number))

    (tmp_path / "d").mkdir()
    threads = [threading.Thread(target=replace, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert names(tmp_path / "d") == ["a", "b", "c"]
    assert len({path.read_text() for path in (tmp_path / "d").iterdir()}) == 1


def test_a_full_disk_is_an_error_of_the_output_and_the_old_file_stays(tmp_path: Path) -> None:
    """A limit on the size of files stands in for a full disk; every writer that is used meets it."""
    big = torch.zeros(1 << 18)

    def torch_save(path: Path) -> None:
        with atomic_path(path) as temporary:
            torch.save(big, temporary)

    writers: list[Callable[[Path], None]] = [
        lambda path: write_text(path, "x" * (1 << 20)),
        lambda path: save_tensors({"x": big}, path),
        torch_save,
    ]
    before, limit = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    for index, writer in enumerate(writers):
        path = tmp_path / str(index)
        path.write_text("old")
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limit[1]))
        try:
            with pytest.raises(OSError) as raised:
                writer(path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert raised.value.filename == str(path)
        assert path.read_text() == "old"
    signal.signal(signal.SIGXFSZ, before)
    assert names(tmp_path) == ["0", "1", "2"]


def test_a_lock_that_cannot_be_made_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.open

    def full(path: Path, *arguments: int) -> int:
        if str(path).endswith("lock"):
            raise OSError(28, "No space left on device", str(path))
        return whole(path, *arguments)

    monkeypatch.setattr(_files.os, "open", full)
    with pytest.raises(OSError, match="No space left") as raised:
        write(tmp_path / "x")
    assert raised.value.filename == str(tmp_path / "x")
    assert names(tmp_path) == []


def test_json_has_no_nan_and_takes_every_file_name(tmp_path: Path) -> None:
    for value in (float("nan"), float("inf"), {"a": [-float("inf")]}):
        with pytest.raises(ValueError, match="expected values that JSON has"):
            write_json(tmp_path / "x.json", value)
    assert names(tmp_path) == []
    write_json(tmp_path / "x.json", {"name": os.fsdecode(b"caf\xe9.png")})
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))["name"] == os.fsdecode(b"caf\xe9.png")


def test_a_set_of_anybody_is_not_completed_outside_of_its_folder(tmp_path: Path) -> None:
    """A folder of somebody else may hold links beside a set that claims to be unfinished."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "secret").write_text("old")
    for name, link, target in (("a", "a", "home/secret"), ("d/b", "d", "home"), ("c", "c", "home/new")):
        folder = tmp_path / f"folder {name.replace('/', ' ')}"
        (folder / REPLACING / name).parent.mkdir(parents=True)
        (folder / REPLACING / name).write_text("new")
        (folder / link).symlink_to(tmp_path / target)
        with pytest.raises(ValueError, match=r"expected no files in .* that belong outside of it, got .*home"):
            settle(folder)
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["secret"]
    assert (tmp_path / "home" / "secret").read_text() == "old"


def test_a_lock_that_is_no_file_is_refused_and_stays(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("old")
    for name in ("link", "fifo", "folder"):
        (tmp_path / name).mkdir()
    (tmp_path / "link" / LOCK).symlink_to(tmp_path / "target")
    os.mkfifo(tmp_path / "fifo" / LOCK)
    (tmp_path / "folder" / LOCK).mkdir()
    for name in ("link", "fifo", "folder"):
        with pytest.raises((ValueError, OSError)), one_writer(tmp_path / name, "out"):
            pass
    assert (tmp_path / "target").read_text() == "old"
    with one_writer(tmp_path / "new", "out"):
        assert (tmp_path / "new" / LOCK).read_text() == f"{os.getpid()}\n"
    assert list((tmp_path / "new").iterdir()) == []
