"""eval.references: runs of one model a task that another run is measured against, and what is refused as one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.errors import UserError
from eval.references import read_references, single_task_scores

FACTS: dict[str, Any] = {
    "order": ["colours", "tools"],
    "model": {"fingerprint": "f" * 64},
    "settings": {
        "split": "test",
        "decoding": "greedy",
        "add_task_name": True,
        "add_dataset_name": True,
        "max_source_tokens": 64,
        "truncation": "passage",
    },
    "data": {
        task: {"train_fingerprint": "a" * 64, "evaluation_fingerprint": "b" * 64} for task in ("colours", "tools")
    },
}


def reference(folder: Path, **changes: Any) -> str:
    """A finished run of `pertask` on tools and one more task."""
    results: dict[str, Any] = {
        "method": "pertask",
        "seed": 7,
        "order": ["tools", "weather"],
        "model": FACTS["model"],
        "settings": FACTS["settings"],
        "data_fingerprints": {task: {"train": "a" * 64, "evaluation": "b" * 64} for task in ("tools", "weather")},
        "matrix": {"exact_match": [[70.0, None], [70.0, 55.0]], "label_scoring": [[80.0, None], [80.0, None]]},
    }
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(results | changes))
    return str(folder)


def test_the_diagonal_is_what_a_model_alone_reaches(tmp_path: Path) -> None:
    folders = [
        reference(tmp_path / "first"),
        reference(
            tmp_path / "second", matrix={"exact_match": [[60.0, 1.0], [2.0, 3.0]], "label_scoring": [[None] * 2] * 2}
        ),
    ]
    found = read_references(folders, FACTS)
    assert [(one["run"], one["seed"]) for one in found] == [(folder, 7) for folder in folders]
    assert single_task_scores(found, "tools", "exact_match") == [70.0, 60.0]
    assert single_task_scores(found, "tools", "label_scoring") == [80.0]
    assert single_task_scores(found, "weather", "exact_match") == [55.0, 3.0]
    assert single_task_scores(found, "colours", "exact_match") == []
    assert read_references([], FACTS) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "inclora"}, "a run of inclora; a reference has method pertask or mtl"),
        ({"model": {"fingerprint": "e" * 64}}, "its backbone is another one (eeeeeeeeeeee, here ffffffffffff)"),
        ({"settings": FACTS["settings"] | {"split": "validation"}}, "its split is 'validation', here 'test'"),
        ({"settings": FACTS["settings"] | {"max_source_tokens": 32}}, "its max_source_tokens is 32, here 64"),
        (
            {"data_fingerprints": {"tools": {"train": "a" * 64, "evaluation": "c" * 64}}},
            "its evaluation rows of tools are others than this run's",
        ),
        (
            {"data_fingerprints": {"tools": {"train": "c" * 64, "evaluation": "b" * 64}}},
            "its train rows of tools are others than this run's",
        ),
        ({"data_fingerprints": {"weather": {}}}, "none of this run's tasks; it has tools, weather"),
    ],
)
def test_what_is_no_reference_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    folder = reference(tmp_path / "run", **changes)
    with pytest.raises(UserError) as caught:
        read_references([folder], FACTS)
    assert str(caught.value) == f"evaluation.references: {folder}: {words}"


def test_a_missing_or_damaged_reference_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"no results.json there; give the folder of a finished run of method pertask or mtl"
    ):
        read_references([str(tmp_path)], FACTS)
    damaged = reference(tmp_path / "run", matrix=None)
    with pytest.raises(UserError, match=r"results.json: damaged .* rebuild it: python -m eval"):
        read_references([damaged], FACTS)


def test_a_quantized_backbone_is_another_one(tmp_path: Path) -> None:
    folder = reference(tmp_path / "run", model=FACTS["model"] | {"quantization": "nf4"})
    with pytest.raises(UserError, match="its backbone's quantization is nf4, here none"):
        read_references([folder], FACTS)
