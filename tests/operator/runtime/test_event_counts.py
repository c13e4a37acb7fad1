"""When an event is a new one, and when a count is written: the pure part of events."""

import pytest

from kubepeft_operator.runtime.events import Told, again, overdue

FIRST = Told("first", count=1, last=0, written=1, written_at=0)


@pytest.mark.parametrize(
    ("name", "told", "now", "expected", "what"),
    [
        ("never told", None, 5, Told("new", 1, 5, 1, 5), "create"),
        ("again at once", FIRST, 1, Told("first", 2, 1, 1, 0), "wait"),
        ("again after the spacing", FIRST, 60, Told("first", 2, 60, 2, 60), "patch"),
        ("after some that were not written", Told("first", 9, 59, 1, 0), 61, Told("first", 10, 61, 10, 61), "patch"),
        ("again within the window of the last one", Told("first", 2, 500, 2, 500), 1099, Told("first", 3, 1099, 3, 1099), "patch"),
        ("long after the last one", FIRST, 601, Told("new", 1, 601, 1, 601), "create"),
        ("told out of order", Told("first", 2, 70, 2, 70), 69, Told("first", 3, 70, 2, 70), "wait"),
    ],
)  # fmt: skip
def test_an_event(name: str, told: Told | None, now: float, expected: Told, what: str) -> None:
    assert again(told, "new", now) == (expected, what), name


@pytest.mark.parametrize(
    ("told", "now", "expected"),
    [(FIRST, 1000, False), (Told("a", 2, 1, 1, 0), 59, False), (Told("a", 2, 1, 1, 0), 60, True)],
)
def test_a_count_is_overdue_when_it_has_waited_for_the_spacing(told: Told, now: float, expected: bool) -> None:
    assert overdue(told, now) is expected
