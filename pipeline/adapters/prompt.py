"""Prompt tuning: trained vectors P before the input embeddings of T5's encoder or of LLaMA (Lester et al. 2021).

Legend: b rows, s token positions, v positions of P, d width of the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.adapters.base import See, TensorProjector, Trained, install, value_of
from pipeline.adapters.forwards import inputs_seen, is_empty, rebind, with_ones


class SoftPrompt(nn.Module):
    """The trained prompt; its forward puts it before embeddings."""

    prompt_projector: TensorProjector | None

    def __init__(self, prompt: Trained, like: Tensor) -> None:
        super().__init__()
        self.prompt = install(self, "prompt", prompt, like)  # of P [v, d]

    def forward(self, embeddings: Tensor) -> Tensor:  # [b, s, d] -> [b, v + s, d]
        """`[P; embeddings]`."""
        prompt = value_of(self.prompt, self.prompt_projector)
        return torch.cat([prompt.expand(len(embeddings), -1, -1), embeddings], dim=1)


class AttachedPrompt:
    """A prompt in its place: the module `soft_prompt` of T5's encoder or of LLaMA's `model`."""

    def __init__(self, stack: nn.Module, soft_prompt: SoftPrompt, undo: list[Callable[[], None]]) -> None:
        self._stack = stack
        self._soft_prompt = soft_prompt
        self._undo = undo
        self.parameters: Mapping[str, nn.Parameter] = {"prompt": soft_prompt.prompt}

    def observe(self, see: See) -> AbstractContextManager[None]:
        """Inside, every forward tells `see` the embeddings [b, s, d] of the tokens, P left out, as `prompt`."""
        return inputs_seen(see, {"prompt": self._soft_prompt})

    def detach(self) -> None:
        """The model reads its tokens alone again."""
        for undo in self._undo:
            undo()
        del self._stack.soft_prompt


class PromptKind:
    """A prompt of `length` vectors; the one tensor `prompt` [length, d].

    Callers of the model see nothing of it: attention masks are theirs [b, s], and LLaMA's last hidden state is that
    of their tokens. Caches hold it: after a first read, LLaMA's cache is `length` positions longer than the tokens,
    T5's encoder output too.
    """

    name = "prompt"

    def __init__(self, length: int) -> None:
        self.length = length

    def starts(self, model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        """The embeddings of random tokens, drawn on the CPU from the whole vocabulary."""
        weight = _embeddings(model)
        tokens = torch.randint(len(weight), (self.length,), generator=generator)
        return {"prompt": weight.detach()[tokens.to(weight.device)].to("cpu", torch.float32, copy=True)}

    def attach(self, model: Any, trained: Mapping[str, Trained]) -> AttachedPrompt:
        """Let the encoder (T5) or the model (LLaMA) read the prompt before its tokens."""
        soft_prompt = SoftPrompt(trained["prompt"], _embeddings(model))
        if model.config.is_encoder_decoder:
            stack = model.encoder
            undo = [rebind(stack, _encode), rebind(model.decoder, _decode, self.length)]
        else:
            stack = model.model
            undo = [rebind(stack, _read)]
        soft_prompt.training = stack.training
        stack.soft_prompt = soft_prompt
        return AttachedPrompt(stack, soft_prompt, undo)

    def space_of(self, tensor: str) -> str:
        """The prompt stands among the token embeddings."""
        assert tensor == "prompt"
        return tensor


def _encode(
    encoder: Any,
    forward: Callable[..., Any],
    input_ids: Tensor | None = None,  # [b, s]
    attention_mask: Tensor | None = None,  # [b, s]
    inputs_embeds: Tensor | None = None,  # [b, s, d]
    **others: Any,
) -> Any:
    """T5's encoder over `[P; tokens]`; its output is [b, v + s, d]."""
    embeddings = encoder.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
    prompted = encoder.soft_prompt(embeddings)
    mask = with_ones(attention_mask, prompted.shape[1] - embeddings.shape[1])
    return forward(inputs_embeds=prompted, attention_mask=mask, **others)


def _decode(
    _: Any,
    forward: Callable[..., Any],
    length: int,
    encoder_hidden_states: Tensor | None = None,  # [b, v + s, d]
    encoder_attention_mask: Tensor | None = None,  # [b, s], as the caller knows the tokens; or [b, v + s]
    **others: Any,
) -> Any:
    """T5's decoder, whose cross-attention sees the encoder's prompt positions."""
    if encoder_attention_mask is not None and encoder_hidden_states is not None:
        missing = encoder_hidden_states.shape[1] - encoder_attention_mask.shape[1]
        assert missing in (0, length), (encoder_hidden_states.shape, encoder_attention_mask.shape)
        encoder_attention_mask = with_ones(encoder_attention_mask, missing)
    return forward(
        encoder_hidden_states=encoder_hidden_states,
        encoder_attention_mask=encoder_attention_mask,
        **others,
    )


def _read(
    stack: Any,
    forward: Callable[..., Any],
    input_ids: Tensor | None = None,  # [b, s]
    attention_mask: Tensor | None = None,  # [b, s]
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,  # [b, s, d]
    **others: Any,
) -> Any:
    """LLaMA over `[P; tokens]`, the last hidden state of the tokens alone; plain LLaMA where the cache is filled."""
    if not is_empty(past_key_values):
        return forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **others,
        )
    assert position_ids is None, "positions follow from the prompt"
    embeddings = stack.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
    prompted = stack.soft_prompt(embeddings)
    length = prompted.shape[1] - embeddings.shape[1]
    mask = with_ones(attention_mask, length)
    output = forward(inputs_embeds=prompted, attention_mask=mask, past_key_values=past_key_values, **others)
    return dataclasses.replace(output, last_hidden_state=output.last_hidden_state[:, length:])


def _embeddings(model: Any) -> Tensor:
    weight: Tensor = model.get_input_embeddings().weight  # [vocabulary, d]
    return weight
