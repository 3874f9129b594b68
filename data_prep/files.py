"""Files that are whole or absent: atomic writes, and a full disk told in words."""

from __future__ import annotations

import errno
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_prep.errors import UserError

TEMPORARY = ".tmp-"  # begins the name of what is being written; a killed process leaves it
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk full, quota used up, the shell's file size limit
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Turn a full disk or a folder that may not be written, met inside, into a `UserError` naming `place`."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE:
            raise UserError(
                f"{place}: no space left on device ({error.strerror}); free some space and run the same "
                "command again: it goes on from the last whole stage"
            ) from error
        if error.errno in NOT_WRITABLE:
            raise UserError(
                f"{place}: cannot be written ({error.strerror}); choose a folder that you may write, "
                "with output.dir=FOLDER"
            ) from error
        raise


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable; a file system that cannot sync folders is left alone."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def write_synced(path: Path, data: bytes) -> None:
    """Write `path` in place and make its content durable; for files in a folder nobody reads yet."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replace `path` as a whole: whoever reads it, at any moment, finds the old content or the new.

    Makes the folders above. Raises `UserError` when there is no space or no right to write; `path` then keeps
    its old content.
    """
    content = data.encode("utf-8") if isinstance(data, str) else data
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}")
        try:
            write_synced(temporary, content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)


def write_json(path: Path, value: object) -> None:
    """`write_atomic` of `value` as indented JSON in its own key order; NaN and infinity are refused."""
    write_atomic(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")
