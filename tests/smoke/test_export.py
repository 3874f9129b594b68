"""The export of a finished run, as the user types it."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import ROOT, run
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from pipeline.checkpoints import backbone_folder
from pipeline.models import load_tokenizer
from pipeline.recipe import Recipe


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        output = model.eval()(input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([[0, 5, 9]]))
    values: torch.Tensor = output.logits
    return values


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


# PEFT 0.21.2 asks transformers 5.23 by the old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_and_a_merged_folder_say_the_same(reference: Path, tmp_path: Path) -> None:
    backbone = backbone_folder(Recipe.load_resolved(reference / "recipe.yaml").model)
    question = "Which group does the text belong to?  It rained."
    ids = load_tokenizer(backbone, "t5")(question).input_ids
    said = []
    for out, form in ((tmp_path / "adapter", []), (tmp_path / "merged", ["--merged"])):
        done = run([sys.executable, "-m", "pipeline.export", str(reference), "--out", str(out), *form], cwd=ROOT)
        assert done.returncode == 0, done.stderr[-3000:]
        told, line = done.stdout.splitlines()[-2:]  # DeepSpeed, where PEFT loads it, tells its device there first
        assert told == f"exported: {out}"
        names: dict[str, Any] = {}
        exec(line, names)
        said.append(logits(names["model"], ids))
    adapter, merged = said
    assert relative(adapter, merged) <= 1e-5
    assert relative(logits(AutoModelForSeq2SeqLM.from_pretrained(backbone), ids), merged) > 1e-3
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")(question).input_ids == ids

    again = run([sys.executable, "-m", "pipeline.export", str(reference), "--out", str(tmp_path / "merged")], cwd=ROOT)
    assert again.returncode == 2
    assert "exists already" in again.stderr
    assert "Traceback" not in again.stderr
