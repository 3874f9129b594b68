"""The public data sets behind the 15 tasks, and how their rows become the benchmark's; nothing is fetched.

The sentences have the form of the published CL_Benchmark files, white space included. Where a source lacks
what those files hold, the row differs, and the table below says so.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_prep.errors import UserError

STARS = ("very negative", "negative", "neutral", "positive", "very positive")
TOPICS_DBPEDIA = (
    "Company", "Educational Institution", "Artist", "Athlete", "Office Holder", "Mean of Transportation",
    "Building", "Natural Place", "Village", "Animal", "Plant", "Album", "Film", "Written Work",
)  # fmt: skip
TOPICS_YAHOO = (
    "Society & Culture", "Science & Mathematics", "Health", "Education & Reference", "Computers & Internet",
    "Sports", "Business & Finance", "Entertainment & Music", "Family & Relationships",
    "Politics & Government",
)  # fmt: skip
TOPICS_AGNEWS = ("World", "Sports", "Business", "Science or Technology")


@dataclass(frozen=True)
class HubSource:
    """One task's data set. `files` are globs of Parquet files at `revision` for train and test.

    `classes` names the data set's class numbers 0, 1, ...; `labels` is the benchmark's option order.
    `template` is filled with the text columns. With `by_position` the columns are taken in order where their
    names are others. `all_rows`: no sampling of train.
    """

    task: str
    family: str
    dataset: str
    revision: str
    files: tuple[str, str]
    labels: tuple[str, ...]
    classes: tuple[str, ...]
    label_column: str
    text_columns: tuple[str, ...]
    template: Callable[[Mapping[str, str]], str]
    by_position: bool = False
    all_rows: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that a conversion reads, label first."""
        return (self.label_column, *self.text_columns)

    def column_names(self, found: Sequence[str]) -> dict[str, str]:
        """Found name -> our name, for the columns that are read. Raises UserError where they do not fit."""
        if set(self.columns) <= set(found):
            return {name: name for name in self.columns}
        if self.by_position and len(found) == len(self.columns):
            return dict(zip(found, self.columns, strict=True))
        raise UserError(
            f"{self.task}: the data set has the columns {', '.join(found)}; "
            f"needed: {', '.join(self.columns)}; use the pinned revision, or such files with --from-local"
        )

    def convert(self, row: Mapping[str, Any]) -> dict[str, str] | None:
        """{"label", "sentence"} of one row of our columns; None for a row without a class or without text."""
        texts = {name: "" if row[name] is None else str(row[name]) for name in self.text_columns}
        number = int(row[self.label_column])
        if not 0 <= number < len(self.classes) or not any(text.strip() for text in texts.values()):
            return None
        return {"label": self.classes[number], "sentence": self.template(texts)}


def _format(form: str) -> Callable[[Mapping[str, str]], str]:
    return lambda texts: form.format_map(texts)


def _yahoo(texts: Mapping[str, str]) -> str:
    """The published files call the title the question where there is no further question text."""
    title, question = texts["question_title"], texts["question_content"]
    asked = f"Title: {title}\nQuestion: {question}" if question.strip() else f"Question: {title}"
    return f"{asked}\nAnswer: {texts['best_answer']}\n"


def _multirc(texts: Mapping[str, str]) -> str:
    """Every published paragraph ends in exactly one space."""
    paragraph = texts["paragraph"].rstrip(" ")
    return f"paragraph: {paragraph} \nquestion: {texts['question']}\ncandidate answer: {texts['answer']}"


# Revisions are commits whose files are Parquet: loading scripts no longer run in `datasets` 4 and later.
_GLUE = ("nyu-mll/glue", "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c")
_SUPER_GLUE = ("aps/super_glue", "3de24cf8022e94f4ee4b9d55a6f539891524d646")
_TRUE_FALSE = ("True", "False")
_FALSE_TRUE = ("False", "True")


def _files(folder: str, test: str = "test") -> tuple[str, str]:
    return f"{folder}/train-*.parquet", f"{folder}/{test}-*.parquet"


