"""Whether memory ran out, and how much is left: the accelerator's, or the host's within this container's limit."""

from __future__ import annotations

import resource
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_ONEDNN = "could not create a primitive"
"""All that oneDNN says when it gets no memory for its code or threads."""


def ran_out(error: BaseException) -> bool:
    """Whether an allocator refused: a GPU's or the CPU's."""
    if isinstance(error, MemoryError):
        return True
    if "torch" not in sys.modules or not isinstance(error, Exception):
        return False
    from accelerate.utils.memory import should_reduce_batch_size

    return should_reduce_batch_size(error) or (isinstance(error, RuntimeError) and str(error) == _ONEDNN)


def free(device: torch.device) -> int:
    """Bytes that can still be allocated."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    with open("/proc/meminfo", encoding="ascii") as lines:
        found = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            with open(limit, encoding="ascii") as most, open(used, encoding="ascii") as now:
                text = most.read().strip()
                found = min(found, int(text) - int(now.read())) if text != "max" else found
        except FileNotFoundError:
            continue
    return max(found, 0)


def peak() -> int:
    """Bytes: the most that torch has held of this GPU, or the most this process has held."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
