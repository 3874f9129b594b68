"""Backbones: the loss over label tokens, what is refused, fingerprints, tokenizers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from random_backbones import PAD, random_examples
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

from data_prep.batches import collate, count_label_tokens
from data_prep.errors import UserError
from pipeline.checkpoints import backbone_folder, fingerprint
from pipeline.label_loss import LabelLoss
from pipeline.models import load_backbone, load_tokenizer, prepare_for_training, skeleton
from pipeline.recipe import Model

FAMILIES = ("t5", "llama2")


@pytest.fixture
def folder(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the T5 folder that a test may damage, with a stand-in for the tokenizer's file."""
    copy = shutil.copytree(folders["t5"], tmp_path / "t5")
    (copy / "spiece.model").write_bytes(b"not read here")
    return copy


def differentiable(folder: Path, family: str) -> Any:
    model = load_backbone(folder, family, dtype=torch.float32)
    model.requires_grad_(True)
    return model


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padding_rows", [0, 2])
def test_loss_is_that_of_transformers_summed(folders: dict[str, Path], family: str, padding_rows: int) -> None:
    examples = random_examples(5, family)
    batch = collate([*examples, *[None] * padding_rows], family=family, pad_id=PAD)
    ours, theirs = (differentiable(folders[family], family) for _ in range(2))

    loss = LabelLoss(ours, family)(**batch)
    expected = theirs(**collate(examples, family=family, pad_id=PAD)).loss * count_label_tokens(examples)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)

    loss.backward()
    expected.backward()
    wanted = gradients(theirs)
    assert gradients(ours).keys() == wanted.keys()
    scale = max(float(value.norm()) for value in wanted.values())
    for name, value in gradients(ours).items():
        assert float((value - wanted[name]).norm()) <= 1e-5 * scale, name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_rows_alone_give_zero_and_zero_gradients(
    folders: dict[str, Path], family: str, dtype: torch.dtype
) -> None:
    model = load_backbone(folders[family], family, dtype=dtype).requires_grad_(True)
    loss = LabelLoss(model, family)(**collate([None, None, None], family=family, pad_id=PAD))
    assert loss.item() == 0
    loss.backward()  # the ranks of the other micro-batches wait for this one's
    assert all(not value.any() for value in gradients(model).values())


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_do_not_see_each_other(folders: dict[str, Path], family: str) -> None:
    module = LabelLoss(load_backbone(folders[family], family, dtype=torch.float32), family)
    examples = random_examples(6, family)

    def loss(rows: list[Any]) -> float:
        return module(**collate(rows, family=family, pad_id=PAD)).item()

    assert loss(examples) == pytest.approx(sum(loss([example]) for example in examples), rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_formed_at_label_positions_alone(folders: dict[str, Path], family: str) -> None:
    model = load_backbone(folders[family], family, dtype=torch.float32)
    shapes: list[tuple[int, ...]] = []
    model.lm_head.register_forward_hook(lambda layer, inputs, output: shapes.append(tuple(output.shape)))
    examples = random_examples(4, family)
    LabelLoss(model, family)(**collate(examples, family=family, pad_id=PAD))
    ((*positions, _),) = shapes
    longest = max(len(example.label_ids) for example in examples)
    assert positions == ([4, longest] if family == "t5" else [count_label_tokens(examples)])


def test_backbones_come_frozen_and_in_the_wanted_dtype(folders: dict[str, Path]) -> None:
    model = load_backbone(folders["t5"], "t5", dtype=torch.bfloat16)
    assert not model.training
    assert {(value.dtype, value.requires_grad) for value in model.parameters()} == {(torch.bfloat16, False)}


def test_checkpointing_is_for_training_and_where_asked(folders: dict[str, Path]) -> None:
    for wanted in (False, True):
        model: Any = load_backbone(folders["llama2"], "llama2", dtype=torch.float32)
        prepare_for_training(model, gradient_checkpointing=wanted)
        assert model.training
        assert {layer.gradient_checkpointing for layer in model.model.layers} == {wanted}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_that_share_their_masks_compute_the_same_bits(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, *, checkpointing: bool
) -> None:
    torch.manual_seed(0)
    config = T5Config.from_pretrained(folders["t5"], num_layers=3, num_decoder_layers=3, dropout_rate=0.0)
    model = T5ForConditionalGeneration(config).requires_grad_(False)
    trained = [block.layer[0].SelfAttention.v.weight for block in model.encoder.block]
    batch = collate(random_examples(4, "t5"), family="t5", pad_id=PAD)
    width, attend = batch["input_ids"].shape[1], torch.nn.functional.scaled_dot_product_attention
    masks: list[torch.Tensor] = []

    def seen(*arguments: Any, attn_mask: torch.Tensor, **others: Any) -> Any:
        if attn_mask.shape[1:] == (config.num_heads, width, width) and not any(attn_mask is mask for mask in masks):
            masks.append(attn_mask)
        return attend(*arguments, attn_mask=attn_mask, **others)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", seen)

    def run() -> tuple[int, list[torch.Tensor]]:
        masks.clear()
        for weight in trained:
            weight.requires_grad_()
        loss = LabelLoss(model, "t5")(**batch)
        return len(masks), [loss.detach(), *torch.autograd.grad(loss, trained)]

    prepare_for_training(model, gradient_checkpointing=checkpointing)
    once, found = run()
    model.set_attn_implementation("sdpa")
    each, expected = run()
    assert (once, each) == (1, 3)
    assert all(map(torch.equal, found, expected))


def settings(folder: Path, family: str = "t5", revision: str | None = None) -> Model:
    return Model(family=family, path=str(folder), revision=revision)


def test_a_whole_folder_is_taken(folder: Path) -> None:
    assert backbone_folder(settings(folder)) == folder


def test_a_folder_that_cannot_serve_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model.path: .*nowhere: no such folder"):
        backbone_folder(settings(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"model.family: llama2: .* holds a 't5' model, not 'llama'"):
        backbone_folder(settings(folder, "llama2"))
    with pytest.raises(UserError, match=r"model.revision: null: the hub id org/name needs the commit"):
        backbone_folder(settings(Path("org/name")))


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no \*.safetensors there"):
        backbone_folder(settings(folder))


def test_pickles_are_no_weights(folder: Path) -> None:
    model = load_backbone(folder, "t5", dtype=torch.float32)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"never from pickles \(\*.bin\)"):
        backbone_folder(settings(folder))
    with pytest.raises(UserError, match=r"the weights cannot be read"):
        load_backbone(folder, "t5", dtype=torch.float32)


@pytest.mark.parametrize("content", [None, "{", "[]", '{"model_type": null}'])
def test_a_damaged_config_is_refused(folder: Path, content: str | None) -> None:
    path = folder / "config.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(UserError, match=r"config.json is missing or damaged|holds a None model"):
        backbone_folder(settings(folder))


def test_a_folder_without_tokenizer_is_refused(folder: Path) -> None:
    (folder / "spiece.model").unlink()
    with pytest.raises(UserError, match=r"no tokenizer there \(spiece.model or tokenizer.json\)"):
        backbone_folder(settings(folder))


def test_torn_weights_are_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"the weights cannot be read"):
        load_backbone(folder, "t5", dtype=torch.float32)


