"""Cutting prompts to a number of tokens, whatever the tokenizer: the passages give way, the cue never."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from data_prep.prompts import Prompt

Encode = Callable[[Sequence[str]], list[list[int]]]


@dataclass(frozen=True)
class FittedPrompt:
    """Token ids of a prompt, without special tokens, and whether anything was cut."""

    ids: tuple[int, ...]
    truncated: bool


@dataclass
class _Search:
    """One prompt's search: removing `enough` characters fits (with `ids`), removing `too_few` does not."""

    index: int
    prompt: Prompt
    too_few: int
    tokens_at_too_few: int
    enough: int
    ids: list[int]
    tries: int = 0
    fitted_last: bool = False

    def next_cut(self, budget: int) -> int:
        """A number of characters strictly between the two.

        Where tokens are spread evenly the cut is found by interpolation; the second try of three aims two
        tokens to the other side of it, the third halves the interval, which bounds the number of tries.
        """
        span = self.enough - self.too_few
        if span <= 8 or self.tries % 3 == 2:
            return self.too_few + span // 2
        per_token = span / (self.tokens_at_too_few - len(self.ids))
        aim = self.tokens_at_too_few - budget
        if self.tries % 3 == 1:
            aim += -2 if self.fitted_last else 2
        return min(max(self.too_few + round(per_token * aim), self.too_few + 1), self.enough - 1)

    def narrow(self, cut: int, ids: list[int], budget: int) -> None:
        """Take in that removing `cut` characters leaves `ids`."""
        self.tries += 1
        self.fitted_last = len(ids) <= budget
        if self.fitted_last:
            self.enough, self.ids = cut, ids
        else:
            self.too_few, self.tokens_at_too_few = cut, len(ids)


def cut_passages(prompts: Sequence[Prompt], encode: Encode, budget: int) -> list[FittedPrompt]:
    """Token ids of each prompt, at most `budget` of them, with as little as possible cut off its passages.

    The cut falls on a character: removing so many fits, removing one less does not. (Token counts are not
    quite monotone in the characters; each text tried is tokenised whole, so what is returned does fit.)
    A prompt whose fixed parts alone are longer than `budget` comes back with empty passages and more ids
    than that: the caller knows the row and refuses it.
    """
    whole = encode([prompt.text for prompt in prompts])
    fitted = [FittedPrompt(tuple(ids), truncated=False) for ids in whole]
    long = [index for index, ids in enumerate(whole) if len(ids) > budget]
    emptied = encode([prompts[i].with_removed(prompts[i].cuttable) for i in long])
    searches = [
        _Search(i, prompts[i], 0, len(whole[i]), prompts[i].cuttable, ids) for i, ids in zip(long, emptied, strict=True)
    ]
    # All prompts take their next step together: tokenizers are several times faster on many texts at once.
    active = [search for search in searches if len(search.ids) <= budget and search.enough > 1]
    while active:
        cuts = [search.next_cut(budget) for search in active]
        tried = encode([search.prompt.with_removed(cut) for search, cut in zip(active, cuts, strict=True)])
        for search, cut, ids in zip(active, cuts, tried, strict=True):
            search.narrow(cut, ids, budget)
        active = [search for search in active if search.enough - search.too_few > 1]
    for search in searches:
        fitted[search.index] = FittedPrompt(tuple(search.ids), truncated=True)
    return fitted


def cut_tokens(prompts: Sequence[Prompt], encode: Encode, budget: int) -> list[FittedPrompt]:
    """Keep each prompt's first `budget` tokens, as public code does: long rows lose question and cue."""
    whole = encode([prompt.text for prompt in prompts])
    return [FittedPrompt(tuple(ids[:budget]), truncated=len(ids) > budget) for ids in whole]
