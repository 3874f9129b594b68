"""The prompt of every task, byte for byte: sentences of our own in the form of each task's rows."""

import json
from pathlib import Path

import pytest

from data_prep.prompts import build_prompt
from data_prep.tasks import Task

# name -> (family, labels joined by "|", a sentence in the form of its rows)
TASKS = {
    "dbpedia": (
        "TC",
        "Company|Educational Institution|Artist|Athlete|Office Holder|Mean of Transportation|"
        "Building|Natural Place|Village|Animal|Plant|Album|Film|Written Work",
        "Title: Harrow Mill\nText:  Harrow Mill is a brick watermill on the river Stell, built in 1804.\n",
    ),
    "amazon": (
        "SC",
        "very negative|negative|neutral|positive|very positive",
        "Title: Kept me warm\nText: Thick wool, honest stitching. I would buy these gloves again.\n",
    ),
    "yelp": (
        "SC",
        "very negative|negative|neutral|positive|very positive",
        "Text: The soup was cold and so was the waiter. We left before the main course.\n",
    ),
    "yahoo": (
        "TC",
        "Society & Culture|Science & Mathematics|Health|Education & Reference|Computers & Internet|"
        "Sports|Business & Finance|Entertainment & Music|Family & Relationships|Politics & Government",
        "Question: why does my kite dive to the left? i changed the tail twice and it still pulls\n",
    ),
    "agnews": (
        "TC",
        "World|Sports|Business|Science or Technology",
        "Title: Ferry line adds night boat\n"
        "Text: The harbour's ferry line said on Monday it would run a boat at midnight.\n",
    ),
    "IMDB": (
        "SC",
        "Good|Bad",
        "A slow film about a lighthouse, and I would not cut a minute of it.  The ending stays with you.",
    ),
    "SST-2": ("SC", "Good|Bad", "Text: a warm and clumsy comedy that earns its last laugh . "),
    "MNLI": (
        "NLI",
        "neutral|entailment|contradiction",
        "sentence 1: The baker opens at six, except on Sundays.\n"
        "sentence 2: On Sundays the baker opens later or not at all.",
    ),
    "CB": (
        "NLI",
        "entailment|contradiction|neutral",
        "sentence 1: A: Did you see the new bridge? B: I did. I don't think they will ever paint it.\n"
        "sentence 2: they will paint the bridge",
    ),
    "RTE": (
        "NLI",
        "contradiction|entailment",
        "sentence 1: The clock in the town hall was built in 1911 by Ada Venn.\nsentence 2: Ada Venn built a clock.",
    ),
    "QQP": (
        "QQP",
        "False|True",
        "first sentence: How do I keep basil alive in winter?\n"
        "second sentence: What does basil need in the cold months?",
    ),
    "BoolQA": (
        "BoolQA",
        "True|False",
        "question: do owls sleep at night\npassage: Owl -- Most owls hunt in the dark and rest by day in hollow trees.",
    ),
    "MultiRC": (
        "MultiRC",
        "False|True",
        "paragraph: Mira planted beans. A week later she found two shoots, and watered them.\n"
        "question: What did Mira plant?\n"
        "candidate answer: Beans",
    ),
    "WiC": (
        "WiC",
        "True|False",
        "word: bank\nThe boat lay against the bank.\nShe paid the cheque in at the bank.",
    ),
    "COPA": (
        "COPA",
        "A|B",
        'Which sentence is the effect of "The kettle boiled."? Choose one between A and B.\n'
        "A: The lid rattled.\n"
        "B: The cat slept.",
    ),
}

