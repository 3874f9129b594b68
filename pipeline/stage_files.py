"""The files of a stage: how they are written, sealed and checked. `stages.py` decides where they lie."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from data_prep.errors import UserError
from data_prep.files import write_synced

MANIFEST = "stage.json"


class DamagedStageError(UserError):
    """A stage that is there and not whole: the file, what is wrong, what to do."""

    def __init__(self, folder: Path, name: str, what: str) -> None:
        super().__init__(
            f"{folder / name}: {what}, so this stage is damaged; delete the folder {folder} and run the same "
            "command again: it trains the task again"
        )


def write_new(path: Path, data: bytes) -> str:
    """Write a new file durably; its SHA-256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_synced(path, data)
    return hashlib.sha256(data).hexdigest()


def pack_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors of any device and layout in memory as a safetensors file."""
    # To bytes, and not by safetensors' own writer: that one tells a full disk without an errno.
    storages: set[int] = set()
    separate: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        storage = own.untyped_storage().data_ptr()
        separate[name] = own.clone() if storage in storages else own  # safetensors refuses shared storage
        storages.add(storage)
    packed: bytes = safetensors.torch.save(separate)
    return packed


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU; changing them leaves the file alone."""
    loaded: dict[str, Tensor] = safetensors.torch.load_file(path)
    return loaded


def canonical_json(value: object) -> bytes:
    """The one way to write `value` as JSON; NaN and infinity are refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def check_keys(value: object) -> None:
    """Assert that all keys are strings: JSON makes them so in silence, and a resumed method would not find
    its own.
    """
    if isinstance(value, Mapping):
        for key, child in value.items():
            assert isinstance(key, str), f"key {key!r} is no string"
            check_keys(child)
    elif isinstance(value, list | tuple):
        for child in value:
            check_keys(child)


def seal(manifest: Mapping[str, Any]) -> bytes:
    """`stage.json` as it must stand, byte for byte: the manifest with its own hash."""
    digest = hashlib.sha256(canonical_json(manifest)).hexdigest()
    return json.dumps({**manifest, "sha256": digest}, sort_keys=True, indent=1, allow_nan=False).encode()


def verified_manifest(folder: Path) -> dict[str, Any]:
    """Check `stage.json` and every file it names; raises `DamagedStageError` at the first fault."""
    with _open(folder, MANIFEST) as file:
        sealed = file.read()
    try:
        manifest: dict[str, Any] = json.loads(sealed)
        del manifest["sha256"]
        whole = seal(manifest) == sealed
    except (ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise DamagedStageError(folder, MANIFEST, "is truncated or was changed")
    for name, checksum in manifest["files"].items():
        with _open(folder, name) as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != checksum:
                raise DamagedStageError(folder, name, "does not match its checksum")
    return manifest


@contextmanager
def _open(folder: Path, name: str) -> Iterator[BufferedReader]:
    """A stage's file for reading; what is missing or unreadable is damage."""
    try:
        with (folder / name).open("rb") as file:
            yield file
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DamagedStageError(folder, name, "is missing") from error
    except OSError as error:
        raise DamagedStageError(folder, name, f"cannot be read ({error.strerror})") from error
