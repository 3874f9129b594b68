"""Tiny backbones for the demo, made on first use: a T5 and a LLaMA of a few hundred thousand parameters.

They are trained from scratch on `data_prep.synthetic.pretraining_texts` (T5: span corruption and practice
questions; LLaMA: language modelling and practice questions) and kept in the cache as folders of the same form
as a real checkpoint, so that the same loading code serves both. They know nothing beyond those templates.
"""

import hashlib
import io
import itertools
import re
import string
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal

import sentencepiece
import torch
import transformers
from safetensors import SafetensorError
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from data_prep import synthetic
from data_prep.cache import publish

Family = Literal["t5", "llama2"]
Model = T5ForConditionalGeneration | LlamaForCausalLM
SEED = 7
THREADS = 1  # sums depend on it: fixed, whatever OMP_NUM_THREADS says; two gain little and stall on a busy machine
TOKENIZER_TEXTS = 4000
SENTINELS = 100  # T5Tokenizer adds this many pieces behind the vocabulary, <extra_id_0> last
NOISE, SPAN = 0.2, 2.5  # span corruption: share of tokens hidden, mean length of a hidden span


@dataclass(frozen=True)
class Making:
    """How one family's backbone is made. Found by trial: about half a minute, and practice answered 99 to 100 %."""

    steps: int
    learning_rate: float
    vocabulary: int
    layers: int
    feed_forward: int
    tokenizer_file: str
    width: int = 64
    heads: int = 4
    batch: int = 32


MAKING: dict[Family, Making] = {
    "t5": Making(
        steps=480,
        learning_rate=4e-3,
        vocabulary=400,
        layers=2,
        feed_forward=192,
        tokenizer_file="spiece.model",
    ),
    "llama2": Making(  # 256 of the pieces are bytes
        steps=400,
        learning_rate=5e-3,
        vocabulary=1000,
        layers=3,
        feed_forward=192,
        tokenizer_file="tokenizer.model",
    ),
}


def ensure_tiny_backbone(family: Family) -> Path:
    """The folder of the tiny backbone, made on first use: about half a minute on one core.

    Its name holds a hash of the code that makes it, so that a change of either file makes a new one.
    """
    sources = Path(__file__).read_bytes() + Path(synthetic.__file__).read_bytes()
    key = hashlib.sha256(sources).hexdigest()[:12]
    return publish(f"tiny-{family}-{key}", lambda folder: _make(folder, family))


def _make(folder: Path, family: Family, steps: int | None = None) -> None:
    """Write tokenizer, configuration and weights into an existing empty folder; `steps` None: MAKING's."""
    making = MAKING[family]
    pieces = train_tokenizer(family)
    (folder / making.tokenizer_file).write_bytes(pieces)
    vocabulary = sentencepiece.SentencePieceProcessor(model_proto=pieces)
    with _reproducible():
        model = _new_model(family, len(vocabulary))
        _train(model, family, vocabulary, making.steps if steps is None else steps)
        try:
            model.save_pretrained(folder)
        except SafetensorError as fault:  # a full disk, for one, comes as this
            raise OSError(str(fault)) from fault


def train_tokenizer(family: Family) -> bytes:
    """A sentencepiece model of the family's kind (T5: unigram; LLaMA: BPE with byte fallback), as file bytes."""
    texts = itertools.islice(synthetic.pretraining_texts(SEED), TOKENIZER_TEXTS)
    lines = [line for text in texts for line in f"{text.text} {text.answer or ''}".split("\n") if line.strip()]
    if family == "t5":  # a word becomes a piece only if it occurs within two different words
        words = sorted(set(re.findall(r"\w+", "\n".join(lines))))
        lines += [f"{word}:" for word in words]
    kind: dict[str, Any] = {
        "t5": {"model_type": "unigram", "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
        "llama2": {
            "model_type": "bpe", "unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1, "byte_fallback": True,
            "normalization_rule_name": "identity", "remove_extra_whitespaces": False, "split_digits": True,
        },
    }[family]  # fmt: skip
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=file,
        vocab_size=MAKING[family].vocabulary,
        # without these the rarest letters are dropped, and a label that has one can never be said
        required_chars=string.ascii_letters + string.digits + string.punctuation,
        hard_vocab_limit=False,  # a few pieces fewer, rather than a fault, if the text has no more to give
        num_threads=1,
        minloglevel=2,
        **kind,
    )
    return file.getvalue()


