"""Which rows of each task are right after the last one: what tests that pair two runs by row need.

Kept in results.json as hexadecimal bits, the first row's first, so that runs can be paired without their predictions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from eval.run_files import predictions_path, stage_names
from eval.scoring import exact_match

Hits = npt.NDArray[np.int8]  # by row, in the order of ids: 1 right, 0 wrong


def read_hits(run_dir: Path, order: Sequence[str], score: str) -> dict[str, Hits] | None:
    """By task, the rows that are right after the last task; None where some have no predictions under this score."""
    found: dict[str, Hits] = {}
    for task in order:
        path = predictions_path(run_dir, stage_names(order)[-1], task)
        if not path.is_file():
            return None
        rows = sorted(map(json.loads, path.read_bytes().split(b"\n")[:-1]), key=lambda row: row["id"])
        if score == "label_scoring" and any(row["option"] is None for row in rows):
            return None
        found[task] = np.array([_right(row, score) for row in rows], dtype=np.int8)
    return found


def _right(row: Mapping[str, Any], score: str) -> bool:
    if score == "exact_match":
        return exact_match(row["prediction"], row["label"])
    return bool(row["option"] == row["label"])


def pack(hits: Mapping[str, Hits] | None) -> dict[str, str] | None:
    """As results.json keeps them."""
    return None if hits is None else {task: np.packbits(found).tobytes().hex() for task, found in hits.items()}


def unpack(kept: Mapping[str, str] | None, counts: Mapping[str, int]) -> dict[str, Hits] | None:
    """`pack` undone; `counts`: rows of each task."""
    if kept is None:
        return None
    bits = {task: np.frombuffer(bytes.fromhex(text), dtype=np.uint8) for task, text in kept.items()}
    return {task: np.unpackbits(found, count=counts[task]).astype(np.int8) for task, found in bits.items()}
