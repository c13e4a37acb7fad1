"""Storage for models, data and results: files, S3, the Hugging Face Hub, https.

Imports no client library: each is loaded when an address needs it. Publication is in kubepeft.storage.publish.
"""

from collections.abc import Mapping
from pathlib import Path

from kubepeft.errors import UserError
from kubepeft.storage.store import Entry, Reader, Store, find, fingerprint, join, relative
from kubepeft.storage.uri import Location, parse_uri

__all__ = [
    "Entry",
    "Location",
    "Reader",
    "Store",
    "find",
    "fingerprint",
    "join",
    "open_reader",
    "open_store",
    "parse_uri",
    "relative",
]


def open_reader(
    location: Location, *, mounts: Mapping[str, Path] | None = None, cache_dir: Path | None = None
) -> Reader:
    """What the location's keys are read from; its own key is `location.path`.

    `mounts` says where each claim of pvc:// is mounted; `cache_dir` replaces huggingface_hub's own.
    """
    match location.scheme:
        case "hf":
            from kubepeft.storage.hub import HubStore

            return HubStore(location, cache_dir=cache_dir)
        case "https" | "http":
            from kubepeft.storage.web import WebStore

            return WebStore(location)
    return open_store(location, mounts=mounts)


def open_store(location: Location, *, mounts: Mapping[str, Path] | None = None) -> Store:
    """What the location's keys are read from and written to. Raises UserError for schemes that are read only."""
    match location.scheme:
        case "s3":
            from kubepeft.storage.s3 import S3Store

            return S3Store(location.root)
        case "file":
            from kubepeft.storage.local import LocalStore

            return LocalStore(Path("/"), "file://")
        case "pvc":
            from kubepeft.storage.local import LocalStore

            if location.root not in (mounts or {}):
                raise UserError(
                    "ClaimNotMounted",
                    f"the claim {location.root!r} is not mounted here",
                    where=str(location),
                    mend="name it in spec.pod.volumes; outside a cluster, give a path instead",
                )
            return LocalStore(Path(mounts[location.root]), f"pvc://{location.root}")  # type: ignore[index]
    raise UserError(
        "ReadOnly",
        f"{location.scheme}:// can be read only",
        where=str(location),
        mend="write to s3://BUCKET/KEY, pvc://CLAIM/PATH or a folder",
    )
