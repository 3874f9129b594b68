"""What a run's `metrics.jsonl` tells of training, subspaces and sensitivities, by task."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

Curve = list[tuple[float, float]]


@dataclass
class RunEvents:
    """The events that a report draws; everything is empty where a run has no such thing."""

    loss: dict[str, Curve] = field(default_factory=dict)  # task -> (step of the stream, loss per label token)
    spaces: dict[str, dict[int, tuple[int, int]]] = field(default_factory=dict)  # space -> task -> (rank, width)
    drift: dict[tuple[int, int], list[float]] = field(default_factory=dict)  # (after task t, of task i) -> shares
    peak_bytes: dict[str, dict[str, int]] = field(default_factory=dict)  # task -> part -> most memory of a rank in it
    sensitivity: dict[int, dict[str, tuple[float, float]]] = field(default_factory=dict)  # task -> layer -> (S, Fisher)
    jumps: dict[int, list[dict[str, Any]]] = field(default_factory=dict)  # task -> the loss before training, by rows

    def occupied(self) -> dict[int, float]:
        """After each task, the percentage of all directions that is protected."""
        found: dict[int, list[tuple[int, int]]] = {}
        for tasks in self.spaces.values():
            for task, sizes in tasks.items():
                found.setdefault(task, []).append(sizes)
        return {
            task: 100 * sum(rank for rank, _ in sizes) / sum(width for _, width in sizes)
            for task, sizes in sorted(found.items())
        }

    def feature_shares(self) -> dict[tuple[int, int], float]:
        """(after task t, of task i) -> percentage of what task i's layers read now that task i's spaces hold."""
        return {place: 100 * fmean(shares) for place, shares in sorted(self.drift.items())}


def read_events(run_dir: Path) -> RunEvents:
    """The events of a run; what cannot be read as an event is left out, since scores do not hang on it."""
    events = RunEvents()
    path = run_dir / "metrics.jsonl"
    done = 0  # optimizer steps of earlier tasks
    last: str | None = None
    for line in path.read_bytes().split(b"\n") if path.is_file() else []:
        try:
            event = json.loads(line)
            match event["event"]:
                case "step" if event["loss"] is not None:
                    if event["task"] != last:
                        done, last = sum(len(curve) for curve in events.loss.values()), event["task"]
                    events.loss.setdefault(event["task"], []).append((done + event["step"], event["loss"]))
                case "task" | "memory" if "peak_bytes" in event:
                    _add_peaks(events.peak_bytes.setdefault(event["task"], {}), event)
                case "subspace":
                    _add(events, event)
        except (ValueError, KeyError, TypeError):
            continue
    return events


def _add(events: RunEvents, event: dict[str, object]) -> None:
    task = event["task_index"]
    assert isinstance(task, int)
    match event:
        case {"space": str(space), "rank": int(rank), "width": int(width)}:
            events.spaces.setdefault(space, {})[task] = rank, width
        case {"space": _, "drift_of": int(old), "share": float(share)}:
            events.drift.setdefault((task, old), []).append(share)
        case {"sensitivity_of": str(layer), "mean": float(mean), "fisher": float(fisher)}:
            events.sensitivity.setdefault(task, {})[layer] = mean, fisher
        case {"jump_on": str(), "rows": int(), "loss_at_random": float(), "loss_injected": float()}:
            events.jumps.setdefault(task, []).append(dict(event))


def _add_peaks(peaks: dict[str, int], event: dict[str, Any]) -> None:
    """Of a task's parts, or of its scoring; runs of earlier releases tell of all parts of a task at once."""
    found = event.get("peak_bytes_by_part") or {event.get("part", "train"): event["peak_bytes"]}
    for part, size in found.items():
        peaks[part] = max(peaks.get(part, 0), int(size))


def thinned(curve: Curve, most: int) -> Curve:
    """At most `most` points: means of equal runs of points."""
    size = -(-len(curve) // most)
    parts: Sequence[Curve] = [curve[start : start + size] for start in range(0, len(curve), size)]
    return [(part[-1][0], fmean(y for _, y in part)) for part in parts]
