"""The backbone with a run's updates merged, as a plain transformers folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data_prep.errors import UserError
from pipeline.adapters.lora import Factors
from pipeline.checkpoints import backbone_folder, fingerprint
from pipeline.layers import merge
from pipeline.models import load_backbone, load_tokenizer
from pipeline.recipe import Model


class MergedBackbone(NamedTuple):
    """A backbone in float32 and its tokenizer, ready to be written."""

    model: Any
    tokenizer: Any
    family: str

    def write(self, folder: Path) -> None:
        """Write configuration, weights and tokenizer into the empty folder `folder`."""
        self.model.save_pretrained(str(folder))
        self.tokenizer.save_pretrained(str(folder))
        _settle(folder / "tokenizer_config.json", self.family)


def merged_backbone(
    settings: Model, updates: Mapping[str, Sequence[Factors]], matrices: Mapping[str, Tensor], *, trained_on: str
) -> MergedBackbone:
    """Read the backbone again and merge `updates` (by layer) and whole weights, in float32 whatever the precision.

    So the one rounding of the sum is left to whoever loads it. `trained_on` is the fingerprint of the backbone that
    the run began with. Raises `UserError` where that backbone cannot be had any more.
    """
    folder = backbone_folder(settings)
    now = fingerprint(folder)
    if now != trained_on:
        raise UserError(
            f"model.path: {folder}: not the backbone that this run was trained on ({trained_on[:12]} then, {now[:12]} "
            "now), so its updates do not belong there; restore the folder"
        )
    model = load_backbone(folder, settings.family, dtype=torch.float32)
    tokenizer = load_tokenizer(folder, settings.family)
    merge(model, folder, [*updates, *matrices], updates, matrices)
    return MergedBackbone(model, tokenizer, settings.family)


def _settle(path: Path, family: str) -> None:
    """Take out of `tokenizer_config.json` how we read the tokenizer, and have LLaMA's taken as it stands.

    Under its own name, `LlamaTokenizer`, transformers would put other rules for spaces back than those that the run's
    prompts were encoded with (`data_prep.sentencepiece_bpe`).
    """
    settings = json.loads(path.read_text(encoding="utf-8"))
    for key in ("is_local", "local_files_only"):
        settings.pop(key, None)
    if family == "llama2":
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left"}
        # Older releases of that class add token types, which LLaMA refuses.
        settings["model_input_names"] = ["input_ids", "attention_mask"]
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
