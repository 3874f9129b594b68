"""Backbones and tokenizers, from a checked folder: T5 (encoder-decoder) and LLaMA-2 (decoder-only)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
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
from transformers.modeling_layers import GradientCheckpointingLayer

from data_prep.errors import UserError
from data_prep.sentencepiece_bpe import follow_sentencepiece, read_bpe
from pipeline.adapters.lora import Factors, summed_update
from pipeline.checkpoints import Checkpoint
from pipeline.projection.together import Together


class _Family(NamedTuple):
    """What differs between the two families."""

    model_class: Any
    default_targets: tuple[str, ...]  # q and v of every attention, as the O-LoRA line of work has them
    head: str  # the output projection, never an adapter's target
    feed_forward: str  # the last part of a feed-forward block's name
    full_rank: tuple[str, ...]  # GORP's full-rank modules


_CROSS_ATTENTION = tuple(f"EncDecAttention.{part}" for part in "qkvo")
FAMILIES: Mapping[str, _Family] = {
    "t5": _Family(T5ForConditionalGeneration, ("q", "v"), "lm_head", "DenseReluDense", _CROSS_ATTENTION),
    "llama2": _Family(LlamaForCausalLM, ("q_proj", "v_proj"), "lm_head", "mlp", ("gate_proj",)),
}


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


def feed_forward_blocks(model: nn.Module, family: str) -> list[str]:
    """Full names of the feed-forward blocks, in the model's order."""
    last = FAMILIES[family].feed_forward
    return [name for name, _ in model.named_modules() if name.rpartition(".")[2] == last]


@torch.no_grad()
def merge(
    model: nn.Module,
    folder: Path,
    targets: Iterable[str],
    updates: Mapping[str, Sequence[Factors]],
    matrices: Mapping[str, Tensor] | None = None,
) -> None:
    """Set every target's weight to `W_0 + sum of its updates`, in place; `matrices` stand in the place of `W_0`.

    `W_0` is read again from the checkpoint and the sum is taken in float32 on the CPU, then rounded once to the
    model's dtype: a stream of any length leaves no accumulated rounding (methods.md section 1).
    """
    original = Checkpoint(folder)
    for name in targets:
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        changed = (matrices or {}).get(name)
        total = original.read(f"{name}.weight").float() if changed is None else changed
        if updates.get(name):
            total = total + summed_update(updates[name])
        weight.copy_(total)


def full_rank_modules(model: nn.Module, family: str, chosen: Sequence[str] | None) -> list[str]:
    """Full names of the linear layers whose whole weight is to change, in the model's order.

    `chosen`: null for the family's own (T5: the projections of cross-attention; LLaMA: the MLP's gate), or the ends
    of module names, such as "wo" or "EncDecAttention.q". `UserError` for a name that no layer has, for a tied weight.
    """
    wanted = FAMILIES[family].full_rank if chosen is None else tuple(chosen)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    found = []
    for word in wanted:
        of_word = [name for name in linear if name == word or name.endswith(f".{word}")]
        if not of_word:
            legal = sorted({name.rpartition(".")[2] for name in linear if name != FAMILIES[family].head})
            raise UserError(
                f"method.full_rank_modules: {word!r} ends no linear layer's name in this model; legal are ends of "
                f"names such as {', '.join(legal)}, or [] for none"
            )
        found += of_word
    users = [id(weight) for module in model.modules() for weight in module.parameters(recurse=False)]
    for name in found:
        if name == FAMILIES[family].head or users.count(id(linear[name].weight)) > 1:
            raise UserError(
                f"method.full_rank_modules: {name} is the output head or shares its weight with another module, which "
                "would change with it; choose other layers"
            )
        if not linear[name].weight.is_floating_point():
            raise UserError(
                f"method.full_rank_modules: {name} is quantized, and what the cores learn is merged into the weight "
                "itself; use an unquantized backbone, or [] for none"
            )
    return [name for name in linear if name in found]


class LabelLoss(nn.Module):
    """A backbone whose forward gives the summed negative log-likelihood of a micro-batch's label tokens.

    The sum, not the mean: the trainer divides by the label tokens of the global batch, so that the loss does not
    depend on how rows are dealt to micro-batches and ranks. Logits are formed at label positions only.
    """

    def __init__(self, backbone: nn.Module, family: str) -> None:
        super().__init__()
        self.backbone: Any = backbone
        self.family = family
        self._together = Together(backbone)

    def forward(
        self,
        input_ids: Tensor,  # [b, s]
        attention_mask: Tensor,  # [b, s]
        labels: Tensor,  # [b, l] (t5) or [b, s] (llama2), -100 where nothing is learnt
    ) -> Tensor:  # scalar, float32
        """Sum over label tokens of -log p(token)."""
        with self._together.ready():
            logits, targets, _ = self._predicted(input_ids, attention_mask, labels)
            return _summed_nll(logits, targets)

    @torch.no_grad()
    def loss_and_right(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> tuple[Tensor, int]:
        """The same sum, and the rows whose every label token is the likeliest after those before it.

        Greedy generation writes exactly these rows' labels.
        """
        with self._together.ready():
            logits, targets, rows = self._predicted(input_ids, attention_mask, labels)
        wrong = rows[(logits.argmax(dim=1) != targets) & (targets != -100)]
        return _summed_nll(logits, targets), len(labels) - len(wrong.unique())

    def _predicted(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """At n positions that hold all label tokens: logits [n, vocabulary], targets [n], and whose they are [n]."""
        if self.family == "t5":
            output = self.backbone(
                input_ids=input_ids,
                attention_mask=attention_mask,
                decoder_input_ids=self.backbone._shift_right(labels),
                use_cache=False,
            )
            rows = torch.arange(len(labels), device=labels.device).repeat_interleave(labels.shape[1])
            return output.logits.flatten(0, 1), labels.flatten(), rows
        hidden = self.backbone.model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
        targets = labels[:, 1:]
        learnt = targets != -100
        return self.backbone.lm_head(hidden[:, :-1][learnt]), targets[learnt], learnt.nonzero()[:, 0]


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


@contextmanager
def recomputing(model: nn.Module) -> Iterator[None]:
    """Inside, a model in evaluation mode recomputes activations where it was told to (`prepare_for_training`).

    The blocks that run their layers again do so in training mode alone; dropout is none of theirs, and stays off (of
    their attentions, which carry the same flag, it is).
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    blocks = [layer for layer in layers if layer.gradient_checkpointing]
    try:
        for block in blocks:
            block.training = True
        yield
    finally:
        for block in blocks:
            block.training = False
