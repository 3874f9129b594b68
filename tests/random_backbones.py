"""Random backbones of either family, small enough for a test, and rows of random token ids for them.

Widths are odd, so that ZeRO's shards divide neither factor of a rank-3 LoRA on T5.
"""

import random
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from data_prep.batches import Example

VOCABULARY = 61
WIDTH = 15
PAD, EOS, BOS = 0, 1, 2
SPECIAL = 3  # ids below this are PAD, EOS and BOS


def save_backbone(folder: Path, family: str, *, dropout: float = 0.0) -> Path:
    """Save a random backbone of `family` as config.json and model.safetensors; returns `folder`.

    `dropout` is T5's own, in training mode; LLaMA has none.
    """
    torch.manual_seed({"t5": 11, "llama2": 12}[family])
    model = _t5(dropout) if family == "t5" else _llama()
    model.save_pretrained(folder)
    return folder


def _t5(dropout: float) -> T5ForConditionalGeneration:
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=5,
        num_heads=3,
        d_ff=20,
        num_layers=1,
        num_decoder_layers=1,
        dropout_rate=dropout,
        tie_word_embeddings=False,
        pad_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=PAD,
    )
    return T5ForConditionalGeneration(config)


def _llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=6,
        initializer_range=0.2,  # LLaMA's own 0.02 leaves so small a model all but linear
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=BOS,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # zero otherwise, which would hide padding that takes part in a sum
        model.model.embed_tokens.weight[PAD].normal_(std=0.2)
    return model


def random_examples(count: int, family: str, *, seed: int = 5) -> list[Example]:
    """Rows of 3 to 12 prompt tokens and 1 to 4 label tokens; row ids start at 100."""
    draw = random.Random(seed)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw.randrange(SPECIAL, VOCABULARY) for _ in range(draw.randint(low, high)))

    examples = []
    for row in range(count):
        prompt, label = tokens(2, 11), tokens(1, 3)
        input_ids = (*prompt, EOS) if family == "t5" else (BOS, *prompt)
        examples.append(Example(100 + row, input_ids, (*label, EOS), truncated=False))
    return examples
