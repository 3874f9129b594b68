"""LLaMA's tokenizer as sentencepiece itself has it, for the `tokenizers` library.

transformers 5 gives other ids than sentencepiece for a bare `tokenizer.model`: it ranks merges by token id
where sentencepiece goes by score (LLaMA-2's runs of spaces have low ids and the lowest score, so text after a
double space differs), and it puts no space before a text that begins with one. With these two functions the
ids are equal.
"""

from __future__ import annotations

from pathlib import Path

from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, normalizers


def read_bpe(model_file: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and ranked merges of a BPE model, as `LlamaTokenizer(vocab=, merges=)` takes them."""
    model = SentencePieceProcessor(model_file=str(model_file))
    pieces = [model.id_to_piece(i) for i in range(model.get_piece_size())]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    text = {
        piece: model.get_score(i)
        for i, piece in enumerate(pieces)
        if not (model.is_control(i) or model.is_unknown(i) or model.is_byte(i))
    }
    ranked = sorted(
        (-score, vocabulary[piece], vocabulary[piece[:cut]], piece[:cut], piece[cut:])
        for piece, score in text.items()
        for cut in range(1, len(piece))
        if piece[:cut] in text and piece[cut:] in text
    )
    return vocabulary, [(left, right) for *_, left, right in ranked]


def follow_sentencepiece(backend: Tokenizer) -> None:
    """Make `backend` (a LLaMA tokenizer's `backend_tokenizer`) put one space before every text, as it is."""
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = None
