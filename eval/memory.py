"""The most memory held while a block runs: torch's allocator on CUDA, the resident set of the process on Linux."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class Peak:
    """The peak in bytes, None where the system does not tell."""

    bytes: int | None = None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Yield what holds the peak once the block is done."""
    peak = Peak()
    known = True
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        known = _forget_peak()
    yield peak
    if device.type == "cuda":
        peak.bytes = torch.cuda.max_memory_allocated(device)
    elif known:
        peak.bytes = _resident_peak()


def _forget_peak() -> bool:
    try:
        _CLEAR.write_text("5")  # resets VmHWM, proc(5)
    except OSError:
        return False
    return True


def _resident_peak() -> int | None:
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None
