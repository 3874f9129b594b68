"""The stage store: everything a run knows after a task, atomic, checksummed, addressed by content.

A stage is a folder `<index>-<task>-<start of key>`, written elsewhere and renamed into place once durable:
    trained/factors.safetensors        the adapter's factors
    method/<name>/state.safetensors    the method's memory: tensors,
    method/<name>/state.json           and plain values
    stage.json                         index, task, key, info, SHA-256 of the files above, and its own
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_prep.files import TEMPORARY, sync_folder, write_synced, writing
from pipeline.adapters.lora import Factors
from pipeline.stage_files import (
    MANIFEST,
    DamagedStageError,
    canonical_json,
    check_keys,
    load_tensors,
    pack_tensors,
    seal,
    verified_manifest,
    write_new,
)

FACTORS = "trained/factors.safetensors"


@dataclass(frozen=True)
class Stage:
    """A whole stage on disk; its tensors are read when asked for."""

    path: Path
    index: int  # t, from 1
    task: str
    key: str

    @property
    def info(self) -> dict[str, Any]:
        """What was given to `publish` as info."""
        info: dict[str, Any] = json.loads((self.path / MANIFEST).read_bytes())["info"]
        return info

    def load_trained(self) -> dict[str, Tensor]:
        """The adapter's factors, on the CPU, bit for bit as published."""
        return load_tensors(self.path / FACTORS)

    def has_method(self, name: str, influences: Mapping[str, Any]) -> bool:
        """Whether the stage holds the memory of method `name` as `influences` make it.

        One of another run may not: equal training may be followed by another memory.
        """
        path = self.path / "method" / name / "state.json"
        return path.is_file() and bool(json.loads(path.read_bytes())["influences"] == influences)

    def load_method(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The memory of method `name`: tensors and plain values. The method must be there (`has_method`)."""
        folder = self.path / "method" / name
        return load_tensors(folder / "state.safetensors"), json.loads((folder / "state.json").read_bytes())["values"]


def stage_key(previous_key: str | None, influences: Mapping[str, object]) -> str:
    """SHA-256 that addresses a stage: over the key of the stage before and all that influenced training."""
    check_keys(influences)
    return hashlib.sha256(canonical_json([previous_key, influences])).hexdigest()


def learnt_key(
    updates: Mapping[str, Sequence[Factors]], matrices: Mapping[str, Tensor], others: Mapping[str, Tensor]
) -> str:
    """SHA-256 over all that stands in a model beside its checkpoint: equal keys are equal models."""
    found = hashlib.sha256()

    def add(name: str, tensor: Tensor) -> None:
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)

    for layer in sorted(updates):
        for index, part in enumerate(updates[layer]):
            add(f"{layer}.{index}.A {part.scale}", part.A)
            add(f"{layer}.{index}.B", part.B)
    for name, tensor in sorted({**{f"W {layer}": W for layer, W in matrices.items()}, **others}.items()):
        add(name, tensor)
    return found.hexdigest()


class StageStore:
    """The stages of one run, under `root`; the folder is made with the first stage."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def publish(
        self,
        index: int,
        task: str,
        key: str,
        *,
        trained: Mapping[str, Tensor],
        method_name: str,
        method_tensors: Mapping[str, Tensor],
        method_state: Mapping[str, Any],
        method_influences: Mapping[str, Any],
        info: Mapping[str, Any],
    ) -> Stage:
        """Write a stage so that it is there whole or not at all; one that is there already stays as it is.

        `method_influences` is what decides `method_state` beside the trained tensors. They and `info` hold plain
        JSON values under string keys (tuples come back as lists). Raises `UserError` when the disk is full; nothing
        of the stage is left then.
        """
        assert re.fullmatch(r"\w+", method_name), f"{method_name!r} is no method's name"
        memory = {"influences": method_influences, "values": method_state}
        check_keys(memory)
        check_keys(info)
        method = f"method/{method_name}"

        def fill(folder: Path) -> None:
            tensors, state = f"{method}/state.safetensors", f"{method}/state.json"
            checksums = {
                FACTORS: write_new(folder / FACTORS, pack_tensors(trained)),
                tensors: write_new(folder / tensors, pack_tensors(method_tensors)),
                state: write_new(folder / state, canonical_json(memory)),
            }
            manifest = {"index": index, "task": task, "key": key, "info": info, "files": checksums}
            write_new(folder / MANIFEST, seal(manifest))

        return self.find(index, key) or self._place(index, task, key, fill)

    def find(self, index: int, key: str) -> Stage | None:
        """The whole stage of that index and key, every checksum verified, or None where there is none.

        Raises `UserError` on a damaged stage: the file, and what to do.
        """
        if not self.root.is_dir():
            return None
        for folder in sorted(self.root.iterdir()):
            if folder.name.startswith(f"{index:02d}-") and folder.name.endswith(f"-{key[:12]}"):
                manifest = verified_manifest(folder)
                if (manifest["index"], manifest["key"]) == (index, key):
                    return Stage(folder, index, manifest["task"], key)
                raise DamagedStageError(folder, MANIFEST, "belongs to another stage")
        return None

    def adopt(
        self, other_root: Path, index: int, key: str, method_name: str, method_influences: Mapping[str, Any]
    ) -> Stage | None:
        """Take over the stage of that index and key from another run's store, if it lies there whole, with the memory
        of the method `method_name` as `method_influences` make it.

        Files are linked where the file system can, else copied. A damaged stage over there counts as none:
        it is that run's to mend.
        """
        mine = self.find(index, key)
        if mine is not None:
            return mine
        try:
            other = StageStore(other_root).find(index, key)
            if other is None or not other.has_method(method_name, method_influences):
                return None
            return self._place(index, other.task, key, lambda folder: _link_or_copy(other.path, folder))
        except (DamagedStageError, FileNotFoundError, PermissionError):  # or just removed, or private
            return None

    def clean(self) -> None:
        """Remove what killed runs left half-written. Only for the one process that writes this store."""
        if self.root.is_dir():
            for leftover in self.root.glob(f"{TEMPORARY}*"):
                shutil.rmtree(leftover, ignore_errors=True)

    def _place(self, index: int, task: str, key: str, fill: Callable[[Path], None]) -> Stage:
        """Fill a temporary folder, make it durable, rename it to its name as a stage."""
        final = self.root / f"{index:02d}-{_slug(task)}-{key[:12]}"
        temporary = self.root / f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}"
        with writing(final):
            try:
                temporary.mkdir(parents=True)
                fill(temporary)
                for folder, _, _ in os.walk(temporary):
                    sync_folder(Path(folder))
                try:
                    os.rename(temporary, final)
                except OSError:
                    present = self.find(index, key)  # another process was first, with the same content
                    if present is None:
                        raise
                    return present
                sync_folder(self.root)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        return Stage(final, index, task, key)


def _link_or_copy(source: Path, target: Path) -> None:
    """Fill `target` with the files of the stage `source`, and verify what arrived."""
    for path in sorted(source.rglob("*")):
        place = target / path.relative_to(source)
        if path.is_dir():
            place.mkdir(exist_ok=True)
            continue
        try:
            os.link(path, place)
        except OSError:  # another file system, or one without links
            write_synced(place, path.read_bytes())
    verified_manifest(target)


def _slug(task: str) -> str:
    """The task's name as part of a folder's name; the real name stands in `stage.json`."""
    return re.sub(r"[^A-Za-z0-9_]+", "_", task)[:40] or "task"
