"""The cache: what is found by name, owner and index, and what it weighs."""

import json
import subprocess
import sys
from typing import Any

import pytest

from kubepeft_operator.runtime.cache import Cache


def make(name: str, *owners: str, namespace: str = "default", **fields: Any) -> dict[str, Any]:
    references = [{"uid": owner} for owner in owners]
    return {"metadata": {"name": name, "namespace": namespace, "ownerReferences": references}, **fields}


def names(objects: list[dict[str, Any]]) -> list[str]:
    return sorted(one["metadata"]["name"] for one in objects)


def test_an_object_is_found_by_namespace_and_name() -> None:
    cache = Cache()
    cache.put(make("a", namespace="one", spec=1))
    cache.put(make("a", namespace="two", spec=2))
    assert (cache.get("one", "a") or {})["spec"] == 1
    assert (cache.get("two", "a") or {})["spec"] == 2
    assert cache.get("three", "a") is None
    assert cache.names("two") == [("two", "a")]
    assert len(cache.all()) == len(cache) == 2


def test_putting_and_removing_return_what_was_there() -> None:
    cache = Cache()
    assert cache.put(make("a", spec=1)) is None
    assert (cache.put(make("a", spec=2)) or {})["spec"] == 1
    assert (cache.remove(("default", "a")) or {})["spec"] == 2
    assert cache.remove(("default", "a")) is None


def test_nobody_can_change_what_others_see() -> None:
    cache = Cache()
    given = make("a", "x", spec={"list": [1]})
    cache.put(given)
    given["spec"]["list"].append(2)
    for read in (cache.get("default", "a"), cache.owned_by("x")[0], cache.all()[0]):
        assert read is not None
        assert read["spec"]["list"] == [1]
        read["spec"]["list"].clear()


def test_children_follow_their_owners_through_every_change() -> None:
    cache = Cache()
    for number in range(10):  # more than the few that an index keeps in a tuple
        cache.put(make(f"job-{number}", "x"))
    assert len(cache.owned_by("x")) == 10
    cache.put(make("job-0", "y"))
    cache.put(make("job-1", "x", "y"))
    assert names(cache.owned_by("y")) == ["job-0", "job-1"]
    assert "job-0" not in names(cache.owned_by("x"))
    for number in range(10):
        cache.remove(("default", f"job-{number}"))
    assert cache.owned_by("x") == cache.owned_by("y") == []
    assert cache.index_sizes("owner") == {}


def test_an_index_covers_what_was_there_before_it() -> None:
    cache = Cache()
    cache.put(make("a", phase="Pending"))
    cache.add_index("phase", lambda obj: [obj["phase"]])
    cache.put(make("b", phase="Running"))
    cache.put(make("c", phase="Pending"))
    assert cache.index_sizes("phase") == {"Pending": 2, "Running": 1}
    cache.put(make("a", phase="Running"))
    assert names(cache.by_index("phase", "Running")) == ["a", "b"]
    assert cache.by_index("phase", "Unknown") == []


def test_an_object_that_names_an_owner_twice_is_found_once() -> None:
    cache = Cache()
    cache.put(make("a", "x", "x"))
    assert names(cache.owned_by("x")) == ["a"]
    cache.remove(("default", "a"))
    assert cache.owned_by("x") == []


WEIGH = """
import json, sys
from kubepeft_operator.runtime import api, controller, events, informer, leader, serve
from kubepeft_operator.runtime.cache import Cache
def rss():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) / 1024
before = rss()
fine_tunes, jobs, pods = Cache(), Cache(), Cache()
fields = json.loads(sys.argv[1])
for number in range(10_000):
    uid = f"{number:08}-1111-2222-3333-444444444444"
    fine_tunes.put({"metadata": {"name": f"ft-{number}", "namespace": "default", "uid": uid}, "spec": fields, "status": fields})
    for child in range(3):
        owner = [{"kind": "FineTune", "name": f"ft-{number}", "uid": uid, "controller": True}]
        for cache in (jobs, pods):
            metadata = {"name": f"ft-{number}-{child}", "namespace": "default", "uid": f"{child}{uid}", "ownerReferences": owner}
            cache.put({"metadata": metadata, "spec": {"suspend": False}, "status": fields})
print(json.dumps([before, rss()]))
"""


def test_ten_thousand_owners_with_thirty_thousand_jobs_and_pods_take_less_than_45_mb() -> None:
    conditions = [
        {"type": kind, "status": "True", "reason": f"Reason{kind}", "lastTransitionTime": "2026-01-01T00:00:00Z"}
        for kind in ("Accepted", "Trained", "Complete", "Failed")
    ]
    ran = subprocess.run(
        [sys.executable, "-c", WEIGH, json.dumps({"conditions": conditions})],
        capture_output=True,
        text=True,
        check=True,
    )
    before, after = json.loads(ran.stdout)
    print(f"{before:.0f} MB with nothing in the caches, {after:.0f} MB with 70,000 objects")
    assert after - before < 45
    assert after < 150


def test_an_index_key_is_a_string_that_the_object_may_lack() -> None:
    cache = Cache()
    cache.add_index("node", lambda obj: [obj["node"]] if "node" in obj else [])
    cache.put(make("a"))
    cache.put(make("b", node="n1"))
    assert cache.index_sizes("node") == {"n1": 1}
    with pytest.raises(KeyError):
        cache.by_index("unknown", "n1")
