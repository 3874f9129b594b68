"""projection.memory: who shares whose subspace, and the way through files and back."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.projection.memory import SubspaceMemory
from pipeline.projection.subspace import Subspace


def grown(width: int, rank: int, seed: int = 0) -> Subspace:
    R = torch.randn(width, rank, generator=torch.Generator().manual_seed(seed))
    return Subspace.empty(width).extended(R=R, energy=1.0)


def through_files(memory: SubspaceMemory, folder: Path) -> SubspaceMemory:
    tensors, values = memory.state_dict()
    save_file(tensors, folder / "memory.safetensors")
    (folder / "memory.json").write_text(json.dumps(values, sort_keys=True))
    again = SubspaceMemory()
    again.put("what was there before", grown(4, 2))
    again.load_state_dict(load_file(folder / "memory.safetensors"), json.loads((folder / "memory.json").read_text()))
    return again


def test_unknown_names_stand_for_themselves_and_protect_nothing() -> None:
    memory = SubspaceMemory()
    assert memory.leader("q") == "q"
    assert memory.get("q", 7).basis.shape == (7, 0)
    assert (len(memory), list(memory), memory.bytes) == (0, [], 0)


def test_names_that_share_see_one_subspace() -> None:
    memory = SubspaceMemory()
    memory.share({"q": "q", "k": "q", "v": "q", "o": "o"})
    one, other = grown(6, 2, seed=1), grown(6, 3, seed=2)
    memory.put("v", one)
    assert memory.get("q", 6) is memory.get("k", 6) is memory.get("v", 6) is one
    assert memory.get("o", 6).rank == 0
    memory.put("o", other)
    memory.put("k", other)
    assert memory.get("q", 6) is other
    assert list(memory) == ["q", "o"]
    assert [memory.leader(name) for name in "qkvo"] == ["q", "q", "q", "o"]
    assert memory["q"] is memory["v"] is other
    with pytest.raises(KeyError):
        memory["unknown"]


def test_bytes_count_each_subspace_once() -> None:
    memory = SubspaceMemory()
    memory.share({"q": "q", "k": "q"})
    memory.put("q", grown(6, 2))
    memory.put("k", grown(6, 3))
    memory.put("o", Subspace.empty(5))
    assert memory.bytes == 6 * 3 * 4


def test_sharing_again_adds_names_and_keeps_the_old() -> None:
    memory = SubspaceMemory()
    memory.share({"q": "q", "k": "q"})
    memory.put("q", grown(6, 2))
    memory.share({"q": "q", "k": "q"})
    memory.share({"q": "q", "v": "q"})
    assert memory.get("v", 6).rank == memory.get("k", 6).rank == 2


@pytest.mark.parametrize(
    "leaders",
    [
        {"a": "a", "b": "a", "c": "b"},  # a leader that follows
        {"q": "a", "a": "a"},  # would hide what is kept under q
        {"k": "k", "q": "q"},  # k would lose what q protects for it
    ],
)
def test_sharing_that_would_lose_a_subspace_is_refused(leaders: dict[str, str]) -> None:
    memory = SubspaceMemory()
    memory.share({"q": "q", "k": "q"})
    memory.put("k", grown(6, 2))
    with pytest.raises(AssertionError):
        memory.share(leaders)


def test_another_width_is_refused() -> None:
    memory = SubspaceMemory()
    memory.share({"q": "q", "k": "q"})
    memory.put("q", grown(6, 2))
    memory.put("o", Subspace.empty(5))
    for name, width in (("q", 7), ("k", 7), ("o", 6)):
        with pytest.raises(AssertionError, match=f"{name}: protected in"):
            memory.get(name, width)


def test_round_trip_through_files(tmp_path: Path) -> None:
    memory = SubspaceMemory()
    memory.share({"z": "z", "b": "z", "a": "a"})
    memory.put("z", grown(6, 2, seed=1))
    memory.put("empty", Subspace.empty(5))
    memory.put("a", grown(4, 4, seed=2))
    assert set(memory.state_dict()[0]) == {"z", "a"}  # the empty one is a width, not a tensor of 0 elements
    again = through_files(memory, tmp_path)
    assert list(again) == list(memory) == ["z", "empty", "a"]
    for name, width in {"z": 6, "b": 6, "a": 4, "empty": 5}.items():
        assert torch.equal(again.get(name, width).basis, memory.get(name, width).basis)
        assert again.get(name, width).basis.dtype == torch.float32
        assert again.leader(name) == memory.leader(name)
    assert again.get("what was there before", 9).rank == 0
    assert again.bytes == memory.bytes == 4 * (6 * 2 + 4 * 4)
    assert again.state_dict()[1] == memory.state_dict()[1]
    with pytest.raises(AssertionError):
        again.get("empty", 6)


def test_round_trip_of_nothing(tmp_path: Path) -> None:
    assert len(through_files(SubspaceMemory(), tmp_path)) == 0


def test_a_tensor_that_is_missing_is_no_empty_subspace() -> None:
    memory = SubspaceMemory()
    memory.put("q", grown(6, 2))
    _, values = memory.state_dict()
    with pytest.raises(KeyError):
        SubspaceMemory().load_state_dict({}, values)
