"""Whether the other hosts of a run are still there.

A host without power or network says nothing, and a collective waits for it until its timeout, an hour. So each rank
counts up a number of its own in a store that rank 0 serves; rank 0 watches the numbers of other hosts' ranks, all
others rank 0's; whoever finds that one stands still leaves. Rank 0 names the lost one first, or the others would think
that it is lost itself.
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
FAILED, LOST = "failed", "lost"  # numbers in the store: ranks that met a fault; the rank that rank 0 lost, from 1


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
        leave: Callable[[str, int], None] | None = None,
    ) -> None:
        """`hosts`: the host of every rank; `leave` is given a reason and an exit code, by default ends this process."""
        self._store, self._rank, self._hosts = store, rank, hosts
        self._interval, self._patience = interval, patience
        self._leave = leave or end_process
        watched = [other for other in range(len(hosts)) if hosts[other] != hosts[rank]] if rank == 0 else [0]
        self._heard = dict.fromkeys(watched, time.monotonic())
        self._failed = False
        self._lost: int | None = None
        self._done = threading.Event()
        # Two threads: a store that cannot be reached blocks the one that asks it.
        self._threads = [threading.Thread(target=loop, daemon=True) for loop in (self._beat, self._watch)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Look no longer: others may leave now."""
        self._done.set()
        for thread in self._threads:
            thread.join(self._interval)

    def fail(self) -> None:
        """Say that this rank leaves for a fault of its own, which another attempt would meet again."""
        teller = threading.Thread(target=self._store.add, args=(FAILED, 1), daemon=True)
        teller.start()
        teller.join(self._interval)

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
                self._failed = self._store.add(FAILED, 0) > 0
                if self._rank and (lost := self._store.add(LOST, 0)):
                    self._lost = lost - 1
            except RuntimeError:  # the store has gone, and with it rank 0: the other thread tells, if this one lives
                return
            self._done.wait(self._interval)

    def _watch(self) -> None:
        while not self._done.wait(self._interval / 4):
            silent = [other for other, heard in self._heard.items() if time.monotonic() - heard > self._patience]
            lost = silent[0] if silent else self._lost
            if lost is None:
                continue
            if self._rank == 0:
                self._store.add(LOST, lost + 1)
                time.sleep(2 * self._interval)  # in which the others read it
            self._done.set()
            reason = f"nothing has been heard of {self._hosts[lost]} (rank {lost}) for {self._patience:.0f} s"
            self._leave(reason, 1 if self._failed else STOPPED_EXIT_CODE)
            return


def end_process(reason: str, code: int) -> None:
    """End this process at once: its main thread may wait in a collective for ever."""
    if os.environ.get("LOCAL_RANK", "0") == "0":  # once on a host
        what = "a rank has failed, see its own message" if code == 1 else "its process, host or network is down"
        print(
            f"stopped: {reason}: {what}; run the same command again to go on from the last whole stage",
            file=sys.stderr,
            flush=True,
        )
    os._exit(code)
