"""Four small tasks of templated text, for runs without outside data, and the text to pretrain a tiny model on.

`ensure_folder` makes a CL_Benchmark folder (the form that `data_prep.tasks` reads) with four families of one
task each; `pretraining_texts` yields text of the same vocabulary and templates whose answers are never a label
of these tasks. Sentences fall into two halves by a checksum of their bytes: the tasks take one half,
pretraining the other, so that no row, with whatever label, was ever seen before.
"""

import functools
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random

from data_prep.cache import publish

ROWS = {"train": 480, "dev": 96, "test": 144}  # each divides by 3 and 4: every label equally often
SEED = 20240


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_NAMES = _words("Anna Ben Clara David Emma Felix Greta Hugo Iris Jonas Karin Leo")
_TIMES = [
    "in the morning",
    "before noon",
    "after lunch",
    "in the evening",
    "at night",
    "on Monday",
    "on Friday",
    "last week",
]
_PLACES = _words("window door table wall bench stairs")
_SUBJECTS = [
    (_words("bread soup cheese pepper oven pan"), _words("baked tasted stirred served")),
    (_words("anchor sail rope deck mast harbour"), _words("hauled steered moored sighted")),
    (_words("rose hedge seed spade lawn pond"), _words("planted watered pruned dug")),
    (_words("violin drum song choir piano flute"), _words("played tuned sang practised")),
]
_MOODS = [
    _words("lovely bright warm splendid kind charming"),
    _words("dreadful rude broken noisy dirty late"),
    _words("plain usual ordinary average common normal"),
]
_VISITED = _words("room meal concert ticket garden train guide bed lamp tour boat shop")
_COUNTS = _words("two three four five six seven eight nine ten")
_COMPARED = [
    ["{n} more {t} than", "{n} extra {t} over", "a surplus of {n} {t} over"],
    ["{n} fewer {t} than", "{n} less {t} than", "a lack of {n} {t} against"],
    ["as many as {n} {t} like", "the same {n} {t} as", "just those {n} {t} of"],
]
_COUNTED = _words("coins stamps shells cards beads nuts keys buttons")
_KINDS = [
    _words("fox horse goat owl mouse cat"),
    _words("hammer pliers drill axe wrench chisel"),
    _words("plum pear apple lemon fig grape"),
    _words("coat hat scarf glove shirt sock"),
]


def _subject(rng: Random, wanted: int) -> str:
    nouns, verbs = _SUBJECTS[wanted]
    other = rng.choice(rng.choice(_SUBJECTS)[0])  # a word that may mislead
    name, friend = rng.sample(_NAMES, 2)
    return (
        f"{name} {rng.choice(verbs)} the {rng.choice(nouns)} {rng.choice(_TIMES)}. "
        f"{friend} saw the {other} by the {rng.choice(_PLACES)}.\n"
    )


def _mood(rng: Random, wanted: int) -> str:
    first, second = rng.sample(_MOODS[wanted], 2)
    thing, another = rng.sample(_VISITED, 2)
    return f"The {thing} was {first} and the {another} seemed {second} {rng.choice(_TIMES)}.\n"


def _amount(rng: Random, wanted: int) -> str:
    name, friend = rng.sample(_NAMES, 2)
    compared = rng.choice(_COMPARED[wanted]).format(n=rng.choice(_COUNTS), t=rng.choice(_COUNTED))
    return f"{name} has {compared} {friend} {rng.choice(_TIMES)}."


def _things(rng: Random, wanted: int) -> str:
    first, second = rng.sample(_KINDS[wanted], 2)
    return (
        f"{rng.choice(_NAMES)} lists the {first} and the {second} "
        f"with {rng.choice(_COUNTS)} {rng.choice(_COUNTED)} {rng.choice(_TIMES)}."
    )


@dataclass(frozen=True)
class Question:
    """One classification task over templated sentences: label `k` answers `draw(rng, k)`."""

    family: str
    name: str
    instruction: str  # without the closing "Choose one from the option.\n"
    labels: tuple[str, ...]
    draw: Callable[[Random, int], str]

    @property
    def full_instruction(self) -> str:
        """As it stands in the benchmark's configuration."""
        return f"{self.instruction} Choose one from the option.\n"

    def prompt(self, sentence: str) -> str:
        """The benchmark's prompt, task and dataset lines included."""
        return (
            f"Task:{self.family}\nDataset:{self.name}\n{self.full_instruction}"
            f"Option: {', '.join(self.labels)} \n{sentence}\nAnswer:"
        )


