"""Prompts: their optional lines, real rows by hash, and what of them may be cut."""

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.prompts import build_prompt
from data_prep.tasks import Task

# SHA-256 of the prompt of each task's first test row in the mini benchmark.
REAL_PROMPTS = {
    "dbpedia": "46af81b1584cd276b139e87feaf24f76a5b74a7ff22b032fe074bd5af6c7cbf2",
    "amazon": "4df9a6ce41f4ac797865955f6aa63782ab9fa5387b55fc99393164cd54662efa",
    "yelp": "6fd51b01e2f131fb38dd92af67be06a14a2092078f287f3047e0ad0d5f717c54",
    "yahoo": "1aefe3e0c82ae10adc60840ccf1d1518f4f702e8edf83b53f7587a354d6738b6",
    "agnews": "27ba971a13bd984cd006965e6eb904b7f707092b57162d045101d9d7ecfbf43f",
    "IMDB": "ec5c59548783d9df1c5b270a933842cbb5a60a1eccd8b4d35acf599a561b2b5e",
    "SST-2": "21858f1557934035ab92d4e3f5372305db2960f3179c0769c5f5bd06138e4720",
    "MNLI": "9c47151b318cfda055e1f0b2501248e28cfdfc7536dc287eaabb71cbb3ce1d65",
    "CB": "34fdabd7ef9d002298c8dd07fe3ec2cd8c854b2f1ebde9900b0f463b0319089d",
    "RTE": "c116b5a5aa41eadf32c9a6abf245b8b2fb09c414ff995d7a49cfd8bbfa186aec",
    "QQP": "a2b9634ff8fcb2131519f847dc9f27340baa1f5da99fe6a6ce2b8c9d1d12fda1",
    "BoolQA": "9eb99d25bd98ec9a69e96865af5a2b9c1121f677153e1524c1ec706410fed417",
    "MultiRC": "301ada33a92630f2e3955f8d168ded53164cf3a5648ca9d725d635acc147f808",
    "WiC": "270ad2b14c80392ccfce23591e58af3736bce7104186d9ed36dfb1679305e31c",
    "COPA": "a35b5cb64956b010c5b764e41173a2d3a2027648ecbd2f48275929757444f7b3",
}

FAMILIES = {
    "SC": ("amazon", "yelp", "IMDB", "SST-2"),
    "TC": ("dbpedia", "yahoo", "agnews"),
    "NLI": ("MNLI", "CB", "RTE"),
    **{name: (name,) for name in ("QQP", "BoolQA", "MultiRC", "WiC", "COPA")},
}


def task_of(family: str, name: str = "plants", *, labels: tuple[str, ...] = ("Tree", "Moss")) -> Task:
    return Task(
        name=name,
        family=family,
        labels=labels,
        instruction="" if family == "COPA" else "Which is it? Choose one from the option.\n",
        show_options=family != "COPA",
        files={},
    )


def parts_of(family: str, sentence: str) -> tuple[tuple[str, str], ...]:
    return build_prompt(task_of(family), sentence, add_task_name=True, add_dataset_name=True).passages


@pytest.mark.parametrize(("family", "name"), [(f, name) for f, names in FAMILIES.items() for name in names])
def test_prompt_of_a_real_row(mini_dir: Path, family: str, name: str) -> None:
    folder = mini_dir / "CL_Benchmark" / family / name
    instructions = json.loads((mini_dir / "configs" / "instruction_config.json").read_text(encoding="utf-8"))
    task = Task(
        name=name,
        family=family,
        labels=tuple(json.loads((folder / "labels.json").read_text(encoding="utf-8"))),
        instruction=instructions[family][0]["instruction"] if family in instructions else "",
        show_options=family != "COPA",
        files={},
    )
    sentence = json.loads((folder / "test.json").read_text(encoding="utf-8"))[0]["sentence"]
    prompt = build_prompt(task, sentence, add_task_name=True, add_dataset_name=True)
    assert hashlib.sha256(prompt.text.encode("utf-8")).hexdigest() == REAL_PROMPTS[name]


