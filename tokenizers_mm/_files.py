"""The one writer of files: whole or not there, beside their place until they are complete, and never on a device.

Every write goes to a hidden staging folder beside its place and is moved at the end. The staging folder holds a locked
file; after a kill the lock is free, and the next writer in that folder removes what is left.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from tokenizers_mm._check import fail, shorten

STAGING = ".tmm-staging"
"""Suffix of the hidden folder in which a file or a folder is made."""

REPLACING = ".tmm-replacing"
"""Name of the hidden folder, inside a folder, with the files of a complete set that are not all in their places yet."""

LOCK = ".lock"
"""Name of the file, inside a folder, that the one writer of the folder holds locked."""


def regular_file(path: str | os.PathLike[str], expected: str = "a file") -> Path:
    """The path, if it is a regular file or a link to one. A FIFO or a device could block a reader or never end."""
    kind = kind_of(path)
    if kind != "a file":
        fail(str(path), expected, kind)
    return Path(path)


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A name to write one file at; the file takes the place of `path` when the block ends without an error.

    Symbolic links are followed and stay. The mode of an existing file is kept; a new one gets 0666 less the umask.

    Raises:
        ValueError: `path` is a folder, a device, a FIFO or a socket.
        OSError: the file cannot be written, for example on a full disk; what was there before is unchanged.
    """
    target = file_place(path)
    with _staging(target.parent, target) as folder:
        yield folder / "new"
        _finish(folder / "new", target, folder)
        os.replace(folder / "new", target)


