"""Real processes that want to lead, on a real API server: one acts, and never two, whatever is done to them."""

import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from kubepeft_operator.runtime.api import LEASES, Api
from kubepeft_operator.runtime.leader import Elector
from tests.operator.faults import Answer, ApiProxy
from tests.operator.runtime.parts import CONFIG_MAPS, config_map, eventually

DURATION = 3.0  # seconds of the lease; leaders give up after 2 and try every 3/8


@dataclass
class Candidate:
    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)

    def leads(self) -> bool:
        return "leads" in self.lines

    def rests(self) -> None:
        """Returns when it has just written: a request that is on its way can't be called back."""
        before = self.lines.count("wrote")
        eventually(lambda: self.lines.count("wrote") > before)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def exit_code(self, timeout: float = 10) -> int:
        return self.process.wait(timeout)

    def read(self) -> None:
        assert self.process.stdout
        self.lines.extend(line.strip() for line in self.process.stdout)


Start = Callable[..., Candidate]


@pytest.fixture
def start(api: Api, namespace: str) -> Iterator[Start]:
    """Starts candidates; all are killed at the end."""
    api.create(CONFIG_MAPS, namespace, config_map("written"))
    running: list[Candidate] = []

    def candidate(name: str, kubeconfig: Path, *, offset: float = 0, wait: bool = True) -> Candidate:
        script = Path(__file__).with_name("candidate.py")
        arguments = [str(kubeconfig), namespace, name, str(DURATION), str(offset)]
        process = subprocess.Popen([sys.executable, script, *arguments], stdout=subprocess.PIPE, text=True)
        one = Candidate(process)
        threading.Thread(target=one.read, daemon=True).start()
        running.append(one)
        if wait:
            eventually(lambda: one.lines, 60)
        return one

    yield candidate
    for one in running:
        with contextlib.suppress(ProcessLookupError):
            one.process.send_signal(signal.SIGCONT)
            one.process.kill()
        one.process.wait()
        if one.process.stdout:
            one.process.stdout.close()


@pytest.fixture
def writers(api: Api, namespace: str, start: Start) -> Iterator[list[str]]:
    """Who wrote, write by write, as the API server put them in order."""
    names: list[str] = []
    moment = next(iter(api.list_pages(CONFIG_MAPS, namespace)))["metadata"]["resourceVersion"]
    watch = api.watch(
        CONFIG_MAPS, namespace, resource_version=moment, field_selector="metadata.name=written", timeout_seconds=120
    )

    def read() -> None:
        for event in watch:
            if event["type"] == "MODIFIED":
                names.append(event["object"]["data"]["by"])

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    yield names
    watch.close()
    reader.join(5)


def reigns(names: list[str]) -> list[str]:
    """The writers with repetitions left out: ["a", "b"] where b wrote after a and a never again."""
    return [name for index, name in enumerate(names) if index == 0 or names[index - 1] != name]


def test_one_of_three_acts_and_when_it_is_killed_another_does(
    start: Start, writers: list[str], kubeconfig: Path
) -> None:
    candidates = {name: start(name, kubeconfig, wait=False) for name in "abc"}
    eventually(lambda: all(one.lines for one in candidates.values()), 60)
    eventually(lambda: any(one.leads() for one in candidates.values()))
    time.sleep(DURATION / 3)
    [first] = [name for name, one in candidates.items() if one.leads()]
    candidates[first].signal(signal.SIGKILL)
    took = eventually(lambda: sum(one.leads() for one in candidates.values()) == 2, DURATION * 2)
    assert DURATION / 2 < took < DURATION * 1.3
    time.sleep(0.3)
    assert len(reigns(writers)) == 2
    assert reigns(writers)[0] == first


def test_a_leader_that_ends_in_peace_hands_over_at_once(start: Start, writers: list[str], kubeconfig: Path) -> None:
    first = start("a", kubeconfig)
    eventually(first.leads)
    second = start("b", kubeconfig)
    first.signal(signal.SIGTERM)
    assert first.exit_code() == 0
    assert eventually(second.leads) < DURATION / 4
    eventually(lambda: "b" in writers)
    assert reigns(writers) == ["a", "b"]


def test_a_paused_leader_that_wakes_up_writes_nothing_and_ends(
    start: Start, writers: list[str], kubeconfig: Path
) -> None:
    first = start("a", kubeconfig)
    eventually(first.leads)
    second = start("b", kubeconfig)
    first.rests()
    first.signal(signal.SIGSTOP)
    eventually(second.leads, DURATION * 2)
    eventually(lambda: "b" in writers)
    first.signal(signal.SIGCONT)
    assert first.exit_code() == 3
    time.sleep(0.2)
    assert reigns(writers) == ["a", "b"]


