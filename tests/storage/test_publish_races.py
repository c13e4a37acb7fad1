"""A thousand races on a real S3 server: three processes publish the same folder at once, others read meanwhile.

Each race must have exactly one winner, all must report the same manifest, and no reader may ever get a mix.
"""

import multiprocessing
import os
import queue
import time
from collections import Counter
from datetime import UTC, datetime
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path
from typing import Any

import pytest

from kubepeft.errors import TransientError
from kubepeft.storage import Store, open_store, parse_uri
from kubepeft.storage.publish import (
    Attempt,
    Published,
    claim_and_finish,
    fetch,
    publish_in_place,
    read_manifest,
    stage,
)
from tests.servers import S3Server

IN_PLACE, STABLE = 850, 150
ATTEMPTS = 3
FILES = ("a", "b")


def folder_of_race(number: int) -> str:
    return f"race/{number}/adapter"


def publish_once(store: Store, number: int, local: Path, who: Attempt) -> Published:
    folder = folder_of_race(number)
    if number < IN_PLACE:
        return publish_in_place(store, folder, local, who)
    return claim_and_finish(store, folder, stage(store, folder, local, who))


def compete(bucket: str, me: int, local: Path, start: Barrier, results: Any) -> None:
    store = open_store(parse_uri(f"s3://{bucket}"))
    for name in FILES:
        (local / name).write_text(f"attempt-{me}")
    outcomes = []
    for number in range(IN_PLACE + STABLE):
        who = Attempt(f"attempt-{me}", "digest", datetime.now(UTC))
        start.wait(60)
        done = publish_once(store, number, local, who)
        outcomes.append((number, done.won, done.manifest.attempt))
    results.put(("attempt", outcomes))


def watch(bucket: str, dest: Path, stop: Event, results: Any) -> None:
    """Reads the newest races over and over; what it fetches must be whole and of one attempt."""
    store = open_store(parse_uri(f"s3://{bucket}"))
    seen: Counter[str] = Counter()
    number = 0
    while not stop.is_set():
        manifest = read_manifest(store, folder_of_race(number))
        if manifest is None:
            seen["not yet"] += 1
            time.sleep(0.02)
            continue
        target = dest / str(number)
        try:
            fetch(store, folder_of_race(number), manifest, target)
        except TransientError as error:
            seen[error.reason] += 1
            continue
        contents = {(target / name).read_text() for name in FILES}
        seen["whole" if contents == {manifest.attempt} else f"MIX {contents}"] += 1
        number += 1
    results.put(("reader", seen))


def test_a_thousand_publish_races_have_one_winner_each_and_no_reader_sees_a_mix(
    s3_environment: S3Server, bucket: str, tmp_path: Path
) -> None:
    context = multiprocessing.get_context("spawn")
    results, stop, start = context.Queue(), context.Event(), context.Barrier(ATTEMPTS)
    workers = []
    for me in range(ATTEMPTS):
        local = tmp_path / f"attempt-{me}"
        local.mkdir()
        workers.append(context.Process(target=compete, args=(bucket, me, local, start, results)))
    workers.append(context.Process(target=watch, args=(bucket, tmp_path / "read", stop, results)))
    for worker in workers:
        worker.start()
    reports: list[tuple[str, Any]] = []
    while len(reports) < len(workers):
        try:
            reports.append(results.get(timeout=1))
        except queue.Empty:
            if failed := [worker.name for worker in workers if worker.exitcode]:
                start.abort()
                stop.set()
                pytest.fail(f"{failed} failed; see above")
        if len(reports) == ATTEMPTS:
            stop.set()
    for worker in workers:
        worker.join(20)
        assert worker.exitcode == 0

    by_race: dict[int, list[tuple[bool, str]]] = {}
    for kind, outcomes in reports:
        if kind == "attempt":
            for number, won, attempt in outcomes:
                by_race.setdefault(number, []).append((won, attempt))
    assert len(by_race) == IN_PLACE + STABLE == 1000
    wrong = {
        n: o
        for n, o in by_race.items()
        if len(o) != ATTEMPTS or len({a for _, a in o}) != 1 or sum(w for w, _ in o) != 1
    }
    assert wrong == {}
    assert len({outcomes[0][1] for outcomes in by_race.values()}) == ATTEMPTS, (
        "every attempt wins now and then, else it was no race"
    )

    [(_, seen)] = [report for report in reports if report[0] == "reader"]
    assert set(seen) <= {"whole", "not yet", "Overwritten"}
    assert seen["whole"] > 100

    left = [path for path in (s3_environment.root / bucket / "race").rglob("*") if path.is_file()]
    in_place, stable = len(FILES) + 1, len(FILES) + 2
    assert len(left) == IN_PLACE * in_place + STABLE * stable, "losers leave nothing behind"
    assert os.environ["AWS_ENDPOINT_URL"] == s3_environment.endpoint