@contextmanager
def atomic_directory(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """An empty folder to write a set of files in; they take their places when the block ends without an error.

    A new directory appears in one move. In one that exists, the files written replace those of the same names as a
    set: after a kill at any point, `settle` (which the next reader or writer calls) finds either no new file in place
    or completes the set. Other files of the directory stay.
    """
    target = Path(os.path.realpath(directory))
    if target.exists() and not target.is_dir():
        fail(f"output {directory}", "a folder or a new name", kind_of(target))
    if target.is_dir():
        with suppress(OSError):
            _sweep(target.parent)  # of a writer that died when it had made this folder
    with _staging(target if target.is_dir() else target.parent, target) as folder:
        new = folder / "new"
        new.mkdir()
        yield new
        files = [path for path in sorted(new.rglob("*")) if path.is_file()]
        for path in files:
            _finish(path, file_place(target / path.relative_to(new)), folder)
        if not target.is_dir():
            os.replace(new, target)
            return
        with _locked(target):
            _move_all(target)
            os.replace(new, target / REPLACING)
            _move_all(target)


def settle(directory: str | os.PathLike[str]) -> None:
    """Complete the replacement of a set of files that was interrupted in a directory, before the set is read.

    Raises:
        ValueError: there is such a replacement, and it cannot be completed (a read-only folder, for example), or it
            would write outside of the directory, through a link: the directory may come from somebody else.
    """
    if not (Path(directory) / REPLACING).is_dir():
        return
    try:
        with _locked(Path(directory)):
            _move_all(Path(directory), leave=False)
    except OSError as error:
        expected = "a whole set of files, or leave to complete the save that was interrupted"
        fail(str(directory), expected, f"{REPLACING} in it and {error.strerror}")


@contextmanager
def one_writer(folder: str | os.PathLike[str], name: str, held: str = "") -> Iterator[None]:
    """Hold the lock of a folder, which is made; where the file system has no locks, nothing is held.

    The system releases the lock of a process that died. Worker processes do not inherit it.
    name: what an error begins with. held: what it calls the folder, by default its path.

    Raises:
        ValueError: another process holds the lock, or no folder can be made there.
    """
    path = folder_place(folder, held) / LOCK
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    while True:
        stream = open(os.open(path, flags, 0o666), "r+b", buffering=0)  # noqa: SIM115 (closed below)
        try:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                fail(name, f"a folder whose {LOCK} is a file", kind_of(path))
            _hold(stream.fileno(), name, held or str(folder))
            if not (path.exists() and os.path.samestat(path.stat(), os.fstat(stream.fileno()))):
                continue  # the one before has just removed it
            try:
                _sign(stream, path)
                yield
            finally:
                path.unlink(missing_ok=True)
            return
        finally:
            stream.close()


def _sign(stream: IO[bytes], path: Path) -> None:
    """Write the number of this process into its lock."""
    try:
        stream.truncate(0)
        stream.write(f"{os.getpid()}\n".encode())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def _hold(descriptor: int, name: str, folder: str) -> None:
    """Take the lock of a file, or say which process has it."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            writer = shorten(os.pread(descriptor, 20, 0).decode("ascii", errors="replace"))
            fail(name, "a folder that no other run writes to", f"{folder} (process {writer})")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 file atomically. A file name in it that is no UTF-8 appears with escaped bytes, as `\\udcff`."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(text.encode("utf-8", errors="backslashreplace"))


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write JSON atomically, indented, with a final newline; ValueError for NaN and infinity, which JSON has not."""
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        fail(f"output {path}", "values that JSON has", str(error))
    write_text(path, text + "\n")


def file_place(path: str | os.PathLike[str]) -> Path:
    """Path to write a file of this name to, links resolved; ValueError for neither a regular file nor a new name."""
    try:
        found = Path(path).stat()
    except FileNotFoundError:
        found = None
    except OSError as error:  # a loop of links, a file where a folder should be
        fail(f"output {path}", "a file or a new name", error.strerror)
    if found is not None and not stat.S_ISREG(found.st_mode):
        fail(f"output {path}", "a file or a new name", kind_of(path))
    return Path(os.path.realpath(path))


def folder_place(path: str | os.PathLike[str], shown: str = "") -> Path:
    """Path of a folder to write files to, made or not; ValueError for what no folder can be made of.

    shown: what an error calls it, by default its path.
    """
    place = Path(path)
    nearest = next((each for each in (place, *place.parents) if os.path.lexists(each)), Path())
    if not nearest.is_dir():
        fail(f"output {shown or path}", "a folder or a new name", f"{kind_of(nearest)}: {nearest}")
    return place


def sha256(*paths: str | os.PathLike[str]) -> str:
    """The hexadecimal sha256 of a file, or of several, one behind the other."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def kind_of(path: str | os.PathLike[str]) -> str:
    """The kind of thing at a path, in words."""
    try:
        mode = Path(path).stat().st_mode
    except OSError as error:
        return "no such file" if error.errno == errno.ENOENT else str(error.strerror)
    except ValueError:
        return "a name with a null byte"
    kinds = {
        "a file": stat.S_ISREG,
        "a folder": stat.S_ISDIR,
        "a FIFO": stat.S_ISFIFO,
        "a socket": stat.S_ISSOCK,
        "a device": lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode),
    }
    return next((name for name, test in kinds.items() if test(mode)), "something else")


@contextmanager
def _staging(parent: Path, target: Path) -> Iterator[Path]:
    """A hidden folder that is removed at the end, with the errors of writing in it named after `target`."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _sweep(parent)
        folder, lock = _new_staging(parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target)) from None
    try:
        yield folder
    except OSError as error:
        if error.errno is not None and (error.filename is None or str(folder) in str(error.filename)):
            raise OSError(error.errno, error.strerror, str(target)) from error
        raise
    except (RuntimeError, SafetensorError) as error:
        _raise_if_disk(error, target)
        raise
    finally:
        _remove(folder)
        os.close(lock)


@contextmanager
def temporary_directory() -> Iterator[Path]:
    """An empty folder in the system's place for temporary files, removed at the end.

    What killed processes left there goes first: unlike those of `tempfile`, it is found again.
    """
    parent = Path(tempfile.gettempdir())
    _sweep(parent)
    folder, lock = _new_staging(parent)
    try:
        (folder / "new").mkdir()
        yield folder / "new"
    finally:
        _remove(folder)
        os.close(lock)


