"""Two hosts, one rank on each, DeepSpeed's launcher between them over ssh: `make test-hosts` (as root).

The hosts are network namespaces of this machine, with addresses, names and ssh servers of their own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from network import Network, missing_programs

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "smoke"))
from commands import ROOT, events, launch, results, run, small, wait_for

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
    pytest.mark.skipif(bool(missing_programs()), reason=f"not installed: {', '.join(missing_programs())}"),
]
RECIPE = "recipes/tiny_t5_order1.yaml"
MINUTE = 60.0


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    hosts = Network(tmp_path_factory.mktemp("network"))
    try:
        hosts.start()
        yield hosts
    finally:
        hosts.stop()


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run by two ranks of this host."""
    folder = tmp_path_factory.mktemp("local") / "run"
    done = run(launch(2, RECIPE, *small(f"output.dir={folder}")))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def start(network: Network, folder: Path, *more: str) -> subprocess.Popen[str]:
    """The run on both hosts, started from the first."""
    hostfile = folder.with_name("hostfile")
    hostfile.write_text("".join(f"{host.name} slots=1\n" for host in network.hosts))
    command = [
        str(ROOT / "docker" / "launch.sh"),
        "--hostfile",
        str(hostfile),
        RECIPE,
        *small(f"output.dir={folder}"),
        *more,
    ]
    return subprocess.Popen(
        network.hosts[0].inside(command),
        env={**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def end(process: subprocess.Popen[str], timeout: float = 240) -> tuple[int, str]:
    """Exit code and everything printed."""
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out + err


def in_task(folder: Path, index: int) -> bool:
    return any(event["event"] == "step" and event["task_index"] == index for event in events(folder))


def same_results(folder: Path, other: Path) -> None:
    found: list[Any] = [results(folder), results(other)]
    for result in found:
        assert 0 < result.pop("leak")["max"] <= 1e-5  # itself the size of rounding
    assert found[0] == found[1]


def test_two_hosts_give_the_results_of_two_local_ranks(network: Network, local: Path, tmp_path: Path) -> None:
    process = start(network, tmp_path / "run")
    pids = tmp_path / "run" / "pids"
    wait_for(pids.is_file, process)
    names = [line.split()[1] for line in pids.read_text().splitlines()]
    code, printed = end(process)
    assert code == 0, printed[-3000:]
    assert names == [host.name for host in network.hosts]
    same_results(tmp_path / "run", local)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_launch_script_stops_both_hosts_whole(
    network: Network, local: Path, tmp_path: Path, number: signal.Signals
) -> None:
    process = start(network, tmp_path / "run")
    wait_for(lambda: in_task(tmp_path / "run", 2), process)
    os.kill(process.pid, number)
    code, printed = end(process, timeout=MINUTE)
    assert code == 75, printed[-3000:]
    assert f"signal {number.name}" in printed
    code, printed = end(start(network, tmp_path / "run"))
    assert code == 0, printed[-3000:]
    assert "taken from its stage" in printed
    same_results(tmp_path / "run", local)


def test_a_host_that_is_cut_off_is_told_within_a_minute_and_the_run_goes_on(
    network: Network, local: Path, tmp_path: Path
) -> None:
    process = start(network, tmp_path / "run")
    wait_for(lambda: in_task(tmp_path / "run", 2), process)
    away = network.hosts[1]
    away.plug(connected=False)
    start_of_silence = time.monotonic()
    try:
        code, printed = end(process, timeout=2 * MINUTE)
    finally:
        away.plug(connected=True)
    assert time.monotonic() - start_of_silence < MINUTE
    assert code != 0
    assert "nothing has been heard of south (rank 1)" in printed, printed[-3000:]
    code, printed = end(start(network, tmp_path / "run"))
    assert code == 0, printed[-3000:]
    assert "taken from its stage" in printed
    same_results(tmp_path / "run", local)


def test_a_fault_in_the_recipe_is_told_before_any_host_is_asked(network: Network, tmp_path: Path) -> None:
    code, printed = end(start(network, tmp_path / "run", "trainin.epochs=3"))
    assert code == 2
    assert printed.count("error: ") == 1
    assert 'did you mean "training"' in printed or "trainin" in printed
    assert not (tmp_path / "run").exists()
