"""A backbone's files: found or fetched, checked, fingerprinted, read tensor by tensor. Safetensors only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data_prep.errors import UserError
from pipeline.recipe import SYNTHETIC, Model
from pipeline.tiny import ensure_tiny_backbone

# Everything but pickles: those are never fetched and never read.
_WANTED_FILES = ["*.json", "*.safetensors", "*.model"]


class _Layout(NamedTuple):
    """What a family's folder looks like."""

    model_type: str  # as config.json names it
    vocabulary_files: tuple[str, ...]  # one of them is there


LAYOUTS: Mapping[str, _Layout] = {
    "t5": _Layout("t5", ("spiece.model", "tokenizer.json")),
    "llama2": _Layout("llama", ("tokenizer.model", "tokenizer.json")),
}


def backbone_folder(settings: Model) -> Path:
    """The folder that holds the backbone: made on first use, as given, or fetched from the hub.

    Raises `UserError` where the folder or hub id cannot serve (missing, no safetensors, other family).
    """
    if settings.path == SYNTHETIC:
        return ensure_tiny_backbone(settings.family)
    folder = Path(settings.path)
    if not folder.is_absolute():
        folder = _fetch(settings)
    if not folder.is_dir():
        raise UserError(
            f"model.path: {settings.path}: no such folder; give a folder with config.json and *.safetensors, "
            "or a hub id org/name with model.revision (CL_MODEL_DIR sets the folder of the mini backbones)"
        )
    _check_folder(folder, settings.family)
    return folder


def _fetch(settings: Model) -> Path:
    if settings.revision is None:
        raise UserError(
            f"model.revision: null: the hub id {settings.path} needs the commit to take; "
            "set model.revision, or model.path to a local folder"
        )
    try:
        return Path(snapshot_download(settings.path, revision=settings.revision, allow_patterns=_WANTED_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise UserError(
            f"model.path: {settings.path} at {settings.revision} could not be fetched "
            f"({(str(error).strip() or repr(error)).splitlines()[0]}); check id, revision, network and licence, "
            "or give a local folder: model.path=FOLDER"
        ) from error


def _check_folder(folder: Path, family: str) -> None:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"model.path: {folder}: config.json is missing or damaged ({error})") from error
    wanted = LAYOUTS[family]
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if model_type != wanted.model_type:
        raise UserError(
            f"model.family: {family}: {folder} holds a {model_type!r} model, "
            f"not {wanted.model_type!r}; set the family or the path"
        )
    if not _weight_files(folder):
        raise UserError(
            f"model.path: {folder}: no *.safetensors there; weights are read from safetensors only, "
            "never from pickles (*.bin): convert them first"
        )
    if not any((folder / name).is_file() for name in wanted.vocabulary_files):
        raise UserError(f"model.path: {folder}: no tokenizer there ({' or '.join(wanted.vocabulary_files)})")


def _weight_files(folder: Path) -> list[Path]:
    """The checkpoint's files; with an index, exactly those that it names."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"model.path: {index} is damaged ({error!r}); fetch the checkpoint again") from error
        missing = sorted(name for name in names if not (folder / name).is_file())
        if missing:
            raise UserError(f"model.path: {folder}: {missing[0]} is missing; fetch the checkpoint again")
        return sorted(folder / name for name in names)
    return sorted(folder.glob("*.safetensors"))


def fingerprint(folder: Path) -> str:
    """SHA-256 over config, tokenizer and weights: two backbones of one fingerprint train alike."""
    digest = hashlib.sha256()
    files = [*sorted(folder.glob("*config.json")), *_weight_files(folder)]  # generation_config names the end of a text
    files += sorted([*folder.glob("*.model"), *folder.glob("tokenizer*.json")])
    for path in files:
        digest.update(path.name.encode())
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def check_weights(folder: Path, targets: Iterable[str]) -> None:
    """Refuse a checkpoint whose files are damaged or lack a target's weight, by their headers alone."""
    checkpoint = Checkpoint(folder)
    for target in targets:
        if f"{target}.weight" not in checkpoint:
            raise UserError(f"model.path: {folder}: the weights lack {target}.weight; fetch the checkpoint again")


class Checkpoint:
    """Single tensors of a safetensors checkpoint, read by name."""

    def __init__(self, folder: Path) -> None:
        self._file_of: dict[str, Path] = {}
        for path in _weight_files(folder):
            try:
                with safe_open(path, framework="pt") as tensors:
                    self._file_of |= dict.fromkeys(tensors.keys(), path)
            except (OSError, SafetensorError) as error:
                raise UserError(f"model.path: {path} is damaged ({error}); fetch the checkpoint again") from error

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def read(self, name: str) -> Tensor:
        """The tensor `name`, on the CPU, in the file's dtype."""
        with safe_open(self._file_of[name], framework="pt") as tensors:
            tensor: Tensor = tensors.get_tensor(name)
        return tensor