def test_a_leader_whose_lease_is_stolen_ends(start: Start, api: Api, namespace: str, kubeconfig: Path) -> None:
    first = start("a", kubeconfig)
    eventually(first.leads)
    api.patch(LEASES, namespace, "the-lease", {"spec": {"holderIdentity": "thief"}})
    assert first.exit_code(3) == 3
    assert api.get(LEASES, namespace, "the-lease")["spec"]["holderIdentity"] == "thief"


def test_a_leader_whose_lease_is_deleted_ends(start: Start, api: Api, namespace: str, kubeconfig: Path) -> None:
    first = start("a", kubeconfig)
    eventually(first.leads)
    api.delete(LEASES, namespace, "the-lease")
    assert first.exit_code(3) == 3


def test_a_leader_that_cannot_renew_ends_before_another_may_take_over(
    start: Start, proxy: ApiProxy, writers: list[str], kubeconfig: Path
) -> None:
    first = start("a", proxy.kubeconfig)
    eventually(first.leads)
    second = start("b", kubeconfig)
    eventually(lambda: "a" in writers)
    proxy.silence()
    assert first.exit_code(DURATION * 2) == 3
    assert not second.leads()
    eventually(second.leads, DURATION * 2)
    eventually(lambda: "b" in writers)
    assert reigns(writers) == ["a", "b"]


def test_clocks_two_minutes_off_do_no_harm(start: Start, writers: list[str], kubeconfig: Path) -> None:
    first = start("a", kubeconfig)
    eventually(first.leads)
    others = [start("slow", kubeconfig, offset=-120, wait=False), start("fast", kubeconfig, offset=120, wait=False)]
    eventually(lambda: all(one.lines for one in others), 60)
    time.sleep(DURATION * 1.2)
    assert not any(one.leads() for one in others)
    first.signal(signal.SIGKILL)
    took = eventually(lambda: any(one.leads() for one in others), DURATION * 2)
    assert took > DURATION / 2
    time.sleep(DURATION * 1.2)
    assert sum(one.leads() for one in others) == 1
    assert len(reigns(writers)) == 2


def test_renewals_survive_lost_answers_edits_and_a_short_outage(
    proxy: ApiProxy, proxied: Api, api: Api, namespace: str
) -> None:
    lost: list[int] = []
    elector = Elector(
        proxied,
        namespace,
        "the-lease",
        "a",
        on_lost=lambda: lost.append(1),
        lease_duration=3,
        renew_deadline=2,
        retry_period=0.2,
    )
    elector.start()
    assert elector.wait_leading(5)
    puts = [request for request in proxy.requests if request.method == "PUT"]
    proxy.rule = lambda request: Answer(forwarded=True, cut=True) if request.method == "PUT" else None
    time.sleep(0.5)  # written, but the answers are lost: each next renewal meets a conflict
    proxy.rule = lambda request: None
    for number in range(5):
        api.patch(LEASES, namespace, "the-lease", {"metadata": {"labels": {"edited": str(number)}}})
        time.sleep(0.1)
    proxy.refuse()
    time.sleep(0.8)
    proxy.accept()
    time.sleep(1.5)
    assert elector.may_act()
    assert not lost
    assert elector.problem() is None
    assert api.get(LEASES, namespace, "the-lease")["metadata"]["labels"] == {"edited": "4"}
    assert len([request for request in proxy.requests if request.method == "PUT"]) - len(puts) < 30
    elector.release()
    assert not elector.may_act()
    assert api.get(LEASES, namespace, "the-lease")["spec"]["holderIdentity"] == ""


def test_two_processes_with_one_name_are_two(api: Api, namespace: str) -> None:
    def elector() -> Elector:
        return Elector(
            api,
            namespace,
            "twins",
            "same",
            on_lost=lambda: None,
            lease_duration=2,
            renew_deadline=1.5,
            retry_period=0.1,
        )

    first, second = elector(), elector()
    first.start()
    assert first.wait_leading(5)
    second.start()
    assert not second.wait_leading(1)
    first.release()
    assert second.wait_leading(2)
    second.release()


def test_times_that_cannot_work_are_refused(api: Api) -> None:
    with pytest.raises(ValueError, match="lease_duration"):
        Elector(api, "default", "x", "a", on_lost=lambda: None, lease_duration=5, renew_deadline=10)
