"""Members of tar files that anybody may have written."""

import tarfile
from collections.abc import Iterator
from pathlib import Path

from tokenizers_mm._check import expecting, require
from tokenizers_mm._files import regular_file


def read_members(path: Path) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    """Regular files of an uncompressed tar file, in order, with the open archive; links and sparse files are left out.

    No member is read beyond the file's end.

    Raises:
        ValueError: the file is none, or its headers are broken, go backwards or are nested without an end.
    """
    name = f"shard {path}"
    regular_file(path, "a tar file")
    with expecting(name, "an uncompressed tar file", tarfile.TarError, OSError, EOFError, RecursionError):
        size, end = path.stat().st_size, -1
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                require(member.offset_data > end, name, "headers one after the other", f"one at {member.offset_data}")
                end = member.offset_data
                archive.members = []  # pyright: ignore[reportAttributeAccessIssue]  # or it keeps all headers
                if not member.isreg() or member.issparse():
                    continue
                inside = 0 <= member.size <= size - member.offset_data
                require(inside, name, f"members within its {size} bytes", f"{member.size} at {member.offset_data}")
                yield member, archive
            archive.fileobj.seek(archive.offset)  # type: ignore[union-attr]
            rest = archive.fileobj.read(tarfile.BLOCKSIZE)  # type: ignore[union-attr]
            require(not rest.strip(b"\0"), name, "headers to the end of the archive", f"none at {archive.offset}")
