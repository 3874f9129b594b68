"""How much memory a rank's device needs, estimated from shapes: for `--plan`, and for what has no machine here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from data_prep.batches import Example
from eval.label_scoring import LOGITS_PER_FORWARD
from pipeline.adapter_kinds import trainable_parameters
from pipeline.adapters.base import AdapterKind
from pipeline.adapters.lora import LoraKind
from pipeline.from_host import numbers_held
from pipeline.models import packed_layers
from pipeline.recipe import Recipe
from pipeline.workload import Workload

LIVE = 1e9  # numbers that ZeRO 3 gathers at most (DeepSpeed's stage3_max_live_parameters)
# Buffers as large as all float32 gradients, by ZeRO stage; two where communication overlaps.
_BUFFERS = {0: 0, 1: 1, 2: 2, 3: 1}


class LongestRow(NamedTuple):
    """The most tokens of any training row, all of it and its label."""

    tokens: int
    label_tokens: int


class Scored(NamedTuple):
    """The most tokens of any prompt that is scored, and of all label options of a task together."""

    prompt_tokens: int
    option_tokens: int


def longest_scored(workload: Workload) -> Scored:
    """Of all tasks, unseen ones too."""
    tasks = [*workload.tasks, *workload.unseen]
    return Scored(
        max(len(row.input_ids) for task in tasks for row in task.evaluation),
        max(sum(map(len, task.label_ids)) for task in tasks),
    )


def longest_row(workload: Workload) -> LongestRow:
    """Of all tasks."""
    return longest_of([example for task in workload.tasks for example in task.train])


def longest_of(rows: Sequence[Example]) -> LongestRow:
    """Of these."""
    return LongestRow(
        max(len(example.input_ids) + len(example.label_ids) for example in rows),
        max(len(example.label_ids) for example in rows),
    )


def memory_per_rank(
    recipe: Recipe, kind: AdapterKind, model: nn.Module, longest: LongestRow, *, world: int
) -> dict[str, float]:
    """Estimated bytes on one rank's device while a task trains, by part; `model` may be a skeleton."""
    frozen, trained = frozen_bytes(recipe, model), trainable_parameters(kind, model)
    stage, width = recipe.engine.zero, 2 if recipe.engine.precision == "bf16" else 4
    # The 8-bit kind keeps two bytes instead of eight, and two float32 constants for each block of 256.
    moments = 8 if recipe.training.optimizer == "adamw" else 2 + 2 * 4 / 256
    # AdamW keeps two float32 moments; every ZeRO stage and bf16 a float32 master beside the forward's copy.
    per_parameter = moments + (0 if stage == 0 else 4)
    on_host = recipe.engine.offload != "none"
    return {
        "frozen weights": _frozen_on_device(recipe, frozen, world=world),
        "adapter and its gradients": trained * (width + 4 / (world if stage >= 2 else 1)),
        "gradients on their way to other ranks": trained * 4 * _BUFFERS[stage],
        "optimizer": 0 if on_host else trained * per_parameter / (world if stage else 1),
        "protected bases, at most": _bases_bytes(recipe, kind, model) * width / 4,
        "activations of the longest micro-batch": _activation_bytes(recipe, longest, model, width),
    }


def _frozen_on_device(recipe: Recipe, frozen: float, *, world: int) -> float:
    """ZeRO 3 scatters weights and gathers up to LIVE numbers of them; packed ones stay gathered until the backward."""
    if recipe.engine.zero < 3 or recipe.model.quantization is not None:
        return frozen
    live = min(frozen, LIVE * (2.0 if recipe.engine.precision == "bf16" else 4.0))
    if recipe.engine.offload == "parameters":
        return live
    return frozen / world + (live if world > 1 else 0.0)


