"""Prompts, byte for byte as the published runs have them, and where a prompt that is too long may be cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data_prep.tasks import Task

CUE = "Answer:"

# family -> (what stands before the first passage, what separates it from the rest, is the rest a passage too)
_PASSAGE_FORMS: dict[str, tuple[str, str, bool]] = {
    "MultiRC": ("paragraph: ", "\nquestion:", False),
    "NLI": ("sentence 1: ", "\nsentence 2: ", True),
    "QQP": ("first sentence: ", "\nsecond sentence: ", True),
}


@dataclass(frozen=True)
class Prompt:
    """A prompt in parts: `text == head + (passage + kept_after for each of passages) + tail`.

    `passages` holds `(passage, kept_after)` in the order in which they stand and are cut: the first from its
    end until nothing is left of it, then the next. `head`, every `kept_after` and `tail` are never cut.
    """

    head: str
    passages: tuple[tuple[str, str], ...]
    tail: str

    @property
    def text(self) -> str:
        """The whole prompt."""
        return self.with_removed(0)

    @property
    def cuttable(self) -> int:
        """How many characters may be removed: those of all passages."""
        return sum(len(passage) for passage, _ in self.passages)

    def with_removed(self, characters: int) -> str:
        """The prompt with `characters` (0 to `cuttable`) removed from the passages' ends, in their order."""
        assert 0 <= characters <= self.cuttable, f"{characters} is not in 0..{self.cuttable}"
        parts = [self.head]
        for passage, kept_after in self.passages:
            removed = min(characters, len(passage))
            characters -= removed
            parts += [passage[: len(passage) - removed], kept_after]
        return "".join([*parts, self.tail])


def build_prompt(task: Task, sentence: str, *, add_task_name: bool, add_dataset_name: bool) -> Prompt:
    """The prompt of one row: names, instruction, option line, the sentence as it is, and the cue.

    `task.instruction` brings its own newline and is empty where a task has none; sentences are never stripped
    (those of topic classification end in a newline, which gives a blank line before the cue). A sentence that
    has not its family's form is one passage as a whole.
    """
    lines = []
    if add_task_name:
        lines.append(f"Task:{task.family}\n")
    if add_dataset_name:
        lines.append(f"Dataset:{task.name}\n")
    lines.append(task.instruction)
    if task.show_options:
        lines.append(f"Option: {', '.join(task.labels)} \n")
    lead, passages, rest = _split_sentence(task.family, sentence)
    return Prompt(head="".join(lines) + lead, passages=passages, tail=f"{rest}\n{CUE}")


def _split_sentence(family: str, sentence: str) -> tuple[str, tuple[tuple[str, str], ...], str]:
    """Split into what comes before the passages, the passages, and what comes after."""
    if family in _PASSAGE_FORMS:
        lead, separator, cut_second = _PASSAGE_FORMS[family]
        first, found, second = sentence[len(lead) :].partition(separator)
        if sentence.startswith(lead) and found:
            if cut_second:
                return lead, ((first, separator), (second, "")), ""
            return lead, ((first, ""),), separator + second
    return "", ((sentence, ""),), ""
