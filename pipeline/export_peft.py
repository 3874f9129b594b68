"""A stage's trained tensors in the form in which stock PEFT loads them.

Legend: r rank, d_in and d_out widths of a layer; L decoder layers; n prefix length; H key-value heads.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig
from torch import Tensor

from pipeline.adapters.lora import Factors
from pipeline.stage_files import pack_tensors

TASK_TYPES: Mapping[str, str] = {"t5": "SEQ_2_SEQ_LM", "llama2": "CAUSAL_LM"}
_ENDINGS = dict.fromkeys(("A", "B", "U", "sigma", "V", "scale"), "lora") | {"down": "bottleneck", "up": "bottleneck"}
_ENDINGS |= {"prompt": "prompt", "key": "prefix", "value": "prefix"}


class Base(NamedTuple):
    """The backbone as the adapter's configuration names it."""

    family: str
    name_or_path: str
    revision: str | None


class PeftAdapter(NamedTuple):
    """A PEFT adapter, ready to be written."""

    config: Any  # a `peft.PeftConfig`
    tensors: dict[str, Tensor]

    def write(self, folder: Path) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors` into the empty folder `folder`."""
        self.config.save_pretrained(str(folder))
        (folder / "adapter_model.safetensors").write_bytes(pack_tensors(self.tensors))


def kind_of(names: Iterable[str]) -> str | None:
    """The kind of adapter that trained tensors of these names make up: lora (triplets too), bottleneck, prompt, prefix.

    None for no names at all (a task whose layers had no free direction left), or for names of no kind we know.
    """
    kinds = {_ENDINGS.get(name.rpartition(".")[2]) for name in names}
    return kinds.pop() if len(kinds) == 1 else None


def lora_adapter(updates: Mapping[str, Sequence[Factors]], base: Base) -> PeftAdapter:
    """One LoRA for all updates of each layer: `A = [A_1; A_2; ...]`, `B = [s_1 B_1, s_2 B_2, ...]`, its scale 1.

    A layer with fewer updates than others (at least one has some) is filled up with zeros to the one rank that all
    loaders understand. The products are those of `summed_update`, in float32.
    """
    rank = max(sum(part.A.shape[0] for part in parts) for parts in updates.values())
    tensors = {}
    for layer, parts in updates.items():
        A = torch.cat([part.A.float() for part in parts])  # [sum r, d_in]
        B = torch.cat([part.scale * part.B.float() for part in parts], dim=1)  # [d_out, sum r]
        missing = rank - A.shape[0]
        tensors[f"base_model.model.{layer}.lora_A.weight"] = F.pad(A, (0, 0, 0, missing))
        tensors[f"base_model.model.{layer}.lora_B.weight"] = F.pad(B, (0, missing))
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,  # PEFT's scale is alpha / r
        lora_dropout=0.0,
        target_modules=list(updates),
        **_common(base),
    )
    return PeftAdapter(config, tensors)


def prompt_adapter(prompt: Tensor, base: Base) -> PeftAdapter:
    """PEFT's prompt tuning for `prompt` [length, d]: before T5's encoder input alone, or before LLaMA's input."""
    length, width = prompt.shape
    config = PromptTuningConfig(
        num_virtual_tokens=length,
        token_dim=width,
        num_transformer_submodules=1,  # 2, PEFT's own choice for T5, keeps as many rows again that nothing reads
        **_common(base),
    )
    return PeftAdapter(config, {"prompt_embeddings": prompt.float()})


def prefix_adapter(tensors: Mapping[str, Tensor], base: Base) -> PeftAdapter:
    """PEFT's prefix tuning for `<attention>.key`, `<attention>.value`, each [H, n, d_head], of all L decoder layers.

    In LLaMA's attention, or in T5's decoder self-attention alone. PEFT keeps one row of numbers for each of the n
    positions, a sequence of blocks [H, d_head]: keys and values of layer 0, of layer 1 and so on.
    """
    layers = _by_layer(tensors)
    heads, length, head_width = layers[0][0].shape
    blocks = [block for pair in layers for block in pair]
    if base.family == "t5":
        # For an encoder-decoder (2 submodules; 1 would put the encoder's output into the same cache) PEFT lays the
        # 2 x num_layers blocks twice end to end and cuts fours off: a decoder layer's self-attention key and value,
        # then two for cross-attention that it throws away. With num_layers = L the layers i and i + L/2 would get
        # the same prefix; with 2 L, layer i finds blocks 4 i and 4 i + 1 of its own. Blocks behind 4 L nobody reads.
        unread = torch.zeros_like(blocks[0])
        blocks = [block for key, value in layers for block in (key, value, unread, unread)]
    rows = torch.stack(blocks).permute(2, 0, 1, 3).reshape(length, -1)  # [n, blocks x H x d_head]
    config = PrefixTuningConfig(
        num_virtual_tokens=length,
        token_dim=heads * head_width,
        num_attention_heads=heads,
        num_layers=len(blocks) // 2,
        num_transformer_submodules=2 if base.family == "t5" else 1,
        prefix_projection=False,
        **_common(base),
    )
    return PeftAdapter(config, {"prompt_embeddings": rows.float()})


def _by_layer(tensors: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """(key, value) of each layer, first layer first."""
    by_number: dict[int, tuple[Tensor, Tensor]] = {}
    for name in tensors:
        if name.endswith(".key"):
            attention = name.removesuffix(".key")
            number = re.search(r"(?:^decoder\.block|^model\.layers)\.(\d+)\.", name)
            assert number is not None, f"{attention} is no decoder's attention"
            by_number[int(number[1])] = tensors[name], tensors[f"{attention}.value"]
    assert set(by_number) == set(range(len(by_number))), "PEFT gives every layer a prefix"
    return [by_number[i] for i in range(len(by_number))]


def _common(base: Base) -> dict[str, Any]:
    return {
        "task_type": TASK_TYPES[base.family],
        "base_model_name_or_path": base.name_or_path,
        "revision": base.revision,
        "inference_mode": True,
    }
