"""What a label set must be so that exact match can score it."""

import string
from typing import Any

from data_prep.errors import UserError

DELETE_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower case, without ASCII punctuation, white space collapsed to single spaces and stripped."""
    return " ".join(text.lower().translate(DELETE_PUNCTUATION).split())


def check_labels(labels: Any, *, place: str) -> tuple[str, ...]:
    """At least two strings that differ as exact match compares them, or UserError at `place`."""
    if not isinstance(labels, list | tuple) or not all(isinstance(x, str) and x.strip() for x in labels):
        raise UserError(f'{place}: {labels!r:.80} is no list of labels; write a list such as ["Good", "Bad"]')
    labels_by_text: dict[str, list[str]] = {}
    for label in labels:
        labels_by_text.setdefault(normalise(label), []).append(label)
    for text, alike in labels_by_text.items():
        if not text or len(alike) > 1:
            raise UserError(
                f"{place}: exact match ignores case and punctuation, so {', '.join(map(repr, alike))} "
                f"read{'s' * (len(alike) == 1)} {text!r}; rename {'it' if len(alike) == 1 else 'them'} in words"
            )
    if len(labels) < 2:
        raise UserError(f"{place}: {len(labels)} label(s); a task has at least two: name them all")
    return tuple(labels)
