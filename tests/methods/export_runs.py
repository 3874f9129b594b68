"""Folders of runs with hand-made stages, for the tests of exporting."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from random_backbones import save_backbone
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from pipeline.adapters.lora import Factors
from pipeline.checkpoints import fingerprint
from pipeline.export import main
from pipeline.layers import merge, target_modules
from pipeline.models import load_backbone
from pipeline.recipe import Recipe
from pipeline.stages import Stage, StageStore
from pipeline.tiny import MAKING, train_tokenizer

FAMILIES = ("t5", "llama2")
AUTO: dict[str, Any] = {"t5": AutoModelForSeq2SeqLM, "llama2": AutoModelForCausalLM}


@cache
def tokenizer_file(family: Any) -> bytes:
    return train_tokenizer(family)


def new_backbone(folder: Path, family: Any, layers: int) -> Path:
    """A backbone of random weights whose heads together are not as wide as the model, with a tokenizer."""
    config = AutoConfig.from_pretrained(save_backbone(folder, family))
    t5 = {"num_layers": layers, "num_decoder_layers": layers, "d_kv": 4}
    llama2 = {"num_hidden_layers": layers, "hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
    config.update({"t5": t5, "llama2": llama2}[family])
    torch.manual_seed(21)
    model = AUTO[family].from_config(config)
    with torch.no_grad():
        for block in model.decoder.block if family == "t5" else ():
            block.layer[0].SelfAttention.k.weight.mul_(3)  # prefixes should matter
    model.save_pretrained(folder)
    (folder / MAKING[family].tokenizer_file).write_bytes(tokenizer_file(family))
    return folder


class Run:
    """A run's folder with stages of hand-made tensors."""

    def __init__(self, folder: Path, backbone: Path, family: str, *overrides: str) -> None:
        self.folder, self.backbone, self.family = folder, backbone, family
        given = [f"model.path={backbone}", f"output.dir={folder}", *overrides]
        self.recipe = Recipe.load(f"recipes/tiny_{family}_order1.yaml", given)
        self.tasks = self.recipe.task_names
        folder.mkdir(parents=True)
        (folder / "recipe.yaml").write_text(self.recipe.to_yaml())

    def finish(self, tensors: Mapping[str, Tensor], *, index: int, seed: str = "") -> Stage:
        return StageStore(self.folder / "stages").publish(
            index,
            self.tasks[index - 1],
            hashlib.sha256(f"{index}{seed}".encode()).hexdigest(),
            trained=tensors,
            method_name=self.recipe.method.name,
            method_tensors={},
            method_state={},
            method_influences={},
            info={"model_fingerprint": fingerprint(self.backbone)},
        )

    def export(self, *arguments: str, name: str) -> Path:
        """Export, and check the place."""
        assert main([str(self.folder), *arguments]) == 0
        folder = self.folder / "export" / name
        assert folder.is_dir()
        assert not list(folder.parent.glob(".tmp-*"))
        return folder

    def stock(self) -> Any:
        return AUTO[self.family].from_pretrained(self.backbone, dtype=torch.float32)

    def with_peft(self, folder: Path) -> Any:
        assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(self.backbone)
        return PeftModel.from_pretrained(self.stock(), str(folder)).eval()

    def merged(self, *tasks: Mapping[str, Factors]) -> Any:
        """Our own model with these tasks' updates in its weights."""
        model = load_backbone(self.backbone, self.family, dtype=torch.float32)
        updates = {name: [task[name] for task in tasks if name in task] for name in target_names(self.backbone)}
        merge(model, self.backbone, updates, updates)
        return model

    def logits(self, model: Any) -> Tensor:
        return logits_of(model, self.family)


def logits_of(model: Any, family: str) -> Tensor:
    """Logits at the places that are no padding."""
    generator = torch.Generator().manual_seed(3)
    ids, answers = (torch.randint(3, 61, (3, size), generator=generator) for size in (7, 4))
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 3 + [0] * 4])
    with torch.no_grad():
        if family == "t5":
            logits: Tensor = model(input_ids=ids, attention_mask=mask, decoder_input_ids=answers).logits
            return logits
        logits = model(input_ids=ids, attention_mask=mask).logits
        return logits[:, -7:][mask.bool()]  # PEFT's soft prompts have logits too


def relative(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


@cache
def target_names(backbone: Path) -> tuple[str, ...]:
    """All linear layers but the head."""
    family = family_of(backbone)
    return tuple(target_modules(load_backbone(backbone, family, dtype=torch.float32), family, "all_linear"))


def family_of(backbone: Path) -> str:
    return {"t5": "t5", "llama": "llama2"}[json.loads((backbone / "config.json").read_text())["model_type"]]
