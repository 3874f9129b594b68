"""Runs all cases that the selected tests ask for in one lone rank and one pair of ranks."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from random_backbones import save_backbone
from rank_cases import Case

HERE = Path(__file__).resolve().parent
START_SECONDS = 120  # importing DeepSpeed on a busy machine
CASE_SECONDS = 40  # on a busy machine: a tenth of that on an idle one
LONG_CASE_SECONDS = 80
FIGURES: dict[tuple[str, str], float] = {}


class Group:
    """Some ranks, running the cases."""

    def __init__(self, world: int, out: Path) -> None:
        self.world, self._out = world, out
        self._log = out / "log"
        self._ranks: list[subprocess.Popen[bytes]] = []

    def start(self, cases: list[Case], backbones: Path) -> None:
        """Start the ranks, who leave their results in the group's folder."""
        self._out.mkdir()
        (self._out / "cases").write_bytes(pickle.dumps(cases))
        seconds = sum(LONG_CASE_SECONDS if case.long else CASE_SECONDS for case in cases)
        self._deadline = time.monotonic() + START_SECONDS + seconds
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        paths = [HERE, HERE.parent, HERE.parent.parent]
        for rank in range(self.world):
            environment = os.environ | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(self.world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(map(str, paths)),
            }
            with self._log.open("ab") as log:
                command = [sys.executable, HERE / "rank_worker.py", self._out / "cases", backbones, self._out]
                self._ranks.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))

    def wait(self) -> None:
        """Until all ranks are done; where one fails the others, who may wait for it, are killed."""
        while any(rank.poll() is None for rank in self._ranks):
            failed = any(rank.poll() not in (None, 0) for rank in self._ranks)
            if failed or time.monotonic() > self._deadline:
                self.kill()
            time.sleep(0.05)

    def kill(self) -> None:
        for rank in self._ranks:
            rank.kill()
            rank.wait()

    def results(self, case: Case) -> list[dict[str, Any]]:
        """Each rank's result of the case."""
        results = []
        for rank in range(self.world):
            path = self._out / f"{case}.{rank}.pt"
            if not path.exists():
                pytest.fail(f"rank {rank} of {self.world} never ended {case}:\n{self._log.read_text()[-4000:]}")
            result = torch.load(path, weights_only=True)
            if "error" in result:
                pytest.fail(f"rank {rank} of {self.world}, {case}:\n{result['error']}")
            results.append(result)
        return results


class Runs:
    """What was run: results by world size, and figures for the table at the end."""

    def __init__(self, groups: Mapping[int, Group], backbones: Path) -> None:
        self._groups = groups
        self.backbones = backbones

    def one(self, case: Case) -> dict[str, Any]:
        """The lone rank's result."""
        return self._groups[1].results(case)[0]

    def two(self, case: Case) -> list[dict[str, Any]]:
        """Both ranks' results."""
        return self._groups[2].results(case)

    def note(self, case: Case, figure: str, value: float) -> float:
        """Keep a measured figure for the table, the largest where a case has several."""
        FIGURES[str(case), figure] = max(value, FIGURES.get((str(case), figure), 0.0))
        return value


@pytest.fixture(scope="session")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """All cases among the selected tests' parameters, run on 1 and on 2 ranks: once for all of pytest's workers."""
    parameters = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    chosen = [value for parameter in parameters for value in parameter.values() if isinstance(value, Case)]
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "ranks"
    groups = {world: Group(world, folder / str(world)) for world in (1, 2)}
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            _run(list(dict.fromkeys(chosen)), groups, folder / "backbones")
    return Runs(groups, folder / "backbones")


def _run(cases: list[Case], groups: Mapping[int, Group], backbones: Path) -> None:
    for case in cases:
        save_backbone(backbones / case.backbone, case.family, dropout=case.dropout)
    try:
        for group in groups.values():
            group.start(cases, backbones)
        for group in groups.values():
            group.wait()
    finally:
        for group in groups.values():
            group.kill()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The measured figures, one line a case."""
    if not FIGURES:
        return
    terminalreporter.section("measured under DeepSpeed (relative Frobenius norms)")
    lines: dict[str, list[str]] = {}
    for (case, figure), value in FIGURES.items():
        lines.setdefault(case, []).append(f"{figure} {value:.1e}")
    for case, figures in lines.items():
        terminalreporter.write_line(f"{case:46} {'  '.join(figures)}")
