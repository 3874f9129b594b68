"""What GORP refuses, and which keys its literal mode sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from one_rank import new_method
from random_backbones import save_backbone
from torch import nn

from data_prep.errors import UserError
from pipeline.adapter_kinds import adapter_kind
from pipeline.layers import full_rank_modules
from pipeline.memory_estimate import full_rank_bytes_on_host
from pipeline.models import load_backbone
from pipeline.recipe import Gorp, LoraAdapter, Recipe

RECIPE = "recipes/tiny_t5_order1.yaml"
ADAPTER = LoraAdapter(rank=3, alpha=6, dropout=0.0)
SMALL: dict[str, Any] = {"core_rank": 4, "refresh_every": 4, "full_rank_lr": 1e-3}
# Of layers that may be full-rank: not the head.
ENDS = "ends of names such as down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj, or [] for none"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_backbone(tmp_path_factory.mktemp("backbones") / "llama2", "llama2")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"full_rank_modules": ["lm_head"]}, "lm_head is the output head or shares its weight"),
        ({"full_rank_modules": ["gate"]}, "'gate' ends no linear layer's name in this model; legal are " + ENDS),
        ({"core_rank": 16}, "method.core_rank: 16, but model.layers.0.mlp.gate_proj has 15 directions"),
        ({"full_rank_modules": ["q_proj", "v_proj"]}, "none is left for LoRA"),
    ],
)
def test_wrong_settings_are_told(folder: Path, settings: Any, words: str) -> None:
    with pytest.raises(UserError) as caught:
        new_method(folder, "llama2", "gorp", ADAPTER, **(SMALL | settings))
    assert words in str(caught.value)
    assert str(caught.value).startswith(("method.", "adapter."))


def test_a_tied_weight_is_refused(folder: Path) -> None:
    model = load_backbone(folder, "llama2", dtype=torch.float32)
    model.model.layers[1].mlp.gate_proj.weight = model.model.layers[0].mlp.gate_proj.weight
    settings = Gorp.model_validate({"name": "gorp"} | SMALL)
    with pytest.raises(UserError, match="shares its weight with another module"):
        adapter_kind(ADAPTER, model, "llama2", settings)


def test_the_plan_counts_what_full_rank_weights_take_on_the_host(folder: Path) -> None:
    model = load_backbone(folder, "llama2", dtype=torch.float32)
    settings = Gorp.model_validate({"name": "gorp"} | SMALL)
    kind = adapter_kind(ADAPTER, model, "llama2", settings)
    copies, float32, gates = 2, 4, 2 * 20 * 15
    assert full_rank_bytes_on_host(kind, model) == copies * float32 * gates
    assert full_rank_bytes_on_host(adapter_kind(ADAPTER, model, "llama2"), model) == 0


def test_a_quantized_weight_is_refused(folder: Path) -> None:
    model = load_backbone(folder, "llama2", dtype=torch.float32)
    layer = "model.layers.1.mlp.gate_proj"
    model.get_submodule(layer).weight = nn.Parameter(torch.zeros(20, 15, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UserError) as caught:
        full_rank_modules(model, "llama2", None)
    assert f"method.full_rank_modules: {layer} is quantized" in str(caught.value)
    assert full_rank_modules(model, "llama2", []) == []


@pytest.mark.parametrize(
    ("keys", "words", "mended"),
    [
        (
            ["mode=literal", "gradient_space=hidden_features"],
            "gradient_space: hidden_features has no literal form",
            ["mode=literal", "gradient_space=mean_gradient"],
        ),
        (["full_rank_modules=[]"], "full_rank_modules: none, but parts B+L+S trains them", ["parts=B+S"]),
        (["full_rank_modules=[]", "parts=B+L"], "full_rank_modules: none, but parts B+L trains them", ["parts=B"]),
    ],
    ids=["literal features", "no modules", "no modules, no S"],
)
def test_keys_that_contradict_each_other_are_told(keys: list[str], words: str, mended: list[str]) -> None:
    overrides = ["method=gorp", *(f"method.{key}" for key in keys)]
    with pytest.raises(UserError) as caught:
        Recipe.load(RECIPE, overrides)
    assert words in str(caught.value)
    assert Recipe.load(RECIPE, [*overrides, *(f"method.{key}" for key in mended)]).method.name == "gorp"


def test_other_adapters_are_refused() -> None:
    for kind in ("bottleneck", "prompt", "prefix"):
        with pytest.raises(UserError, match="has no place in gorp"):
            Recipe.load(RECIPE, ["method=gorp", f"adapter={kind}"])


def test_literal_mode_is_the_papers_form() -> None:
    literal = Gorp.model_validate({"name": "gorp", "mode": "literal"})
    assert (literal.project, literal.project_b, literal.refresh_moments) == ("gradient", False, "keep")
    assert (
        Gorp.model_validate({"name": "gorp", "mode": "literal", "refresh_moments": "reset"}).refresh_moments == "reset"
    )
