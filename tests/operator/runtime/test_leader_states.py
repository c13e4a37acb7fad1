"""When a lease may be taken, and what is written to take, renew or give it back: the pure part of the election."""

from datetime import UTC, datetime
from typing import Any

import pytest

from kubepeft_operator.runtime.leader import Seen, claimed, free_in, released, see

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def lease(holder: str | None, renewed: str = "2026-01-01T12:00:00.000000Z", **spec: Any) -> dict[str, Any]:
    return {"spec": {"holderIdentity": holder, "renewTime": renewed, "leaseDurationSeconds": 15, **spec}}


@pytest.mark.parametrize(
    ("name", "reads", "now", "seconds"),
    [
        ("nobody holds it", [(100, lease(""))], 100, 0),
        ("the holder's name is missing", [(100, lease(None))], 100, 0),
        ("it is seen for the first time: the holder has its whole time", [(100, lease("a"))], 100, 15),
        ("it was renewed by the wall clock years ago, but seen just now", [(100, lease("a", "1999-01-01T00:00:00Z"))], 101, 14),
        ("it was renewed in the future by a clock that is ahead", [(100, lease("a", "2026-01-01T12:02:00Z"))], 115, 0),
        ("it has not changed for its whole time", [(100, lease("a")), (110, lease("a"))], 115, 0),
        ("it has not changed, but not for so long", [(100, lease("a")), (110, lease("a"))], 112, 3),
        ("it was renewed", [(100, lease("a")), (110, lease("a", "2026-01-01T12:00:10Z"))], 115, 10),
        ("another took it", [(100, lease("a")), (110, lease("b"))], 115, 10),
        ("its holder promised longer than we would", [(100, lease("a", leaseDurationSeconds=60))], 130, 30),
    ],
)  # fmt: skip
def test_a_lease_is_free(name: str, reads: list[tuple[float, dict[str, Any]]], now: float, seconds: float) -> None:
    seen: Seen | None = None
    for at, read in reads:
        seen = see(seen, read, at)
    assert seen
    assert free_in(seen, now) == seconds, name


def test_a_new_lease_counts_no_transition() -> None:
    assert claimed(None, "a", 15, NOON) == {
        "holderIdentity": "a",
        "leaseDurationSeconds": 15,
        "acquireTime": "2026-01-01T12:00:00.000000Z",
        "renewTime": "2026-01-01T12:00:00.000000Z",
        "leaseTransitions": 0,
    }


def test_taking_a_lease_over_counts_a_transition_and_renewing_does_not() -> None:
    later = datetime(2026, 1, 1, 12, 0, 5, tzinfo=UTC)
    taken = claimed({"spec": claimed(None, "a", 15, NOON)}, "b", 15, later)
    assert (taken["leaseTransitions"], taken["acquireTime"]) == (1, "2026-01-01T12:00:05.000000Z")
    renewed = claimed({"spec": taken}, "b", 15, datetime(2026, 1, 1, 12, 0, 7, tzinfo=UTC))
    assert (renewed["leaseTransitions"], renewed["acquireTime"]) == (1, "2026-01-01T12:00:05.000000Z")
    assert renewed["renewTime"] == "2026-01-01T12:00:07.000000Z"


def test_a_part_of_a_second_is_promised_as_a_whole_one() -> None:
    assert claimed(None, "a", 1.2, NOON)["leaseDurationSeconds"] == 2


def test_a_lease_given_back_may_be_taken_at_once_and_keeps_its_count() -> None:
    back = released({"spec": {**claimed(None, "a", 15, NOON), "leaseTransitions": 7}}, NOON)
    assert (back["holderIdentity"], back["leaseTransitions"]) == ("", 7)
    assert free_in(see(None, {"spec": back}, 100), 100) == 0
