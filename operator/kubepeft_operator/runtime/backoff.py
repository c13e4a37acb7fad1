"""How long to wait after failures: doubling, up to a cap, spread so that many who failed together don't come back together."""

from __future__ import annotations


def delay(failures: int, spread: float, *, base: float, cap: float) -> float:
    """Seconds to wait after so many failures in a row.

    failures: 1 or more.
    spread: a random number in [0, 1).
    Returns base·2^(failures-1), at most cap, and of that between one half and the whole.
    """
    whole = min(cap, base * 2.0 ** min(failures - 1, 60))
    return whole * (1 + spread) / 2
