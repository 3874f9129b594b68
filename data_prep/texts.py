"""Plain texts outside the stream, cut into pieces of token ids: on them a model shows what it could do before."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.custom import read_custom
from data_prep.errors import UserError
from data_prep.rows import is_text, read_content

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from data_prep.batches import Family

# T5's pretraining hides 15 % of the tokens in spans of 3 on average (Raffel et al. 2020, section 3.1.4): here three
# of each twenty, always the last ones, so that every model is asked the same.
SPACING, SPAN = 20, 3
MOST_SPANS = 99  # a T5 vocabulary has 100 sentinels, and one more than there are spans is used
TEXT_KEY = "text"
SUFFIXES = (".txt", ".jsonl")


@dataclass(frozen=True)
class Piece:
    """A piece of text as a model reads it, and what it has to predict.

    t5: `input_ids` is the text with its spans hidden + EOS, `target_ids` the hidden spans between sentinels + EOS.
    llama2: both are BOS + the text. `counted`: positions in `target_ids` of the text's own tokens.
    """

    input_ids: tuple[int, ...]
    target_ids: tuple[int, ...]
    counted: tuple[int, ...]


@dataclass(frozen=True)
class Text:
    """A file of plain text, encoded for one backbone."""

    name: str  # the file's, without its ending
    fingerprint: str  # SHA-256 of the file
    pieces: tuple[Piece, ...]

    @property
    def tokens(self) -> int:
        """How many tokens are predicted."""
        return sum(len(piece.counted) for piece in self.pieces)


def load_text(path: Path, tokenizer: PreTrainedTokenizerBase, *, family: Family, piece_tokens: int) -> Text:
    """The file `path`, one document (.txt) or a document a line under "text" (.jsonl), in pieces of so many tokens.

    Raises `UserError` where it cannot be read, or is too short for a single prediction.
    """
    least = SPACING if family == "t5" else 2
    if piece_tokens < least:
        raise UserError(
            f"evaluation.retention: {path}: is read in pieces of data.max_source_tokens, {piece_tokens}; at least "
            f"{least} are needed"
        )
    documents = _documents(path)
    pieces = tuple(
        piece
        for document in documents
        for ids in _windows(_ids(document, tokenizer), family, piece_tokens)
        if (piece := _hidden_spans(ids, tokenizer) if family == "t5" else _continued(ids, tokenizer)).counted
    )
    if not pieces:
        needed = f"{SPACING} tokens" if family == "t5" else "one token"
        raise UserError(f"evaluation.retention: {path}: no document of at least {needed}; give a longer text")
    return Text(path.stem, hashlib.sha256(path.read_bytes()).hexdigest(), pieces)


def _documents(path: Path) -> list[str]:
    if path.suffix == ".jsonl":
        records, faults = read_custom(path, text_key=TEXT_KEY, label_key=TEXT_KEY)
        for fault in faults:
            row = "" if fault.row is None else f"row {fault.row}: "
            raise UserError(f"evaluation.retention: {path}: {row}{fault.detail}; mend the file")
        for number, record in enumerate(records):
            if not isinstance(record, dict) or not is_text(record.get(TEXT_KEY)):
                raise UserError(f'evaluation.retention: {path}: row {number}: no text under "{TEXT_KEY}"; mend the row')
        return [record[TEXT_KEY] for record in records]
    try:
        return [read_content(path).decode("utf-8")]
    except UnicodeDecodeError as error:
        raise UserError(
            f"evaluation.retention: {path}: not UTF-8 (byte {error.start}); save the text as UTF-8"
        ) from error


def _ids(document: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # Not verbose: a warning that the model cannot read it at once is beside the point.
    ids: list[int] = tokenizer(document, add_special_tokens=False, verbose=False).input_ids
    return ids


def _windows(ids: Sequence[int], family: Family, piece_tokens: int) -> Iterator[Sequence[int]]:
    """The ids in windows; a LLaMA's BOS takes a place in each."""
    width = min(piece_tokens, SPACING * MOST_SPANS) if family == "t5" else piece_tokens - 1
    return (ids[start : start + width] for start in range(0, len(ids), width))


def _continued(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Piece:
    whole = (int(tokenizer.bos_token_id), *ids)
    return Piece(whole, whole, tuple(range(1, len(whole))))


def _hidden_spans(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Piece:
    source: list[int] = []
    target: list[int] = []
    counted: list[int] = []
    spans = len(ids) // SPACING
    for span in range(spans):
        sentinel = _sentinel(tokenizer, span)
        start = span * SPACING
        hidden = start + SPACING - SPAN
        source += [*ids[start:hidden], sentinel]
        target.append(sentinel)
        counted += range(len(target), len(target) + SPAN)
        target += ids[hidden : start + SPACING]
    end = int(tokenizer.eos_token_id)
    source += [*ids[spans * SPACING :], end]
    target += [_sentinel(tokenizer, spans), end]
    return Piece(tuple(source), tuple(target), tuple(counted))


def _sentinel(tokenizer: PreTrainedTokenizerBase, index: int) -> int:
    name = f"<extra_id_{index}>"
    found = tokenizer.convert_tokens_to_ids(name)
    if not isinstance(found, int) or found == tokenizer.unk_token_id:
        raise UserError(f"evaluation.retention: the tokenizer has no {name}, by which T5 marks hidden spans")
    return found
