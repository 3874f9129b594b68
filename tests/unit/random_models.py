"""Tiny models of random weights that have much to say, prompts for them, and a call of `predict`."""

from functools import cache
from typing import Any

import pytest
import torch
from small_tokenizers import tokenizer_of
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from data_prep.batches import Example
from eval import decode
from eval.decode import Prediction, predict

FAMILIES = ("t5", "llama2")
SENTENCES = (
    "Where do ferns grow? Near the northern wall.",
    "The mill stands on the river.",
    "Moss",
    "Nobody counted the boats that left the harbour before the storm reached it, and nobody asked.",
    "Which of these gardens has an old oak?",
    "The wall is older than the oak, and the moss is older than the wall.",
    "Oats in winter, wheat in summer: 1804.",
)


@cache
def random_model(family: str) -> Any:
    """A model whose output varies with the prompt, and which ends at one token in eight."""
    torch.manual_seed(1)
    size = len(tokenizer_of(family))
    if family == "t5":
        shape = {"vocab_size": size, "d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 2, "num_heads": 2}
        model: Any = T5ForConditionalGeneration(
            T5Config(
                **shape,
                decoder_start_token_id=0,
                dropout_rate=0.1,
                initializer_factor=3.0,
                tie_word_embeddings=False,
            )
        )
        model.lm_head.weight.data *= 0.05  # scores of a size that float32 resolves to 1e-4
        model.lm_head.weight.data[-100:] *= 0.5  # the sentinels: nearly half of the vocabulary
        # As large as a trained T5's, so that a wrong position shows.
        model.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.data.mul_(20)
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=size,
                hidden_size=32,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                attention_dropout=0.1,
                initializer_range=0.5,
            )
        )
        model.lm_head.weight.data[3:259] *= 0.6  # the byte tokens: more than half of the vocabulary
    model.generation_config.eos_token_id = [tokenizer_of(family).eos_token_id, *range(7, size, 8)]
    return model.eval()


def examples_of(tokenizer: Any, family: str) -> list[Example]:
    """The sentences as prompts, numbered from 100."""
    examples = []
    for number, sentence in enumerate(SENTENCES):
        ids = tokenizer(sentence, add_special_tokens=False)["input_ids"]
        ids = [*ids, tokenizer.eos_token_id] if family == "t5" else [tokenizer.bos_token_id, *ids]
        examples.append(Example(100 + number, tuple(ids), (), False))
    return examples


def option_ids(tokenizer: Any, labels: list[str]) -> list[tuple[int, ...]]:
    return [(*tokenizer(label, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id) for label in labels]


def full_texts(model: Any, tokenizer: Any, family: str) -> list[str]:
    """What `generate` says to each prompt alone, with nothing stopped."""
    texts = []
    for example in examples_of(tokenizer, family):
        ids = torch.tensor([example.input_ids])
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=50,
            do_sample=False,
            num_beams=1,
            pad_token_id=0,
        )
        new = output[0, 1:] if family == "t5" else output[0, ids.shape[1] :]
        texts.append(tokenizer.decode(new, skip_special_tokens=True))
    return texts


@cache
def random_texts(family: str) -> list[str]:
    """What `random_model` says."""
    return full_texts(random_model(family), tokenizer_of(family), family)


def beginning_alike(tokenizer: Any) -> list[Example]:
    """The sentences after the same 20 tokens, and these tokens alone: for decoder-only models."""
    examples = examples_of(tokenizer, "llama2")
    same = tuple(token for example in examples for token in example.input_ids[1:])[:20]
    prompts = [(tokenizer.bos_token_id, *same, *example.input_ids[1:]) for example in examples]
    prompts.append((tokenizer.bos_token_id, *same))
    return [Example(number, prompt, (), False) for number, prompt in enumerate(prompts)]


def run(model: Any, tokenizer: Any, family: str, labels: list[str], **changes: Any) -> list[Prediction]:
    arguments: dict[str, Any] = {
        "examples": examples_of(tokenizer, family),
        "family": family,
        "labels": labels,
        "label_ids": option_ids(tokenizer, labels),
        "batch_size": 3,
        "label_scoring": False,
    }
    return predict(model, tokenizer, **{**arguments, **changes})


def check_shared_prefix(model: Any, monkeypatch: pytest.MonkeyPatch, *, precision: float) -> None:
    """A decoder-only model says and scores the same whether what prompts share is read once or with each."""
    tokenizer = tokenizer_of("llama2")
    examples, labels = beginning_alike(tokenizer), ["Moss", "Moss or fern", "wall"]
    reads: list[int] = []
    shared = decode.SharedPrefix

    def counted(model: Any, ids: Any) -> Any:
        reads.append(len(ids))
        return shared(model, ids)

    monkeypatch.setattr(decode, "SharedPrefix", counted)
    found = []
    for fewest in (8, 10**6):
        monkeypatch.setattr(decode, "FEWEST_SHARED", fewest)
        changes = {"examples": examples, "label_scoring": True, "max_new_tokens": 8}
        found.append(run(model, tokenizer, "llama2", labels, **changes))
    assert reads == [20], "once for the task: all but the last token of the shortest prompt"
    for once, each in zip(*found, strict=True):
        assert (once.text, once.tokens, once.stopped) == (each.text, each.tokens, each.stopped)
        assert once.option_scores == pytest.approx(each.option_scores, abs=precision)
    assert len({once.text for once in found[0]}) > 3, "rows must differ"
