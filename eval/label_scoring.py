"""Scores every option of a task against one reading of the prompt.

The options' tokens form a tree (options that begin alike share its branches), which the model reads in one
forward after the prompt's cache: each node sees the prompt, its ancestors and itself. So the prompt is never
read twice and its cache never copied.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eval.prompt_state import PromptState

# Logits of one forward, 256 MiB in float32; more options than that are scored in several forwards.
LOGITS_PER_FORWARD = 2**26


@dataclass(frozen=True)
class OptionTree:
    """The options `first .. first + count - 1` as a tree of token positions.

    A node is a token after which something is still to be predicted, so the last token of an option (EOS) is
    none. Each option is a list of (node or -1 for the prompt's end, token predicted there).
    """

    tokens: tuple[int, ...]
    depths: tuple[int, ...]
    parents: tuple[int, ...]  # -1: the prompt's end
    options: tuple[tuple[tuple[int, int], ...], ...]

    def visible(self) -> Tensor:
        """Which node sees which: `(q, q)`, ancestors and itself. Parents stand before their children."""
        seen = torch.eye(len(self.tokens), dtype=torch.bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                seen[node] |= seen[parent]
        return seen


def option_trees(label_ids: Sequence[Sequence[int]], *, max_nodes: int) -> list[OptionTree]:
    """The options in order, in as few trees as `max_nodes` allows (one option is never split)."""
    trees: list[OptionTree] = []
    group: list[Sequence[int]] = []
    for option in label_ids:
        if group and len(_tree([*group, option]).tokens) > max_nodes:
            trees.append(_tree(group))
            group = []
        group.append(option)
    return [*trees, _tree(group)] if group else trees


def _tree(options: Sequence[Sequence[int]]) -> OptionTree:
    nodes: dict[tuple[int, ...], int] = {(): -1}
    tokens: list[int] = []
    depths: list[int] = []
    parents: list[int] = []
    paths: list[tuple[tuple[int, int], ...]] = []
    for option in options:
        assert option, "an option has at least its EOS"
        for length in range(1, len(option)):
            prefix = tuple(option[:length])
            if prefix not in nodes:
                nodes[prefix] = len(tokens)
                tokens.append(prefix[-1])
                depths.append(length - 1)
                parents.append(nodes[prefix[:-1]])
        paths.append(tuple((nodes[tuple(option[:at])], option[at]) for at in range(len(option))))
    return OptionTree(tuple(tokens), tuple(depths), tuple(parents), tuple(paths))


def score_options(state: PromptState, label_ids: Sequence[Sequence[int]]) -> Tensor:
    """Summed log-probability of each option, EOS included, after each prompt: `(b, options)`, float32.

    `state` is left as it was.
    """
    rows, vocabulary = state.logits.shape
    max_nodes = max(1, LOGITS_PER_FORWARD // (rows * vocabulary))
    first = state.logits[:, None].float()
    scores = []
    for tree in option_trees(label_ids, max_nodes=max_nodes):
        logits = first
        if tree.tokens:
            tokens = torch.tensor(tree.tokens, device=first.device)
            depths = torch.tensor(tree.depths, device=first.device)
            packed = state.packed_logits(tokens, depths, tree.visible().to(first.device))
            logits = torch.cat([first, packed.float()], dim=1)  # (b, 1 + nodes, V): the prompt's end first
        scores.append(_path_scores(logits, tree))
    return torch.cat(scores, dim=1)


def _path_scores(logits: Tensor, tree: OptionTree) -> Tensor:
    """The log-probabilities along each option's path, summed: `(b, options of the tree)`."""
    steps = [(node + 1, token) for path in tree.options for node, token in path]
    owners = [option for option, path in enumerate(tree.options) for _ in path]
    places, tokens = torch.tensor(steps, device=logits.device).T
    # log softmax at the wanted tokens alone
    chosen = logits[:, places, tokens] - logits.logsumexp(dim=-1)[:, places]  # (b, steps)
    totals = logits.new_zeros(len(logits), len(tree.options))
    return totals.index_add_(1, torch.tensor(owners, device=logits.device), chosen)
