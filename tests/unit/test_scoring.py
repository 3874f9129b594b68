"""eval.scoring: what counts as a match, and that early stopping never changes a score."""

import itertools
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.scoring import PrefixAutomaton, exact_match, normalise

LABEL_SETS = (
    ("very negative", "negative", "neutral", "positive", "very positive"),
    ("World", "Sports", "Business", "Science or Technology"),
    ("Society & Culture", "Family & Relationships", "Company"),
    ("A", "B"),
    ("a b", "a bc", "ab"),
    ("-", "ok"),
    ("İzmir", "ΑΣ ΔΣΑ", "Straße"),
)
# Few characters, so that random texts meet labels, and all that the normal form treats in its own way.
ALPHABET = "abcvernygti ABVN.,&-'\t\n\u00a0\u2028\ufffdİΣς\u03c3ß"


def reference_normalise(text: str) -> str:
    """Character by character, from the words of the definition."""
    out = ""
    for character in text.lower():
        if character in string.punctuation:
            continue
        if character.isspace():
            out += "" if out.endswith(" ") else " "
        else:
            out += character
    return out.strip(" ")


def texts_near(labels: tuple[str, ...]) -> st.SearchStrategy[str]:
    """Random texts, and labels cut anywhere with case, punctuation and white space disturbed."""
    noise = st.text(ALPHABET, max_size=3)
    cut = st.builds(
        lambda label, end, change: change(label[:end]),
        st.sampled_from(labels),
        st.integers(0, 25),
        st.sampled_from([str, str.upper, str.lower, lambda text: text.replace(" ", " . ")]),
    )
    return st.one_of(st.text(ALPHABET, max_size=6), st.builds(lambda a, b, c: a + b + c, noise, cut, noise))


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("World", "world"),
        ("  Science or\tTechnology.\n", "science or technology"),
        ("Society & Culture", "society culture"),
        ("don't", "dont"),
        ("very-negative", "verynegative"),
        ("a - b", "a b"),
        (string.punctuation, ""),
        ("“very” — negative", "“very” — negative"),  # only ASCII punctuation goes
        ("ÉCOLE\u00a0un", "école un"),
    ],
)
def test_normalise(text: str, normal: str) -> None:
    assert normalise(text) == normal


@given(st.text(max_size=20) | st.text(ALPHABET, max_size=20))
def test_normalise_is_its_definition(text: str) -> None:
    assert normalise(text) == reference_normalise(text)


def test_exact_match_compares_whole_normalised_strings() -> None:
    assert exact_match(" science OR technology.", "Science or Technology")
    assert not exact_match("Science", "Science or Technology")
    assert not exact_match("very negative indeed", "very negative")
    assert not exact_match("", "A")


@pytest.mark.parametrize("prediction", ["", "-", " . ", "neutral"])
def test_nothing_matches_a_label_without_letters(prediction: str) -> None:
    assert not exact_match(prediction, "-")


@pytest.mark.parametrize(
    ("text", "alive"),
    [
        ("", True),
        (" \n", True),
        ("...", True),
        ("sci", True),
        ("Science or Tech", True),
        ("World", True),
        ("world  .", True),
        ("worldx", False),
        ("world x", False),
        ("wor ld", False),  # the space is there for good
        ("wor.ld", True),  # the stop is not
        ("wor. ", False),
        ("science ", True),
        ("science  o", True),
        ("scienceo", False),
        ("science or technology s", False),
        ("tech", False),  # the end of a label
        ("w\ufffd", True),  # half of a character: nothing is known yet
        ("x\ufffd", False),
    ],
)
def test_can_continue(text: str, alive: bool) -> None:
    assert PrefixAutomaton(("World", "Sports", "Business", "Science or Technology")).can_continue(text) is alive


def test_a_label_without_letters_keeps_nothing_alive() -> None:
    assert not PrefixAutomaton(("-",)).can_continue("")
    assert not PrefixAutomaton(("-", "ok")).can_continue("-x")


@settings(max_examples=600, deadline=None)
@given(st.sampled_from(LABEL_SETS), st.data())
def test_a_dead_text_never_comes_to_match(labels: tuple[str, ...], data: st.DataObject) -> None:
    text = data.draw(texts_near(labels))
    if PrefixAutomaton(labels).can_continue(text):
        return
    # What a tokenizer shows of an unfinished character is replaced, not extended: such a tail may vanish.
    for start in {text, text.rstrip("\ufffd")}:
        tails = [label[cut:] for label in labels for cut in range(len(label) + 1)]
        tails += [" " + tail for tail in tails] + [tail.lower() for tail in tails] + [data.draw(st.text(ALPHABET))]
        for tail, label in itertools.product(tails, labels):
            assert not exact_match(start + tail, label)


@settings(max_examples=600, deadline=None)
@given(st.sampled_from(LABEL_SETS[:-1]), st.data())
def test_a_living_text_has_a_continuation_that_matches(labels: tuple[str, ...], data: st.DataObject) -> None:
    text = data.draw(texts_near(labels)).rstrip("\ufffd")
    alive = PrefixAutomaton(labels).can_continue(text)
    tails = [normalise(label)[cut:] for label in labels for cut in range(len(label) + 1)]
    found = any(exact_match(text + tail, label) for tail in tails for label in labels)
    assert alive is found


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(LABEL_SETS), st.data())
def test_stopping_early_changes_no_score(labels: tuple[str, ...], data: st.DataObject) -> None:
    """Read a text piece by piece, stop where the automaton says so: the same match as the whole text."""
    automaton = PrefixAutomaton(labels)
    pieces = data.draw(st.lists(texts_near(labels), max_size=4))
    whole = "".join(pieces)
    text = ""
    for piece in pieces:
        text += piece
        if not automaton.can_continue(text):
            break
    for label in labels:
        assert exact_match(text, label) is exact_match(whole, label)