_TABLE = (
    HubSource(
        "dbpedia", "TC", "fancyzhx/dbpedia_14", "9abd46cf7fc8b4c64290f26993c540b92aa145ac",
        _files("dbpedia_14"), TOPICS_DBPEDIA, TOPICS_DBPEDIA,
        "label", ("title", "content"), _format("Title: {title}\nText: {content}\n"),
    ),
    # No official data set of this name has files that can be read: this copy, of the same size, is pinned at
    # its Parquet conversion. Its column names could not be looked up for this table: hence `by_position`.
    HubSource(
        "amazon", "SC", "vgaraujov/amazon_review_full", "61bf1904eea7258d6cc10d94a608661dccc51180",
        ("default/train/*.parquet", "default/test/*.parquet"),
        STARS, STARS,
        "label", ("title", "content"), _format("Title: {title}\nText: {content}\n"), by_position=True,
    ),
    HubSource(
        "yahoo", "TC", "community-datasets/yahoo_answers_topics", "6652a1e7c94f7260a0bfd0c9092dd48e2d536ea1",
        _files("yahoo_answers_topics"),
        TOPICS_YAHOO, TOPICS_YAHOO, "topic", ("question_title", "question_content", "best_answer"), _yahoo,
    ),
    # Title and text are one column here and cannot be parted: no "Title: " line, unlike published rows.
    HubSource(
        "agnews", "TC", "fancyzhx/ag_news", "eb185aade064a813bc0b7f42de02595523103ca4", _files("data"),
        TOPICS_AGNEWS, TOPICS_AGNEWS, "label", ("text",), _format("Text: {text}\n"),
    ),
    HubSource(
        "yelp", "SC", "Yelp/yelp_review_full", "c1f9ee939b7d05667af864ee1cb066393154bf85",
        _files("yelp_review_full"), STARS, STARS, "label", ("text",), _format("Text: {text}\n"),
    ),
    HubSource(
        "IMDB", "SC", "stanfordnlp/imdb", "e6281661ce1c48d982bc483cf8a173c1bbeb5d31", _files("plain_text"),
        ("Good", "Bad"), ("Bad", "Good"), "label", ("text",), _format("{text}"),
    ),
    HubSource(
        "SST-2", "SC", *_GLUE, _files("sst2", "validation"),
        ("Good", "Bad"), ("Bad", "Good"), "label", ("sentence",), _format("Text: {sentence}"),
    ),
    # GLUE leaves out the rows without a gold label: no "-" in test, unlike the published file.
    HubSource(
        "MNLI", "NLI", *_GLUE, _files("mnli", "validation_matched"),
        ("neutral", "entailment", "contradiction"), ("entailment", "neutral", "contradiction"),
        "label", ("premise", "hypothesis"), _format("sentence 1: {premise}\nsentence 2: {hypothesis}"),
    ),
    HubSource(
        "RTE", "NLI", *_GLUE, _files("rte", "validation"),
        ("contradiction", "entailment"), ("entailment", "contradiction"),
        "label", ("sentence1", "sentence2"), _format("sentence 1: {sentence1}\nsentence 2: {sentence2}"),
    ),
    HubSource(
        "QQP", "QQP", *_GLUE, _files("qqp", "validation"), _FALSE_TRUE, _FALSE_TRUE,
        "label", ("question1", "question2"),
        _format("first sentence: {question1}\nsecond sentence: {question2}"),
    ),
    HubSource(
        "CB", "NLI", *_SUPER_GLUE, _files("cb", "validation"),
        ("entailment", "contradiction", "neutral"), ("entailment", "contradiction", "neutral"),
        "label", ("premise", "hypothesis"), _format("sentence 1: {premise}\nsentence 2: {hypothesis}"),
        all_rows=True,
    ),
    HubSource(
        "BoolQA", "BoolQA", *_SUPER_GLUE, _files("boolq", "validation"), _TRUE_FALSE, _FALSE_TRUE,
        "label", ("question", "passage"), _format("question: {question}\npassage: {passage}"),
    ),
    HubSource(
        "MultiRC", "MultiRC", *_SUPER_GLUE, _files("multirc", "validation"), _FALSE_TRUE, _FALSE_TRUE,
        "label", ("paragraph", "question", "answer"), _multirc,
    ),
    HubSource(
        "WiC", "WiC", *_SUPER_GLUE, _files("wic", "validation"), _TRUE_FALSE, _FALSE_TRUE,
        "label", ("word", "sentence1", "sentence2"), _format("word: {word}\n{sentence1}\n{sentence2}"),
    ),
    HubSource(
        "COPA", "COPA", *_SUPER_GLUE, _files("copa", "validation"), ("A", "B"), ("A", "B"),
        "label", ("question", "premise", "choice1", "choice2"),
        _format(
            'Which sentence is the {question} of "{premise}"? Choose one between A and B.'
            "\nA: {choice1}\nB: {choice2}"
        ),
        all_rows=True,
    ),
)  # fmt: skip
HUB_SOURCES: Mapping[str, HubSource] = {source.task: source for source in _TABLE}
"""Task name -> its public data set."""