def _new_staging(parent: Path) -> tuple[Path, int]:
    """A new hidden folder and the descriptor that holds its lock; another try where a sweeper was faster."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=".", suffix=STAGING, dir=parent))
        try:
            lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR, 0o666)
        except FileNotFoundError:
            continue
        except OSError:
            folder.rmdir()
            raise
        taken = _try_lock(lock)
        if taken is not False and (folder / "lock").exists():
            return folder, lock
        os.close(lock)


def _try_lock(descriptor: int) -> bool | None:
    """Take a lock without waiting: False where somebody else holds it, None where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Wait for the lock of a directory; without one where the file system has no locks on directories."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _finish(path: Path, place: Path, staging: Path) -> None:
    """Give a written file the mode of the file it replaces (a new file's, where there is none), and sync it."""
    model = place if place.exists() else staging / "lock"
    path.chmod(stat.S_IMODE(model.stat().st_mode))
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())


def _move_all(directory: Path, leave: bool = True) -> None:
    """Move the files of a complete set to their places, if there is one; the caller holds the lock.

    leave: whether links may lead out of the directory.
    """
    source = directory / REPLACING
    if not source.is_dir():
        return
    inside = Path(os.path.realpath(directory))
    for path in sorted(source.rglob("*")):
        if not path.is_file():
            continue
        place = directory / path.relative_to(source)
        if not leave and not Path(os.path.realpath(place)).is_relative_to(inside):
            fail(str(directory), f"no files in {REPLACING} that belong outside of it", os.path.realpath(place))
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.is_symlink():  # the target may be on another file system
            with atomic_path(place) as temporary:
                shutil.copyfile(path, temporary)
            path.unlink()
        else:
            os.replace(path, place)
    shutil.rmtree(source)


_next_sweep: dict[Path, float] = {}


def _sweep(parent: Path) -> None:
    """Remove the staging folders of dead writers; in a large folder only now and then, since it lists all names."""
    if time.monotonic() < _next_sweep.get(parent, 0.0):
        return
    names = os.listdir(parent)  # noqa: PTH208 (names are enough)
    for name in names:
        if name.startswith(".") and name.endswith(STAGING):
            _remove_if_dead(parent / name)
    if len(_next_sweep) > 1000:
        _next_sweep.clear()
    _next_sweep[parent] = time.monotonic() + 2e-5 * len(names)


def _remove_if_dead(folder: Path) -> None:
    with suppress(OSError):
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            return  # a link, or what somebody else put here
        try:
            lock = os.open(folder / "lock", os.O_RDWR)
        except FileNotFoundError:
            folder.rmdir()  # a writer that is about to make its lock begins again
            return
        try:
            if _try_lock(lock):
                _remove(folder)
        finally:
            os.close(lock)


def _remove(folder: Path) -> None:
    """Remove a staging folder, its lock last: after a kill in between, the next writer still knows that it is dead."""
    with suppress(OSError):
        for entry in folder.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.name != "lock":
                entry.unlink()
        (folder / "lock").unlink(missing_ok=True)
        folder.rmdir()


def _raise_if_disk(error: Exception, target: Path) -> None:
    """Turn the errors of writers that have their own types (safetensors, torch) into the OSError that they hide."""
    text = str(error)
    if match := re.search(r"os error (\d+)", text):
        number = int(match[1])
        raise OSError(number, os.strerror(number), str(target)) from error
    if any(part in text for part in ("PytorchStreamWriter", "inline_container", "iostream")):
        place = os.statvfs(target.parent)
        number = errno.ENOSPC if place.f_bavail == 0 else errno.EIO
        raise OSError(number, f"{os.strerror(number)} ({shorten(text, 80)})", str(target)) from error
