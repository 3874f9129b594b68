"""The memory of a projecting method: protected subspaces by the name of what they protect."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from pipeline.projection.subspace import Subspace


class SubspaceMemory:
    """Name -> Subspace. Names that read the same tensor share one subspace, kept under their leader's name."""

    def __init__(self) -> None:
        self._spaces: dict[str, Subspace] = {}
        self._leaders: dict[str, str] = {}

    def share(self, leaders: Mapping[str, str]) -> None:
        """Let each name stand for its leader: a leader's own leader is itself."""
        assert all(leaders[leader] == leader for leader in leaders.values()), "a leader leads itself"
        assert all(self.leader(name) in (name, leaders[name]) for name in leaders), "a follower changes its leader"
        assert not self._spaces.keys() & {name for name, leader in leaders.items() if name != leader}
        self._leaders.update(leaders)

    def leader(self, name: str) -> str:
        """The name under which the subspace of `name` is kept."""
        return self._leaders.get(name, name)

    def get(self, name: str, width: int) -> Subspace:
        """The subspace of `name`; the empty one of R^width where nothing is protected yet."""
        found = self._spaces.get(self.leader(name))
        if found is None:
            return Subspace.empty(width)
        assert found.width == width, f"{name}: protected in {found.width} dimensions, asked for in {width}"
        return found

    def __getitem__(self, name: str) -> Subspace:
        """The subspace of `name`, which is there."""
        return self._spaces[self.leader(name)]

    def put(self, name: str, space: Subspace) -> None:
        """Replace the subspace of `name`, and of all that share it."""
        self._spaces[self.leader(name)] = space

    def __iter__(self) -> Iterator[str]:
        """The leaders' names, in the order in which they came."""
        return iter(self._spaces)

    def __len__(self) -> int:
        return len(self._spaces)

    @property
    def bytes(self) -> int:
        """Memory of all bases."""
        return sum(space.bytes for space in self._spaces.values())

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The bases, and who shares whose; an empty basis is kept as its width."""
        tensors = {name: space.basis.cpu() for name, space in self._spaces.items() if space.rank}
        empty = {name: space.width for name, space in self._spaces.items() if not space.rank}
        return tensors, {"leaders": dict(self._leaders), "order": list(self._spaces), "empty": empty}

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`; what was there before is gone."""
        self._leaders = dict(values["leaders"])
        self._spaces = {
            name: Subspace(tensors[name].to(torch.float32))
            if name in tensors
            else Subspace.empty(values["empty"][name])
            for name in values["order"]
        }
