"""Backbones and tokenizers: T5 (encoder-decoder) and LLaMA-2 (decoder-only), from a folder or the hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5ForConditionalGeneration,
    T5Tokenizer,
)

from data_prep.errors import UserError
from data_prep.sentencepiece_bpe import follow_sentencepiece, read_bpe
from pipeline.adapters.lora import Factors, summed_update
from pipeline.recipe import SYNTHETIC, Model
from pipeline.tiny import ensure_tiny_backbone

# Everything but pickles: those are never fetched and never read.
_WANTED_FILES = ["*.json", "*.safetensors", "*.model"]


class _Family(NamedTuple):
    """What differs between the two families."""

    model_type: str  # as config.json names it
    model_class: Any
    vocabulary_files: tuple[str, ...]
    default_targets: tuple[str, ...]  # q and v of every attention, as the O-LoRA line of work has them
    head: str  # the output projection, never an adapter's target


FAMILIES: Mapping[str, _Family] = {
    "t5": _Family("t5", T5ForConditionalGeneration, ("spiece.model", "tokenizer.json"), ("q", "v"), "lm_head"),
    "llama2": _Family(
        "llama",
        LlamaForCausalLM,
        ("tokenizer.model", "tokenizer.json"),
        ("q_proj", "v_proj"),
        "lm_head",
    ),
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
    wanted = FAMILIES[family]
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


def load_backbone(folder: Path, family: str, *, dtype: torch.dtype) -> nn.Module:
    """The frozen backbone of `folder` on the CPU, in `dtype`, in evaluation mode."""
    transformers.logging.disable_progress_bar()  # a bar per task and rank tells nobody anything
    try:
        model, report = FAMILIES[family].model_class.from_pretrained(
            str(folder),
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"model.path: {folder}: the weights cannot be read ({error})") from error
    if missing := sorted(report["missing_keys"]):  # transformers would go on with random numbers there
        raise UserError(
            f"model.path: {folder}: the checkpoint lacks {len(missing)} tensor(s), such as {missing[0]}; "
            "fetch it again, or check model.family"
        )
    backbone: nn.Module = model
    return backbone.requires_grad_(False).eval()


def skeleton(folder: Path, family: str) -> PreTrainedModel:
    """The backbone's modules without weights (on torch's meta device), for counting parameters."""
    config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        model: PreTrainedModel = FAMILIES[family].model_class(config)
    return model


def target_modules(model: nn.Module, family: str, chosen: Sequence[str] | str | None) -> list[str]:
    """Full names of the linear layers that carry an adapter, in the model's order.

    `chosen`: null for the family's default (q and v), "all_linear", or last parts of module names.
    The output head is never a target: it is tied to, or as wide as, the vocabulary.
    """
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != FAMILIES[family].head
    ]
    if chosen == "all_linear":
        return linear
    wanted = FAMILIES[family].default_targets if chosen is None else tuple(chosen)
    legal = sorted({name.rpartition(".")[2] for name in linear})
    for word in wanted:
        if word not in legal:
            raise UserError(
                f"adapter.target_modules: {word!r} names no linear layer of this model; legal are "
                f"{', '.join(legal)}, or all_linear"
            )
    return [name for name in linear if name.rpartition(".")[2] in wanted]


@torch.no_grad()
def merge(model: nn.Module, folder: Path, targets: Iterable[str], updates: Mapping[str, Sequence[Factors]]) -> None:
    """Set every target's weight to `W_0 + sum of its updates`, in place.

    `W_0` is read again from the checkpoint and the sum is taken in float32 on the CPU, then rounded once to the
    model's dtype: a stream of any length leaves no accumulated rounding (methods.md section 1).
    """
    original = Checkpoint(folder)
    for name in targets:
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        total = original.read(f"{name}.weight").float()
        if updates.get(name):
            total += summed_update(updates[name])
        weight.copy_(total)


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


class LabelLoss(nn.Module):
    """A backbone whose forward gives the summed negative log-likelihood of a micro-batch's label tokens.

    The sum, not the mean: the trainer divides by the label tokens of the global batch, so that the loss does not
    depend on how rows are dealt to micro-batches and ranks. Logits are formed at label positions only.
    """

    def __init__(self, backbone: nn.Module, family: str) -> None:
        super().__init__()
        self.backbone: Any = backbone
        self.family = family

    def forward(
        self,
        input_ids: Tensor,  # [b, s]
        attention_mask: Tensor,  # [b, s]
        labels: Tensor,  # [b, l] (t5) or [b, s] (llama2), -100 where nothing is learnt
    ) -> Tensor:  # scalar, float32
        """Sum over label tokens of -log p(token)."""
        if self.family == "t5":
            output = self.backbone(
                input_ids=input_ids,
                attention_mask=attention_mask,
                decoder_input_ids=self.backbone._shift_right(labels),
                use_cache=False,
            )
            return _summed_nll(output.logits.flatten(0, 1), labels.flatten())
        hidden = self.backbone.model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
        targets = labels[:, 1:]
        learnt = targets != -100
        return _summed_nll(self.backbone.lm_head(hidden[:, :-1][learnt]), targets[learnt])


def _summed_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of negative log-likelihoods, in float32 or better; targets of -100 count nothing."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")


def prepare_for_training(model: nn.Module, *, gradient_checkpointing: bool) -> None:
    """Switch to training mode, with recomputed activations where asked for."""
    model.train()
    if gradient_checkpointing:
        assert isinstance(model, PreTrainedModel)
        # transformers 5.23 warns of the old name; older releases know no other.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
