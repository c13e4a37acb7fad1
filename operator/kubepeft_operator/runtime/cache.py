"""The objects of one kind, as the informer last saw them.

They are kept as compressed JSON: as dicts they take ten times the memory, and Python's garbage collector would walk all of them again
and again. A reading takes some 20 µs, a small part of the call that follows it, and makes a fresh copy, so nobody changes what others see.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import orjson

Object = dict[str, Any]
Name = tuple[str, str]
"""Namespace and name."""

OWNER = "owner"
FEW = 4  # an owner has a few children, in a tuple; a set of one takes 216 bytes, and there may be 100,000 owners


def name_of(obj: Object) -> Name:
    return obj["metadata"].get("namespace", ""), obj["metadata"]["name"]


def owner_uids(obj: Object) -> list[str]:
    return [owner["uid"] for owner in obj["metadata"].get("ownerReferences", ())]


def _pack(obj: Object) -> bytes:
    return zlib.compress(orjson.dumps(obj), 1)


def _unpack(kept: bytes) -> Object:
    obj: Object = orjson.loads(zlib.decompress(kept))
    return obj


class Cache:
    """Thread-safe; `put` and `remove` are the informer's."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: dict[Name, bytes] = {}
        self._indexers: dict[str, Callable[[Object], Iterable[str]]] = {OWNER: owner_uids}
        self._indexes: dict[str, dict[str, tuple[Name, ...] | set[Name]]] = {OWNER: {}}

    def get(self, namespace: str, name: str) -> Object | None:
        with self._lock:
            kept = self._kept.get((namespace, name))
        return None if kept is None else _unpack(kept)

    def owned_by(self, uid: str) -> list[Object]:
        """Those with this uid among their ownerReferences."""
        return self.by_index(OWNER, uid)

    def all(self) -> list[Object]:
        with self._lock:
            kept = list(self._kept.values())
        return [_unpack(one) for one in kept]

    def names(self, namespace: str | None = None) -> list[Name]:
        with self._lock:
            return [name for name in self._kept if namespace is None or name[0] == namespace]

    def __len__(self) -> int:
        return len(self._kept)

    def add_index(self, name: str, keys: Callable[[Object], Iterable[str]]) -> None:
        """Finds objects by any strings that `keys` gives for one; it must follow from the object alone."""
        with self._lock:
            self._indexers[name] = keys
            self._indexes[name] = {}
            for one, kept in self._kept.items():
                self._add(name, keys(_unpack(kept)), one)

    def by_index(self, name: str, key: str) -> list[Object]:
        with self._lock:
            kept = [self._kept[one] for one in self._indexes[name].get(key, ())]
        return [_unpack(one) for one in kept]

    def index_sizes(self, name: str) -> dict[str, int]:
        """How many objects each key of the index has; no object is read for it."""
        with self._lock:
            return {key: len(names) for key, names in self._indexes[name].items()}

    def put(self, obj: Object) -> Object | None:
        """Keeps `obj`, and returns what was kept under its name before."""
        name = name_of(obj)
        with self._lock:
            before = self._kept.get(name)
            old = None if before is None else _unpack(before)
            if old == obj:
                return old
            self._kept[name] = _pack(obj)
            for index, keys in self._indexers.items():
                were, are = set(keys(old)) if old else set(), set(keys(obj))
                self._drop(index, were - are, name)
                self._add(index, are - were, name)
        return old

    def remove(self, name: Name) -> Object | None:
        """What was kept under this name, which is forgotten."""
        with self._lock:
            kept = self._kept.pop(name, None)
            if kept is None:
                return None
            old = _unpack(kept)
            for index, keys in self._indexers.items():
                self._drop(index, keys(old), name)
        return old

    def _add(self, index: str, keys: Iterable[str], name: Name) -> None:
        found = self._indexes[index]
        for key in keys:
            names = found.get(key, ())
            if isinstance(names, set):
                names.add(name)
            elif name not in names:
                more = (*names, name)
                found[key] = more if len(more) <= FEW else set(more)

    def _drop(self, index: str, keys: Iterable[str], name: Name) -> None:
        found = self._indexes[index]
        for key in keys:
            names = found.get(key, ())
            if isinstance(names, set):
                names.discard(name)
            else:
                names = found[key] = tuple(one for one in names if one != name)
            if not names:
                del found[key]
