"""What bottleneck, prompt and prefix show of a forward, against values recomputed from the modules' inputs."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from module_adapter_cases import (
    FAMILIES,
    LENGTH,
    attached,
    attentions_of,
    backbone,
    blocks_of,
    inputs_of,
    kind_of,
    random_tensors,
)
from torch import Tensor

families = pytest.mark.parametrize("family", FAMILIES)


def seen_in(model: Any, adapter: Any, inputs: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    seen: dict[str, list[Tensor]] = defaultdict(list)
    with torch.no_grad():
        bare = model(**inputs).logits
        with adapter.observe(lambda space, x: seen[space].append(x)):
            assert torch.equal(model(**inputs).logits, bare)
        count = sum(len(found) for found in seen.values())
        assert torch.equal(model(**inputs).logits, bare)
    assert sum(len(found) for found in seen.values()) == count, "nothing is seen outside"
    return seen


def inputs_to(model: Any, names: list[str], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The first input of each named module."""
    found: dict[str, Tensor] = {}

    def hook(name: str, arguments: tuple[Any, ...], others: dict[str, Any]) -> None:
        found[name] = arguments[0] if arguments else others["hidden_states"]

    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, arguments, others, name=name: hook(name, arguments, others), with_kwargs=True
        )
        for name in names
    ]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return found


@families
def test_bottlenecks_show_the_blocks_outputs_and_their_own_units(family: str) -> None:
    model, inputs, kind = backbone(family), inputs_of(family), kind_of("bottleneck", family)
    tensors = random_tensors(kind, model)
    with attached(kind, model, tensors) as adapter:
        seen = seen_in(model, adapter, inputs)
        blocks = blocks_of(family)
        block_inputs = inputs_to(model, blocks, inputs)
        assert set(seen) == {kind.space_of(name) for name in tensors}
        for block in blocks:
            with torch.no_grad():
                y = model.get_submodule(block).base(block_inputs[block])
            torch.testing.assert_close(seen[kind.space_of(f"{block}.down")], [y], rtol=1e-6, atol=1e-6)
            mid = F.relu(y @ tensors[f"{block}.down"].T)
            torch.testing.assert_close(seen[kind.space_of(f"{block}.up")], [mid], rtol=1e-5, atol=1e-5)


@families
def test_a_prompt_shows_the_token_embeddings_without_itself(family: str) -> None:
    model, inputs, kind = backbone(family), inputs_of(family), kind_of("prompt", family)
    with attached(kind, model, random_tensors(kind, model)) as adapter:
        seen = seen_in(model, adapter, inputs)
    assert set(seen) == {kind.space_of("prompt")} == {"prompt"}
    (embeddings,) = seen["prompt"]
    assert torch.equal(embeddings, model.get_input_embeddings().weight[inputs["input_ids"]])


def rotated(x: Tensor, first: int) -> Tensor:
    """Rotary embedding (RoFormer, eq. 34, with LLaMA's order of coordinates) of x [b, s, c] at first, first + 1, ..."""
    half = x.shape[-1] // 2
    angles = torch.arange(first, first + x.shape[1])[:, None] * 10000.0 ** (-torch.arange(half) / half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=-1)


@families
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_prefix_shows_the_queries_that_meet_it(family: str, attention: str) -> None:
    model, inputs, kind = backbone(family), inputs_of(family), kind_of("prefix", family)
    model.set_attn_implementation(attention)
    tensors = random_tensors(kind, model)
    with attached(kind, model, tensors) as adapter:
        seen = seen_in(model, adapter, inputs)
        assert set(seen) == set(attentions_of(family)) == {kind.space_of(name) for name in tensors}
        for name, x in inputs_to(model, attentions_of(family), inputs).items():
            module = model.get_submodule(name)
            if family == "t5":
                want = [(x @ module.q.weight.T).unflatten(-1, (3, 5))]
            else:
                # Four query heads on two key heads: heads 0 and 2 are the first of their groups, 1 and 3 the second.
                heads = [x @ module.q_proj.weight[6 * head : 6 * head + 6].T for head in range(4)]
                turned = [rotated(head, LENGTH["prefix"]) for head in heads]
                want = [torch.stack([turned[0], turned[2]], dim=2), torch.stack([turned[1], turned[3]], dim=2)]
            torch.testing.assert_close(seen[name], want, rtol=1e-5, atol=1e-5)
    assert model.config._attn_implementation == attention