TASKS = (
    Question("SUBJECT", "notes", "What is the note about?", ("Food", "Boats and Sea", "Gardens", "Music"), _subject),
    Question("FEELING", "letters", "How did the writer feel?", ("pleased", "annoyed", "unmoved"), _mood),
    Question("AMOUNT", "counts", "How much has the person?", ("More", "Fewer", "Equal"), _amount),
    Question("KIND", "lists", "Of which kind are the things?", ("Animal", "Tool", "Fruit", "Clothing"), _things),
)

# Practice: the same readings of a text under other words, so that a pretrained model can tell the classes apart
# but has never said a label of TASKS.
PRACTICE = (
    Question(
        "AREA",
        "pages",
        "To which area does the page belong?",
        ("cookery", "shipping", "plants", "concerts"),
        _subject,
    ),
    Question("AREA", "shelves", "Which shelf holds this page?", ("red", "blue", "green", "black"), _subject),
    Question("TONE", "reviews", "What is the tone of the review?", ("good", "bad", "neutral"), _mood),
    Question("TONE", "marks", "Which mark does the review give?", ("high", "low", "middle"), _mood),
    Question("NUMBER", "pairs", "Compare the two numbers.", ("greater", "smaller", "same"), _amount),
    Question("NUMBER", "scales", "To which side does the scale lean?", ("left", "right", "level"), _amount),
    Question("ITEM", "stores", "What sort of item is stored?", ("beast", "metal", "sweet", "cloth"), _things),
    Question("ITEM", "signs", "Which sign has the item?", ("star", "cross", "ring", "arrow"), _things),
)


@dataclass(frozen=True)
class PretrainingText:
    """Plain text (`answer` None: a language-modelling or denoising example) or a practice question and its answer."""

    text: str
    answer: str | None


def _draw(question: Question, rng: Random, label: int, *, half: int) -> str:
    while True:
        sentence = question.draw(rng, label)
        if zlib.crc32(sentence.encode()) % 2 == half:
            return sentence


def pretraining_texts(seed: int) -> Iterator[PretrainingText]:
    """An endless stream, the same for the same seed.

    Half are short practice questions (cheap, and where most is learnt), three in ten practice in the benchmark's
    prompt form, the rest plain text: a sentence, or a prompt of one of TASKS without an answer. So its words,
    labels among them, become known; what they answer does not.
    """
    rng = Random(f"pretraining {seed}")
    while True:
        share = rng.random()
        question = rng.choice(PRACTICE if share < 0.8 else TASKS)
        label = rng.randrange(len(question.labels))
        sentence = _draw(question, rng, label, half=1)
        if share < 0.5:
            yield PretrainingText(f"{question.instruction}\n{sentence}\nAnswer:", question.labels[label])
        elif share < 0.8:
            yield PretrainingText(question.prompt(sentence), question.labels[label])
        else:
            yield PretrainingText(question.prompt(sentence) if share < 0.9 else sentence, None)


def _rows(question: Question) -> dict[str, list[dict[str, str]]]:
    """Rows by split, every sentence once over all splits, labels equally often and shuffled."""
    rng = Random(f"rows {SEED} {question.name}")
    seen: set[str] = set()
    rows = {}
    for split, count in ROWS.items():
        drawn = []
        for position in range(count):
            label = position % len(question.labels)
            sentence = _draw(question, rng, label, half=0)
            while sentence in seen:
                sentence = _draw(question, rng, label, half=0)
            seen.add(sentence)
            drawn.append({"label": question.labels[label], "sentence": sentence})
        rng.shuffle(drawn)
        rows[split] = drawn
    return rows


@functools.cache
def folder_files() -> Mapping[str, str]:
    """Every file of the folder: path inside it -> text."""

    def to_json(value: object) -> str:
        return json.dumps(value, indent=0, ensure_ascii=False) + "\n"

    files = {}
    for question in TASKS:
        place = f"CL_Benchmark/{question.family}/{question.name}"
        files[f"{place}/labels.json"] = to_json(question.labels)
        files.update({f"{place}/{split}.json": to_json(rows) for split, rows in _rows(question).items()})
    files["configs/instruction_config.json"] = to_json(
        {
            question.family: [{"instruction_type": "zero-shot", "instruction": question.full_instruction}]
            for question in TASKS
        }
    )
    return files


def ensure_folder() -> Path:
    """The folder of the four tasks, written on first use.

    Its name holds a hash of its content, so a changed generator writes a new folder and never mixes with an old.
    """
    files = folder_files()
    digest = hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()[:12]

    def write(folder: Path) -> None:
        for name, text in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")

    return publish(f"synthetic-{digest}", write)
