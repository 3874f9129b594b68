"""Two ways of doing the same work, timed in turns: ratios, their interval, a verdict, a table, a JSON file."""

from __future__ import annotations

import gc
import json
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
RESAMPLES = 4000
FEWEST_PAIRS = 8  # an interval of fewer says little
Work = Callable[[int], object]  # given the number of the pair, so that both do the same
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Ratio:
    """A ratio of two times, with a bootstrap 95 % interval of its median."""

    name: str
    pairs: int
    first_ms: float  # medians
    second_ms: float
    ratio: float  # the median of the pairs' ratios, processor time
    low: float
    high: float
    wall_ratio: float  # the same of the time on the clock, which other programs stretch
    wall_low: float
    wall_high: float
    goal: float | None = None

    @property
    def verdict(self) -> str:
        """Met or missed where the whole interval is; inconclusive where it spans the goal, or comes from few pairs."""
        if self.goal is None:
            return "no goal"
        if self.pairs < FEWEST_PAIRS:
            return "inconclusive"
        return "met" if self.high <= self.goal else "missed" if self.low > self.goal else "inconclusive"


@dataclass
class Report:
    """What has been measured so far; printed as it comes."""

    ratios: list[Ratio] = field(default_factory=list)
    stated: dict[str, Any] = field(default_factory=dict)

    def add(self, found: Ratio) -> None:
        """Keep and print a ratio."""
        self.ratios.append(found)
        print(table([found]).splitlines()[-1], flush=True)

    def state(self, name: str, value: Any) -> None:
        """Keep and print a number that is not a ratio of times."""
        self.stated[name] = value
        print(f"{name}: {value}", flush=True)


def compare(
    name: str,
    first: Work,
    second: Work,
    *,
    pairs: int,
    goal: float | None = None,
    scale: float = 1.0,
    prepare: Callable[[], None] | None = None,
) -> Ratio:
    """Time `first` against `second`; `scale` multiplies every ratio. `prepare` runs untimed before each pair."""
    return judged(name, timed(first, second, pairs=pairs, prepare=prepare)[None], goal=goal, scale=scale)


def compare_built(
    name: str,
    build: Callable[[], tuple[Work, Work]],
    *,
    pairs: int,
    builds: int = 8,
    goal: float | None = None,
    warm_up: int = 3,
    parts: int = 1,
) -> Ratio:
    """The same, with both works made anew `builds` times: where their tensors lie in memory moves a ratio by 2 %."""
    times = [timed(*build(), pairs=pairs // builds, warm_up=warm_up, parts=parts) for _ in range(builds)]
    return judged(name, np.stack(times), goal=goal)


def timed(
    first: Work,
    second: Work,
    *,
    pairs: int,
    prepare: Callable[[], None] | None = None,
    warm_up: int = 3,
    parts: int = 1,
) -> Numbers:
    """Seconds by pair, side and clock [pairs, 2, 2], in pairs A B and B A by turns.

    Of a work of several `parts`, each is done on both sides before the next, so that both meet the same moments of
    a machine that others use; it is given the number of the part.
    The first clock is processor time of this process: on one thread that is what the work takes, without what other
    programs take of the machine meanwhile. The second is the time on the wall.
    """
    times = np.zeros((pairs, 2, 2))
    works = (first, second)
    for index in range(-warm_up, pairs):
        if prepare is not None:
            prepare()
        gc.collect()
        gc.disable()
        try:
            for number in range(index * parts, (index + 1) * parts):
                for side in (0, 1) if (number % parts + index) % 2 else (1, 0):
                    start = time.process_time(), time.perf_counter()
                    works[side](number)
                    end = time.process_time(), time.perf_counter()
                    if index >= 0:
                        times[index, side] += end[0] - start[0], end[1] - start[1]
        finally:
            gc.enable()
    return times


def judged(name: str, times: Numbers, *, goal: float | None = None, scale: float = 1.0) -> Ratio:
    """The ratio of both sides of `times` [builds, pairs, 2, 2]."""
    ratios = scale * times[:, :, 0] / times[:, :, 1]
    low, high = interval(ratios[..., 0])
    wall_low, wall_high = interval(ratios[..., 1])
    ratio, wall_ratio = np.median(ratios, axis=(0, 1))
    first_ms, second_ms = 1e3 * np.median(times[..., 0], axis=(0, 1))
    return Ratio(
        name,
        ratios.shape[0] * ratios.shape[1],
        first_ms=float(first_ms),
        second_ms=float(second_ms),
        ratio=float(ratio),
        low=low,
        high=high,
        wall_ratio=float(wall_ratio),
        wall_low=wall_low,
        wall_high=wall_high,
        goal=goal,
    )


def interval(values: Numbers) -> tuple[float, float]:
    """The bootstrap 95 % interval of the median of `values` [builds, pairs]: builds are drawn, then pairs of each."""
    draw = np.random.default_rng(0)
    builds, pairs = values.shape
    chosen = draw.integers(builds, size=(RESAMPLES, builds, 1))
    found = values[chosen, draw.integers(pairs, size=(RESAMPLES, builds, pairs))]
    low, high = np.percentile(np.median(found, axis=(1, 2)), [2.5, 97.5])
    return float(low), float(high)


def table(ratios: Iterable[Ratio]) -> str:
    """The ratios as plain text."""
    heads = f"{'pairs':>5} {'ms':>8} {'ms':>8} {'ratio':>6} {'95 %':>14} {'wall':>6} {'goal':>5} verdict"
    lines = [f"{'first / second':66} {heads}"]
    for found in ratios:
        goal = "" if found.goal is None else f"{found.goal:.2f}"
        lines.append(
            f"{found.name:66} {found.pairs:5} {found.first_ms:8.2f} {found.second_ms:8.2f} {found.ratio:6.3f} "
            f"{f'{found.low:.3f} {found.high:.3f}':>14} {found.wall_ratio:6.3f} {goal:>5} {found.verdict}"
        )
    return "\n".join(lines)


def write_json(path: Path, ratios: Iterable[Ratio], stated: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    """What was measured, where, and on which version of the code."""
    content = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "pipeline", "benchmarks", "data_prep")),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "arguments": dict(arguments),
        "ratios": [asdict(found) | {"verdict": found.verdict} for found in ratios],
        "stated": dict(stated),
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _git(*words: str) -> str | None:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