@pytest.mark.parametrize(
    ("add_task_name", "add_dataset_name", "lines"),
    [
        (True, True, "Task:TC\nDataset:plants\n"),
        (True, False, "Task:TC\n"),
        (False, True, "Dataset:plants\n"),
        (False, False, ""),
    ],
)
def test_name_lines_are_optional(add_task_name: bool, add_dataset_name: bool, lines: str) -> None:
    prompt = build_prompt(task_of("TC"), "An oak.", add_task_name=add_task_name, add_dataset_name=add_dataset_name)
    assert prompt.text == (f"{lines}Which is it? Choose one from the option.\nOption: Tree, Moss \nAn oak.\nAnswer:")


def test_passage_of_a_multirc_row_ends_before_its_question() -> None:
    sentence = "paragraph: Oaks grow.\nThey live long.\nquestion: Do oaks grow?\ncandidate answer: yes"
    assert parts_of("MultiRC", sentence) == (("Oaks grow.\nThey live long.", ""),)


@pytest.mark.parametrize(
    ("family", "sentence", "separator"),
    [
        ("NLI", "sentence 1: Oaks grow.\nsentence 2: Trees grow.", "\nsentence 2: "),
        ("QQP", "first sentence: Oaks grow.\nsecond sentence: Trees grow.", "\nsecond sentence: "),
    ],
)
def test_pairs_are_cut_first_sentence_first(family: str, sentence: str, separator: str) -> None:
    assert parts_of(family, sentence) == (("Oaks grow.", separator), ("Trees grow.", ""))
    prompt = build_prompt(task_of(family), sentence, add_task_name=False, add_dataset_name=False)
    lead = sentence.split("Oaks")[0]
    assert prompt.cuttable == len("Oaks grow.Trees grow.")
    assert prompt.with_removed(4).endswith(f"{lead}Oaks g{separator}Trees grow.\nAnswer:")
    assert prompt.with_removed(13).endswith(f"{lead}{separator}Trees gr\nAnswer:")
    assert prompt.with_removed(prompt.cuttable).endswith(f"\n{lead}{separator}\nAnswer:")


@pytest.mark.parametrize(
    ("family", "sentence"),
    [
        ("TC", "Title: Oaks\nText: They grow.\n"),
        ("BoolQA", "question: do oaks grow\npassage: Oak -- They do."),
        ("WiC", "word: oak\nAn oak.\nOak wood."),
        ("NLI", "Oaks grow.\nsentence 2: Trees grow."),  # the rest: not the form that their family has
        ("NLI", "sentence 1: Oaks grow. sentence 2: Trees grow."),
        ("QQP", "first sentence: Do oaks grow?"),
        ("MultiRC", "paragraph: Oaks grow."),
        ("MultiRC", "sentence: Oaks grow.\nquestion: Do they?"),
        ("leaves", "sentence 1: Oaks grow.\nsentence 2: Trees grow."),
    ],
)
def test_elsewhere_the_whole_sentence_is_the_passage(family: str, sentence: str) -> None:
    assert parts_of(family, sentence) == ((sentence, ""),)


@given(
    family=st.sampled_from([*FAMILIES, "leaves"]),
    pieces=st.lists(
        st.sampled_from(
            [
                "sentence 1: ",
                "\nsentence 2: ",
                "first sentence: ",
                "\nsecond sentence: ",
                "paragraph: ",
                "\nquestion:",
                "\n",
                "Answer:",
                "An oak. ",
            ]
        )
    ),
    data=st.data(),
)
def test_parts_join_to_the_prompt_and_cuts_take_only_passages(
    family: str, pieces: list[str], data: st.DataObject
) -> None:
    sentence = "".join(pieces)
    prompt = build_prompt(task_of(family), sentence, add_task_name=True, add_dataset_name=True)
    assert prompt.text.endswith(f"{sentence}\nAnswer:")
    removed = data.draw(st.integers(0, prompt.cuttable))
    cut = prompt.with_removed(removed)
    assert len(cut) == len(prompt.text) - removed
    assert cut.startswith(prompt.head)
    assert cut.endswith("\nAnswer:")
