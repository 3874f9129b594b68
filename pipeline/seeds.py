"""All randomness comes from the recipe's seed: named seeds derived from it, the same on every rank and machine."""

import hashlib

import torch


def derive_seed(seed: int, *purpose: int | str) -> int:
    """A 63-bit seed for one purpose, such as `derive_seed(42, "dropout", task, step, micro_batch)`."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *purpose: int | str) -> torch.Generator:
    """A CPU generator at `derive_seed(seed, *purpose)`."""
    return torch.Generator().manual_seed(derive_seed(seed, *purpose))
