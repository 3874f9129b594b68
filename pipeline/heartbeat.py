"""Whether the other hosts of a run are still there.

A host without power or network says nothing, and a collective waits for it until its timeout, an hour. So each rank
counts up a number of its own in a store that rank 0 serves, rank 0 watches the numbers of all, all others rank 0's;
whoever finds that one stands still leaves.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from pipeline.stopping import STOPPED_EXIT_CODE

INTERVAL = 2.0  # seconds between two beats
PATIENCE = 25.0  # seconds: with the store's own delays still under a minute


class Counters(Protocol):
    """What is asked of a store: torch.distributed's `TCPStore`."""

    def add(self, key: str, amount: int, /) -> int:
        """Add to the number under `key`, 0 at first, and give the sum."""


class Heartbeat:
    """This rank's beat, and its look at the others."""

    def __init__(
        self,
        store: Counters,
        rank: int,
        hosts: Sequence[str],
        *,
        interval: float = INTERVAL,
        patience: float = PATIENCE,
        lost: Callable[[str], None] | None = None,
    ) -> None:
        """`hosts`: the host of every rank; `lost` is told which one is gone, and by default ends this process."""
        self._store, self._rank, self._interval, self._patience = store, rank, interval, patience
        self._lost = lost or leave
        watched = [other for other in range(len(hosts)) if hosts[other] != hosts[rank]] if rank == 0 else [0]
        self._names = {other: f"{hosts[other]} (rank {other})" for other in watched}
        self._heard = dict.fromkeys(watched, time.monotonic())
        self._done = threading.Event()
        # Two threads: a store that cannot be reached blocks the one that asks it.
        for loop in (self._beat, self._watch):
            threading.Thread(target=loop, name=f"heartbeat{loop.__name__}", daemon=True).start()

    def stop(self) -> None:
        """Look no longer: others may leave now."""
        self._done.set()

    def _beat(self) -> None:
        counts: dict[int, int] = {}
        while not self._done.is_set():
            try:
                self._store.add(str(self._rank), 1)
                for other in self._heard:
                    count = self._store.add(str(other), 0)
                    if count != counts.get(other):
                        counts[other] = count
                        self._heard[other] = time.monotonic()
            except RuntimeError:  # the store has gone, and with it rank 0: the other thread tells, if this one lives
                return
            self._done.wait(self._interval)

    def _watch(self) -> None:
        while not self._done.wait(self._interval / 4):
            now = time.monotonic()
            for other, heard in self._heard.items():
                if now - heard > self._patience:
                    self._done.set()
                    self._lost(f"nothing has been heard of {self._names[other]} for {self._patience:.0f} s")
                    return


def leave(reason: str) -> None:
    """End this process at once: its main thread may wait in a collective for ever."""
    if os.environ.get("LOCAL_RANK", "0") == "0":  # once on a host
        print(
            f"stopped: {reason}: its host or the network is down; run the same command again to go on from the last "
            "whole stage",
            file=sys.stderr,
            flush=True,
        )
    os._exit(STOPPED_EXIT_CODE)