def _bases_bytes(recipe: Recipe, kind: AdapterKind, model: nn.Module) -> float:
    """In float32, of PEGP's features and of LB-CL's singular vectors at the last task; 0 where not estimated.

    A projector holds k or d - k columns of d numbers for a tensor, whichever is fewer.
    """
    if not isinstance(kind, LoraKind):
        return 0.0
    layers: list[Any] = [model.get_submodule(name) for name in kind.targets]
    widths: list[tuple[int, int]] = [(layer.in_features, layer.out_features) for layer in layers]
    if recipe.method.name == "pegp":
        return sum(4.0 * d_in * d_in / 2 for d_in, _ in widths)
    if recipe.method.name == "lbcl":
        old = kind.rank * (len(recipe.task_names) - 1)
        return sum(4.0 * d * min(old, d / 2) for pair in widths for d in pair)
    return 0.0


def feature_bytes(recipe: Recipe, kind: AdapterKind, model: nn.Module) -> float:
    """PEGP's second moments, d x d in float32 for each target: layers that share an input share one, so at most."""
    return 2 * _bases_bytes(recipe, kind, model) if recipe.method.name == "pegp" else 0.0


def ending_bytes(recipe: Recipe, kind: AdapterKind, model: nn.Module, longest: LongestRow) -> float:
    """Of a task's end: the whole backbone, and of PEGP its sums of features, with more that comes one after another.

    Of a backbone that rests on the host, what ZeRO 3 gathers of it. A layer in work in the forward that fills the sums;
    then five float64 matrices as wide as the widest input, which its decomposition takes.
    """
    frozen, sums = frozen_bytes(recipe, model), feature_bytes(recipe, kind, model)
    if recipe.weights_on_host:
        frozen = _frozen_on_device(recipe, frozen, world=1)
    if not sums:
        return frozen
    assert isinstance(kind, LoraKind), "sums of features are counted for LoRA's layers"
    layers: list[Any] = [model.get_submodule(name) for name in kind.targets]
    widest: int = max(layer.in_features for layer in layers)
    width = 2 if recipe.engine.precision == "bf16" else 4
    return frozen + sums + max(_layer_bytes(recipe, model, longest.tokens, width), 5 * 8.0 * widest**2)


def scoring_bytes(recipe: Recipe, model: nn.Module, longest: Scored) -> dict[str, float]:
    """Of scoring a batch of the longest prompts, by part: a whole copy of the weights, whatever the stage.

    With parameters on the host, of its blocks one at a time.
    The cache holds two numbers for each token, layer and key head dimension, T5's of the prompt in each decoder layer.
    A layer in work: three tensors as wide as its feed-forward block and four as wide as its input; T5's encoder, and
    three of a number for each pair of tokens and head, where no kernel avoids them. After it, logits of the options'
    tokens, as the model gives them and twice in float32.
    """
    config: Any = model.config
    width = 2 if recipe.engine.precision == "bf16" else 4
    rows = recipe.evaluation.batch_size
    tokens = rows * (longest.prompt_tokens + recipe.evaluation.max_new_tokens)
    logits = min(LOGITS_PER_FORWARD, rows * longest.option_tokens * config.vocab_size)
    options = logits * (width + 2 * 4.0) if recipe.evaluation.label_scoring else 0.0
    heads = config.num_attention_heads
    if recipe.model.family == "t5":
        layers, keys, inner = config.num_decoder_layers, heads * config.d_kv, config.d_ff
        pairs = 3.0 * heads * longest.prompt_tokens
    else:
        head = getattr(config, "head_dim", None) or config.hidden_size // heads
        layers, keys, inner = config.num_hidden_layers, config.num_key_value_heads * head, config.intermediate_size
        pairs = 0.0
    layer = (3 * inner + 4 * config.hidden_size + pairs) * tokens * width
    return {
        "frozen weights": _held_bytes(recipe, model),
        "cache of a batch": 2.0 * layers * keys * tokens * width,
        "a layer in work, or options' logits": max(layer, options),
    }


def beginning_bytes(recipe: Recipe, model: nn.Module, longest: LongestRow) -> float:
    """Of a task's begin: the whole backbone, and of LB-CL and GORP a backward through it before ZeRO has scattered it.

    With parameters on the host, of its blocks one at a time.
    What that backward sums up rests on the host.
    """
    backward = recipe.method.name in ("lbcl", "gorp")
    width = 2 if recipe.engine.precision == "bf16" else 4
    return _held_bytes(recipe, model) + (_activation_bytes(recipe, longest, model, width) if backward else 0.0)


