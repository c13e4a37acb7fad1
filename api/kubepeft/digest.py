"""Digests of specs and of data: versioned, so that a new rule for making them orphans nothing made before."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from kubepeft.types.objects import BatchInferenceSpec, FineTuneSpec

CHANGEABLE = ("suspend", "ttlSecondsAfterFinished", "activeDeadlineSeconds")
"""Fields of a spec that may change during an object's life; they are not part of its digest."""


def of(data: Any) -> str:
    """Digest of plain JSON data: "v1-" and the first 32 hex digits of the sha256 of its canonical form."""
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return "v1-" + hashlib.sha256(canonical.encode()).hexdigest()[:32]


def of_spec(spec: FineTuneSpec | BatchInferenceSpec) -> str:
    """Digest of what a spec asks for.

    Fields at their default are left out, so a field that a later version adds changes no digest. For the same reason
    a default never changes within one apiVersion.
    """
    return of({key: value for key, value in spec.to_json(defaults=False).items() if key not in CHANGEABLE})
