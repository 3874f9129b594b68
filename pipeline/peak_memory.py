"""The most memory that this process had since it was last asked."""

from __future__ import annotations

import resource
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): the peak resident set size starts again from what it is now


def peak_resident_bytes() -> int:
    """Most bytes resident since the last call; of the process so far where the system does not let a peak be reset."""
    try:
        peak = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        _CLEAR.write_text(_RESET_PEAK)
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(peak.split()[1]) * 1024