def test_weights_that_lack_a_tensor_are_refused(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["decoder.block.0.layer.1.EncDecAttention.v.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"EncDecAttention.v.weight"):
        load_backbone(folder, "t5", dtype=torch.float32)


def test_a_shard_that_the_index_names_must_be_there(folder: Path) -> None:
    index = {"weight_map": {"shared.weight": "model-1.safetensors", "lm_head.weight": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    with pytest.raises(UserError, match=r"model-2.safetensors is missing"):
        backbone_folder(settings(folder))


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": null}', "{}"])
def test_a_damaged_index_is_refused(folder: Path, content: str) -> None:
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match=r"model.safetensors.index.json is damaged"):
        backbone_folder(settings(folder))


def test_fingerprint_follows_every_byte_that_matters(folder: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    before = fingerprint(folder)
    assert fingerprint(shutil.copytree(folder, tmp_path / "copy")) == before
    (folder / "README.md").write_text("changes nothing")
    assert fingerprint(folder) == before
    for name in ("model.safetensors", "config.json", "spiece.model"):
        path, content = folder / name, (folder / name).read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert fingerprint(folder) != before, name
        path.write_bytes(content)
    assert fingerprint(folder) == before


def test_llama_tokenizer_pads_with_unk(model_dir: Path) -> None:
    folder = next(path.parent for path in sorted(model_dir.glob("*llama*/tokenizer.model")))
    tokenizer = load_tokenizer(folder, "llama2")
    assert tokenizer.pad_token == tokenizer.unk_token == "<unk>"
    assert tokenizer.pad_token_id == tokenizer.unk_token_id == 0
    assert tokenizer.pad_token_id not in (tokenizer.bos_token_id, tokenizer.eos_token_id)


def test_t5_tokenizer_keeps_its_own_padding(model_dir: Path) -> None:
    folder = next(path.parent for path in sorted(model_dir.glob("*t5*/spiece.model")))
    tokenizer = load_tokenizer(folder, "t5")
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<pad>", 0)


def test_a_checkpoint_that_was_saved_quantized_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["t5"], tmp_path / "packed")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="has a quantization_config"):
        skeleton(folder, "t5")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_damaged_tokenizer_is_refused(tmp_path: Path, family: str) -> None:
    (tmp_path / ("spiece.model" if family == "t5" else "tokenizer.model")).write_bytes(b"no sentencepiece model")
    with pytest.raises(UserError, match=r"model.path: .*: the tokenizer cannot be read"):
        load_tokenizer(tmp_path, family)
