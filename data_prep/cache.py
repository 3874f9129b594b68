"""What the checkout makes for itself on first use: folders that appear whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from data_prep.errors import UserError

CHECKOUT = Path(__file__).resolve().parents[1]


def cache_root() -> Path:
    """Where what this checkout makes for itself is kept: its `.cache`, else a folder of this user's alone."""
    private = Path(tempfile.gettempdir()) / f"continual-learning-cache-{os.getuid()}"
    for folder in (CHECKOUT / ".cache", private):
        try:
            folder.mkdir(mode=0o700 if folder == private else 0o777, exist_ok=True)
        except OSError:
            continue
        # a shared temporary folder may hold one that somebody else laid there under our name
        if os.access(folder, os.W_OK | os.X_OK) and (folder != private or folder.lstat().st_uid == os.getuid()):
            return folder
    raise UserError(f"cache: neither {CHECKOUT / '.cache'} nor {private} can be written; make one of them writable")


def publish(name: str, write: Callable[[Path], None]) -> Path:
    """The folder `name` under the cache root; if absent, made whole by `write(temporary folder)` and renamed.

    Two processes may make it at once: each writes its own, the first rename wins and the other is thrown away.
    """
    root = cache_root()
    final = root / name
    if final.is_dir():
        return final
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f"{name}.", suffix=".making", dir=root))
        try:
            temporary.chmod(0o755)
            write(temporary)
            for path in temporary.rglob("*"):
                if path.is_file():
                    path.chmod(0o644)  # safetensors writes files that only their owner can read
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
            temporary.replace(final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as fault:
        if final.is_dir():  # another process was first
            return final
        raise UserError(f"cache: {final} could not be written ({fault}); free space or make {root} writable") from fault
    return final