@contextmanager
def _reproducible() -> Iterator[None]:
    """A fixed number of threads, a seeded generator and no progress bars inside; the caller's own afterwards."""
    threads, bars = torch.get_num_threads(), transformers.logging.is_progress_bar_enabled()
    torch.set_num_threads(THREADS)
    transformers.logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(SEED)
            yield
    finally:
        torch.set_num_threads(threads)
        if bars:
            transformers.logging.enable_progress_bar()


def _new_model(family: Family, pieces: int) -> Model:
    making = MAKING[family]
    if family == "t5":
        config = T5Config(
            vocab_size=pieces + SENTINELS,
            d_model=making.width,
            d_kv=making.width // making.heads,
            num_heads=making.heads,
            d_ff=making.feed_forward,
            num_layers=making.layers,
            num_decoder_layers=making.layers,
            dropout_rate=0.0,
        )
        config.decoder_start_token_id = 0
        return T5ForConditionalGeneration(config)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=pieces,
            hidden_size=making.width,
            num_attention_heads=making.heads,
            intermediate_size=making.feed_forward,
            num_hidden_layers=making.layers,
            max_position_embeddings=512,
            initializer_range=0.08,  # the usual 0.02 is for wide layers: these learnt far more slowly with it
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def _train(model: Model, family: Family, vocabulary: sentencepiece.SentencePieceProcessor, steps: int) -> None:
    """AdamW on an endless stream of texts; rate up over a tenth of the steps, then down."""
    making = MAKING[family]
    texts = synthetic.pretraining_texts(SEED)
    rng = Random(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=making.learning_rate, weight_decay=0.01, fused=True)
    warmup = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, max(0.02, 1 - step / max(1, steps)))
    )
    encode = _t5_example if family == "t5" else _llama_example
    model.train()
    for _ in range(steps):
        examples = [encode(text, vocabulary, rng) for text in itertools.islice(texts, making.batch)]
        inputs = _padded([source for source, _ in examples], 0)
        labels = _padded([target for _, target in examples], -100)
        mask = _padded([[1] * len(source) for source, _ in examples], 0)
        loss = model(input_ids=inputs, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def _t5_example(
    text: synthetic.PretrainingText, vocabulary: sentencepiece.SentencePieceProcessor, rng: Random
) -> tuple[list[int], list[int]]:
    """Source and target ids; plain text has spans replaced by sentinels, as T5 was pretrained."""
    ids = vocabulary.encode(text.text)
    end = vocabulary.eos_id()
    if text.answer is not None:
        return [*ids, end], [*vocabulary.encode(text.answer), end]
    source, target, sentinel = [], [], len(vocabulary) + SENTINELS
    position = 0
    while position < len(ids):
        if rng.random() < NOISE / SPAN:
            length = 1 + min(int(rng.expovariate(1 / (SPAN - 0.5))), 5)
            sentinel -= 1
            source.append(sentinel)
            target += [sentinel, *ids[position : position + length]]
            position += length
        else:
            source.append(ids[position])
            position += 1
    return [*source, end], [*target, end]


def _llama_example(
    text: synthetic.PretrainingText, vocabulary: sentencepiece.SentencePieceProcessor, rng: Random
) -> tuple[list[int], list[int]]:
    """Ids and labels of one length: plain text counts as a whole, of a practice question the answer alone."""
    ids = [vocabulary.bos_id(), *vocabulary.encode(text.text)]
    if text.answer is None:
        return [*ids, vocabulary.eos_id()], [-100, *ids[1:], vocabulary.eos_id()]
    answer = [*vocabulary.encode(text.answer), vocabulary.eos_id()]
    return ids + answer, [-100] * len(ids) + answer


def _padded(rows: Sequence[Sequence[int]], fill: int) -> torch.Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])
