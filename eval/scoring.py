"""Exact match of a generated text with a label, and when a text still being generated can no longer match."""

from collections.abc import Iterable

from data_prep.labels import DELETE_PUNCTUATION
from data_prep.labels import normalise as normalise

# What a tokenizer decodes an unfinished multi-byte character to; the next tokens may complete it.
_UNFINISHED_CHARACTER = "\ufffd"


def exact_match(prediction: str, label: str) -> bool:
    """Whether the two are the same whole string after `normalise`.

    A label that normalises to nothing (the `-` rows of MNLI) is matched by nothing, not even by an empty
    prediction.
    """
    wanted = normalise(label)
    return bool(wanted) and normalise(prediction) == wanted


class PrefixAutomaton:
    """Decides which texts can still grow into one of `labels` under `exact_match`.

    The state of a text is its normalised form and whether white space is pending at its end: "very" may go on
    to "veryx" and "very " only to "very x", while both already equal the label "very".

    The text must only ever grow at its end, so decode with `clean_up_tokenization_spaces=False`: the clean-up
    joins words again ("do n't" becomes "don't"), after which a text called hopeless could match.
    """

    def __init__(self, labels: Iterable[str]) -> None:
        normalised = {_fold_final_sigma(normalise(label)) for label in labels}
        self._labels = sorted(normalised - {""})

    def can_continue(self, text: str) -> bool:
        """Whether `text`, as it stands or with any text appended, matches one of the labels."""
        cleaned = text.rstrip(_UNFINISHED_CHARACTER).lower().translate(DELETE_PUNCTUATION)
        words = _fold_final_sigma(" ".join(cleaned.split()))
        prefix = words + " " if words and cleaned[-1].isspace() else words
        return any(label == words or label.startswith(prefix) for label in self._labels)


def _fold_final_sigma(text: str) -> str:
    """`text` with the Greek final sigma as the ordinary one.

    Capital sigma is the one letter whose lower case depends on what follows it, and so on text to come.
    """
    return text.replace("\u03c2", "\u03c3")