PROMPTS = {
    "dbpedia": (
        "Task:TC\n"
        "Dataset:dbpedia\n"
        "What is the topic of the following paragraph? Choose one from the option.\n"
        "Option: Company, Educational Institution, Artist, Athlete, Office Holder, Mean of Transportation, "
        "Building, Natural Place, Village, Animal, Plant, Album, Film, Written Work \n"
        "Title: Harrow Mill\n"
        "Text:  Harrow Mill is a brick watermill on the river Stell, built in 1804.\n"
        "\n"
        "Answer:"
    ),
    "amazon": (
        "Task:SC\n"
        "Dataset:amazon\n"
        "What is the sentiment of the following paragraph? Choose one from the option.\n"
        "Option: very negative, negative, neutral, positive, very positive \n"
        "Title: Kept me warm\n"
        "Text: Thick wool, honest stitching. I would buy these gloves again.\n"
        "\n"
        "Answer:"
    ),
    "yelp": (
        "Task:SC\n"
        "Dataset:yelp\n"
        "What is the sentiment of the following paragraph? Choose one from the option.\n"
        "Option: very negative, negative, neutral, positive, very positive \n"
        "Text: The soup was cold and so was the waiter. We left before the main course.\n"
        "\n"
        "Answer:"
    ),
    "yahoo": (
        "Task:TC\n"
        "Dataset:yahoo\n"
        "What is the topic of the following paragraph? Choose one from the option.\n"
        "Option: Society & Culture, Science & Mathematics, Health, Education & Reference, Computers & "
        "Internet, Sports, Business & Finance, Entertainment & Music, Family & Relationships, Politics & "
        "Government \n"
        "Question: why does my kite dive to the left? i changed the tail twice and it still pulls\n"
        "\n"
        "Answer:"
    ),
    "agnews": (
        "Task:TC\n"
        "Dataset:agnews\n"
        "What is the topic of the following paragraph? Choose one from the option.\n"
        "Option: World, Sports, Business, Science or Technology \n"
        "Title: Ferry line adds night boat\n"
        "Text: The harbour's ferry line said on Monday it would run a boat at midnight.\n"
        "\n"
        "Answer:"
    ),
    "IMDB": (
        "Task:SC\n"
        "Dataset:IMDB\n"
        "What is the sentiment of the following paragraph? Choose one from the option.\n"
        "Option: Good, Bad \n"
        "A slow film about a lighthouse, and I would not cut a minute of it.  The ending stays with you.\n"
        "Answer:"
    ),
    "SST-2": (
        "Task:SC\n"
        "Dataset:SST-2\n"
        "What is the sentiment of the following paragraph? Choose one from the option.\n"
        "Option: Good, Bad \n"
        "Text: a warm and clumsy comedy that earns its last laugh . \n"
        "Answer:"
    ),
    "MNLI": (
        "Task:NLI\n"
        "Dataset:MNLI\n"
        'What is the logical relationship between the "sentence 1" and the "sentence 2"? Choose one from '
        "the option.\n"
        "Option: neutral, entailment, contradiction \n"
        "sentence 1: The baker opens at six, except on Sundays.\n"
        "sentence 2: On Sundays the baker opens later or not at all.\n"
        "Answer:"
    ),
    "CB": (
        "Task:NLI\n"
        "Dataset:CB\n"
        'What is the logical relationship between the "sentence 1" and the "sentence 2"? Choose one from '
        "the option.\n"
        "Option: entailment, contradiction, neutral \n"
        "sentence 1: A: Did you see the new bridge? B: I did. I don't think they will ever paint it.\n"
        "sentence 2: they will paint the bridge\n"
        "Answer:"
    ),
    "RTE": (
        "Task:NLI\n"
        "Dataset:RTE\n"
        'What is the logical relationship between the "sentence 1" and the "sentence 2"? Choose one from '
        "the option.\n"
        "Option: contradiction, entailment \n"
        "sentence 1: The clock in the town hall was built in 1911 by Ada Venn.\n"
        "sentence 2: Ada Venn built a clock.\n"
        "Answer:"
    ),
    "QQP": (
        "Task:QQP\n"
        "Dataset:QQP\n"
        'Whether the "first sentence" and the "second sentence" have the same meaning? Choose one from the '
        "option.\n"
        "Option: False, True \n"
        "first sentence: How do I keep basil alive in winter?\n"
        "second sentence: What does basil need in the cold months?\n"
        "Answer:"
    ),
    "BoolQA": (
        "Task:BoolQA\n"
        "Dataset:BoolQA\n"
        "According to the following passage, is the question true or false? Choose one from the option.\n"
        "Option: True, False \n"
        "question: do owls sleep at night\n"
        "passage: Owl -- Most owls hunt in the dark and rest by day in hollow trees.\n"
        "Answer:"
    ),
    "MultiRC": (
        "Task:MultiRC\n"
        "Dataset:MultiRC\n"
        "According to the following passage and question, is the candidate answer true or false? Choose "
        "one from the option.\n"
        "Option: False, True \n"
        "paragraph: Mira planted beans. A week later she found two shoots, and watered them.\n"
        "question: What did Mira plant?\n"
        "candidate answer: Beans\n"
        "Answer:"
    ),
    "WiC": (
        "Task:WiC\n"
        "Dataset:WiC\n"
        "Given a word and two sentences, whether the word is used with the same sense in both sentence? "
        "Choose one from the option.\n"
        "Option: True, False \n"
        "word: bank\n"
        "The boat lay against the bank.\n"
        "She paid the cheque in at the bank.\n"
        "Answer:"
    ),
    "COPA": (
        "Task:COPA\n"
        "Dataset:COPA\n"
        'Which sentence is the effect of "The kettle boiled."? Choose one between A and B.\n'
        "A: The lid rattled.\n"
        "B: The cat slept.\n"
        "Answer:"
    ),
}

INSTRUCTIONS = json.loads(
    (Path(__file__).resolve().parents[2] / "data_prep" / "instructions.json").read_text(encoding="utf-8")
)["families"]


@pytest.mark.parametrize("name", TASKS)
def test_prompt_of_every_task(name: str) -> None:
    family, labels, sentence = TASKS[name]
    task = Task(
        name=name,
        family=family,
        labels=tuple(labels.split("|")),
        instruction=INSTRUCTIONS.get(family, ""),
        show_options=family != "COPA",
        files={},
    )
    prompt = build_prompt(task, sentence, add_task_name=True, add_dataset_name=True)
    assert prompt.text == PROMPTS[name]
