"""Backbones and tokenizers, from a checked folder: T5 (encoder-decoder) and LLaMA-2 (decoder-only)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    BitsAndBytesConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5ForConditionalGeneration,
    T5Tokenizer,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from data_prep.errors import UserError
from data_prep.sentencepiece_bpe import follow_sentencepiece, read_bpe
from pipeline.attention import share_masks
from pipeline.cross_attention import read_directly
from pipeline.frozen_linear import speed_up_frozen
from pipeline.layers import HEAD

Quantization = Literal["nf4", "int8"]
CPU = torch.device("cpu")


CLASSES: Mapping[str, Any] = {"t5": T5ForConditionalGeneration, "llama2": LlamaForCausalLM}


class _Once(logging.Filter):
    """Lets each message through once: bitsandbytes says of every layer by itself that int8 multiplies in float16."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the message is new."""
        message = record.getMessage()
        new = message not in self._seen
        self._seen.add(message)
        return new


_ONCE = _Once()


def load_tokenizer(folder: Path, family: str) -> PreTrainedTokenizerBase:
    """The family's tokenizer, with sentencepiece's own ids; without a padding token, `<unk>` pads.

    Chosen by model type: AutoTokenizer gives other ids on a LLaMA folder without tokenizer_config.json.
    """
    try:
        tokenizer = _llama_tokenizer(folder) if family == "llama2" else _t5_tokenizer(folder)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise UserError(f"model.path: {folder}: the tokenizer cannot be read ({error})") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token  # padding must not be BOS or EOS, which carry meaning
    return tokenizer


def _t5_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = T5Tokenizer.from_pretrained(str(folder), local_files_only=True)
    return tokenizer


def _llama_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    if (folder / "tokenizer.json").is_file():
        tokenizer: LlamaTokenizer = LlamaTokenizer.from_pretrained(str(folder), local_files_only=True)
    else:
        # from_pretrained on a bare tokenizer.model ranks merges by id, and gives other ids after double spaces.
        vocabulary, merges = read_bpe(folder / "tokenizer.model")
        tokenizer = LlamaTokenizer(vocab=vocabulary, merges=merges)
    follow_sentencepiece(tokenizer.backend_tokenizer)
    return tokenizer


def load_backbone(
    folder: Path,
    family: str,
    *,
    dtype: torch.dtype,
    quantization: Quantization | None = None,
    device: torch.device = CPU,
) -> nn.Module:
    """The frozen backbone of `folder` on `device`, in evaluation mode.

    In `dtype`; with `quantization` its linear layers hold 4 or 8 bits a number (but the output head, and those that
    transformers keeps whole: T5's `wo`) and compute in `dtype`.
    """
    transformers.logging.disable_progress_bar()  # a bar per task and rank tells nobody anything
    packed = {} if quantization is None else _packing(quantization, dtype, device)
    try:
        model, report = CLASSES[family].from_pretrained(
            str(folder),
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **packed,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"model.path: {folder}: the weights cannot be read ({error})") from error
    if missing := sorted(report["missing_keys"]):  # transformers would go on with random numbers there
        raise UserError(
            f"model.path: {folder}: the checkpoint lacks {len(missing)} tensor(s), such as {missing[0]}; "
            "fetch it again, or check model.family"
        )
    backbone: nn.Module = model
    if packed:
        _keep_as_loaded(backbone)
    else:
        backbone = backbone.to(device)
    return backbone.requires_grad_(False).eval()


def _keep_as_loaded(backbone: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights, in place and for good, for bf16 inference.

    It does so in a layer's first forward without gradients, on CPUs with AVX512-BF16 alone: other numbers than on
    other machines, no gradients from then on, and no odd widths.
    """
    from bitsandbytes.nn.modules import Linear4bit

    for layer in backbone.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False


def _packing(quantization: Quantization, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What transformers hands to bitsandbytes: QLoRA's 4 bits with quantized constants, or LLM.int8().

    On `device` at once: a quantized model stays where it was loaded.
    """
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_ONCE)
    if quantization == "int8":
        bits = BitsAndBytesConfig(load_in_8bit=True)
    else:
        bits = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    return {"quantization_config": bits, "device_map": {"": device}}


def packed_layers(model: nn.Module) -> list[nn.Linear]:
    """The linear layers of a skeleton that are packed where the backbone is quantized."""
    whole = {HEAD, *(getattr(model, "_keep_in_fp32_modules", None) or ())}
    return [
        layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and not whole & {name, name.rpartition(".")[2]}
    ]


def skeleton(folder: Path, family: str) -> PreTrainedModel:
    """The backbone's modules without weights (on torch's meta device), for counting parameters.

    Raises `UserError` for a checkpoint that was saved quantized.
    """
    config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            f"model.path: {folder}: its config.json has a quantization_config, and packed weights cannot be read back; "
            "give the full checkpoint, and model.quantization: nf4 or int8"
        )
    with torch.device("meta"):
        model: PreTrainedModel = CLASSES[family](config)
    return model


def prepare_for_training(model: nn.Module, *, gradient_checkpointing: bool) -> None:
    """Switch to training mode, with recomputed activations where asked for."""
    model.train()
    _speed_up(model)
    if gradient_checkpointing:
        assert isinstance(model, PreTrainedModel)
        # transformers 5.23 warns of the old name; older releases know no other.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})


def prepare_for_scoring(model: nn.Module) -> None:
    """Switch to evaluation mode, with the faster products and masks that training has, and T5's direct reading."""
    model.eval()
    _speed_up(model)
    read_directly(model)


def _speed_up(model: nn.Module) -> None:
    speed_up_frozen(model)
    share_masks(model)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Its transformer blocks, T5's encoder's before its decoder's."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@contextmanager
def recomputing(model: nn.Module) -> Iterator[None]:
    """Inside, a model in evaluation mode recomputes activations where it was told to (`prepare_for_training`).

    The blocks that run their layers again do so in training mode alone; dropout is none of theirs, and stays off (of
    their attentions, which carry the same flag, it is).
    """
    blocks: list[Any] = [block for block in blocks_of(model) if block.gradient_checkpointing]
    try:
        for block in blocks:
            block.training = True
        yield
    finally:
        for block in blocks:
            block.training = False