def full_rank_bytes_on_host(kind: AdapterKind, model: nn.Module) -> int:
    """A core's layer stands twice in each rank's memory, in float32: as the task found it, and as it is learnt."""
    layers: list[Any] = [model.get_submodule(name) for name in getattr(kind, "cores", ())]
    return 2 * 4 * sum(int(layer.weight.numel()) for layer in layers)


def frozen_bytes(recipe: Recipe, model: nn.Module) -> float:
    """Of a whole copy of the backbone, as it trains and as each rank scores with it.

    4 bits come with 8 of a constant for each 64 numbers (and little more: Dettmers et al. 2023), 8 bits with a float32
    constant a row.
    """
    width = 2 if recipe.engine.precision == "bf16" else 4
    total = float(width * sum(parameter.numel() for parameter in model.parameters()))
    bits = recipe.model.quantization
    for layer in packed_layers(model) if bits else ():
        packed = (
            (0.5 + 1 / 64) * layer.weight.numel() if bits == "nf4" else layer.weight.numel() + 4 * layer.out_features
        )
        total += packed - width * layer.weight.numel()
    return total


def _held_bytes(recipe: Recipe, model: nn.Module) -> float:
    """What a device holds of the backbone without an engine (`from_host`): all, or all but blocks and one of these."""
    if not recipe.weights_on_host:
        return frozen_bytes(recipe, model)
    width = 2 if recipe.engine.precision == "bf16" else 4
    return float(width * numbers_held(model))


def _activation_bytes(recipe: Recipe, longest: LongestRow, model: nn.Module, width: int) -> float:
    """Korthikanti et al. 2022, section 4: s b h (34 + 5 a s / h) bytes per layer in 16 bits, twice in 32; with
    recomputation the layer inputs and one layer; then logits at label positions, with their gradient.

    T5's decoder reads the label alone, and of the encoder's output the keys and values of each cross-attention.
    """
    config: Any = model.config
    hidden, heads = config.hidden_size, config.num_attention_heads
    rows, tokens, labels = recipe.training.micro_batch_size, longest.tokens, longest.label_tokens

    def layer(positions: int) -> float:
        return _layer_bytes(recipe, model, positions, width)

    stacks = [(config.num_hidden_layers, layer(tokens), tokens)]
    if decoder_layers := getattr(config, "num_decoder_layers", 0):
        crossed = rows * (2 * tokens * hidden + 5 / 2 * heads * labels * tokens) * width
        stacks = [(config.num_hidden_layers, layer(tokens), tokens), (decoder_layers, layer(labels) + crossed, labels)]
    if recipe.engine.gradient_checkpointing:
        body = sum(count * rows * positions * hidden * width for count, _, positions in stacks)
        body += max(size for _, size, _ in stacks) + _kept_inputs_bytes(recipe, longest, model, width)
    else:
        body = sum(count * size for count, size, _ in stacks)
    return float(body + 3 * 4 * rows * labels * config.vocab_size)


def _layer_bytes(recipe: Recipe, model: nn.Module, positions: int, width: int) -> float:
    config: Any = model.config
    hidden, heads, rows = config.hidden_size, config.num_attention_heads, recipe.training.micro_batch_size
    return float(width * positions * rows * hidden * (34 + 5 * heads * positions / hidden) / 2)


def _kept_inputs_bytes(recipe: Recipe, longest: LongestRow, model: nn.Module, width: int) -> float:
    """bitsandbytes' int8 layers keep what they read themselves, out of recomputation's sight; at most, each its own."""
    if recipe.model.quantization != "int8":
        return 0.0

    def positions(name: str) -> int:
        reads_labels = name.startswith("decoder.") and not name.endswith(("EncDecAttention.k", "EncDecAttention.v"))
        return longest.label_tokens if reads_labels else longest.tokens

    packed = set(packed_layers(model))
    layers: list[tuple[str, Any]] = [(name, layer) for name, layer in model.named_modules() if layer in packed]
    inputs = sum(positions(name) * layer.in_features for name, layer in layers)
    return float(recipe.training.micro_batch_size * inputs * width)
