"""Small real tokenizers, trained in a second on sentences of our own: T5's kind and LLaMA's kind."""

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import LlamaTokenizer, PreTrainedTokenizerBase, T5Tokenizer

from data_prep.sentencepiece_bpe import follow_sentencepiece, read_bpe

TEXT = """\
The mill stands on the river and grinds oats in winter and wheat in summer.
Which of these gardens has moss, ferns and an old oak by the northern wall?
Task:TC Dataset:plants Choose one from the option. Option: Tree, Moss Answer:
sentence 1: The oak is old. sentence 2: The wall is older than the oak.
paragraph: Moss grows slowly. question: How does moss grow? candidate answer: slowly
first sentence: Where do ferns grow? second sentence: Do ferns grow near walls?
Nobody counted the boats that left the harbour before the storm reached it.
    four spaces, then two  spaces, then a tab	and 1804 or 37 numbers; naïve café
"""


@cache
def model_file(family: str) -> Path:
    """A sentencepiece model: unigram for t5; BPE with bytes, every space kept, for llama2."""
    file = Path(mkdtemp()) / ("spiece.model" if family == "t5" else "tokenizer.model")
    if family == "t5":
        kind = {
            "model_type": "unigram",
            "vocab_size": 200,
            "pad_id": 0,
            "eos_id": 1,
            "unk_id": 2,
            "bos_id": -1,
        }
    else:
        kind = {
            "model_type": "bpe",
            "vocab_size": 460,
            "byte_fallback": True,
            "split_digits": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "allow_whitespace_only_pieces": True,
        }
    with file.open("wb") as stream:
        lines = iter(TEXT.splitlines() * 4)
        SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=stream, hard_vocab_limit=False, minloglevel=2, **kind
        )
    return file


@cache
def tokenizer_of(family: str) -> PreTrainedTokenizerBase:
    """The tokenizer that transformers makes of `model_file(family)`."""
    if family == "t5":
        return T5Tokenizer.from_pretrained(str(model_file(family).parent))
    vocabulary, merges = read_bpe(model_file(family))
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=merges)
    follow_sentencepiece(tokenizer.backend_tokenizer)
    return tokenizer


@cache
def reference_of(family: str) -> SentencePieceProcessor:
    """Sentencepiece itself, with the same model."""
    return SentencePieceProcessor(model_file=str(model_file(family)))
