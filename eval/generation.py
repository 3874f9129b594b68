"""Greedy generation that drops a row as soon as its exact match is decided."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from eval.prompt_state import PromptState
from eval.scoring import PrefixAutomaton


@dataclass
class Generated:
    """One row's output: all token ids so far, EOS included, and whether it was cut as hopeless."""

    ids: list[int] = field(default_factory=list)
    stopped: bool = False


class TextFollower:
    """Knows from its token ids what a row's text is, and whether it can still become a label.

    Rows mostly say the same few things, so what was found for a sequence of ids is kept. A label is taken to
    hold no U+FFFD: in a decoded text that stands for bytes which are no character, or none yet.
    """

    def __init__(self, tokenizer: Any, labels: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._automaton = PrefixAutomaton(labels)
        self._hopeful: dict[tuple[int, ...], bool] = {}

    def text(self, ids: Sequence[int]) -> str:
        """The text of generated ids without special tokens, spaces before punctuation left as they are."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def can_continue(self, ids: Sequence[int]) -> bool:
        """Whether any continuation of these ids can match a label."""
        key = tuple(ids)
        if key not in self._hopeful:
            self._hopeful[key] = self._automaton.can_continue(self.text(ids))
        return self._hopeful[key]


def end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """The ids that end a generated row, as `generate` would take them: the model's, else the tokenizer's."""
    for source in (getattr(model, "generation_config", None), model.config, tokenizer):
        found = getattr(source, "eos_token_id", None)
        if found is not None:
            return frozenset(found) if isinstance(found, list | tuple) else frozenset({int(found)})
    raise ValueError("neither the model nor the tokenizer names an end-of-sequence token")


def generate_greedily(
    state: PromptState, follower: TextFollower, *, ends: frozenset[int], max_new_tokens: int
) -> list[Generated]:
    """The argmax continuation of every row, to EOS, to `max_new_tokens`, or to where no label is in reach."""
    outputs = [Generated() for _ in range(len(state.logits))]
    running, logits = list(outputs), state.logits
    while True:
        tokens = logits.argmax(dim=-1)
        going: list[int] = []
        for place, (row, token) in enumerate(zip(running, tokens.tolist(), strict=True)):
            row.ids.append(token)
            if token in ends or len(row.ids) >= max_new_tokens:
                continue
            row.stopped = not follower.can_continue(row.ids)
            if not row.stopped:
                going.append(place)
        if not going:
            return outputs
        if len(going) < len(running):
            kept = torch.tensor(going, device=tokens.device)
            state.keep(kept)
            tokens, running = tokens[kept], [running[place] for place in going]
        logits = state.step(tokens)
