"""What training minimises: the negative log-likelihood of label tokens, logits formed nowhere else."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.projection.together import Together


class LabelLoss(nn.Module):
    """A backbone whose forward gives the summed negative log-likelihood of a micro-batch's label tokens.

    The sum, not the mean: the trainer divides by the label tokens of the global batch, so that the loss does not
    depend on how rows are dealt to micro-batches and ranks. Logits are formed at label positions only.
    """

    def __init__(self, backbone: nn.Module, family: str) -> None:
        super().__init__()
        self.backbone: Any = backbone
        self.family = family
        self._together = Together(backbone)

    def forward(
        self,
        input_ids: Tensor,  # [b, s]
        attention_mask: Tensor,  # [b, s]
        labels: Tensor,  # [b, l] (t5) or [b, s] (llama2), -100 where nothing is learnt
    ) -> Tensor:  # scalar, float32
        """Sum over label tokens of -log p(token)."""
        with self._together.ready():
            logits, targets, _ = self._predicted(input_ids, attention_mask, labels)
            return _summed_nll(logits, targets)

    @torch.no_grad()
    def loss_and_right(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> tuple[Tensor, int]:
        """The same sum, and the rows whose every label token is the likeliest after those before it.

        Greedy generation writes exactly these rows' labels.
        """
        with self._together.ready():
            logits, targets, rows = self._predicted(input_ids, attention_mask, labels)
        wrong = rows[(logits.argmax(dim=1) != targets) & (targets != -100)]
        return _summed_nll(logits, targets), len(labels) - len(wrong.unique())

    def _predicted(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """At n positions that hold all label tokens: logits [n, vocabulary], targets [n], and whose they are [n]."""
        if self.family == "t5":
            output = self.backbone(
                input_ids=input_ids,
                attention_mask=attention_mask,
                decoder_input_ids=self.backbone._shift_right(labels),
                use_cache=False,
            )
            rows = torch.arange(len(labels), device=labels.device).repeat_interleave(labels.shape[1])
            return output.logits.flatten(0, 1), labels.flatten(), rows
        hidden = self.backbone.model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
        targets = labels[:, 1:]
        learnt = targets != -100
        return self.backbone.lm_head(hidden[:, :-1][learnt]), targets[learnt], learnt.nonzero()[:, 0]


def _summed_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of negative log-likelihoods, in float32 or better; targets of -100 count nothing."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
