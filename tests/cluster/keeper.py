"""Keeps the processes of one cluster and removes what they leave, whatever happens to the test that owns them.

`Keeper` is the owner's end; run as a program, this file is the other one: a process of its own session that starts what it is told
to over a socket. When the socket closes, because the owner is done or dead, it kills every process, removes the temporary folder and
the control groups, and ends. Should the keeper itself be killed, the kernel kills what it started. Standard library only: it starts in
a few milliseconds, and must not fail for want of anything.
"""

import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CGROUPS = Path("/sys/fs/cgroup")
_PR_SET_PDEATHSIG = 1


class Keeper:
    """Processes that live no longer than this object's owner.

    `folder` is removed at the end, and so is every control group called `cgroup`; until then the file descriptor `lock` is held.
    """

    def __init__(self, folder: Path, cgroup: str = "", lock: int | None = None) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", __file__, str(folder), cgroup],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                pass_fds=() if lock is None else (lock,),
                start_new_session=True,  # Ctrl-C ends the owner; the keeper cleans up after it
            )
        if lock is not None:
            os.close(lock)
        self._socket, self._lines = ours, ours.makefile("r")

    def start(self, argv: Sequence[str | Path], log: Path, environment: Mapping[str, str] | None = None) -> int:
        """Start a process that appends its output to `log`. Returns its process id.

        Raises:
            OSError: it can't be executed.
        """
        answer = self._ask(
            start=[str(part) for part in argv], log=str(log), environment=dict(environment or os.environ)
        )
        if "error" in answer:
            raise OSError(f"{argv[0]}: {answer['error']}")
        return int(answer["pid"])

    def exit_code(self, pid: int) -> int | None:
        """How a process ended (minus the signal's number where one killed it), or None while it runs."""
        code = self._ask(poll=pid)["code"]
        return None if code is None else int(code)

    def close(self) -> None:
        """Kill and remove everything; returns when that is done."""
        self._lines.close()
        self._socket.close()
        self._process.wait(60)

    def _ask(self, **request: Any) -> dict[str, Any]:
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        answer = self._lines.readline()
        if not answer:
            raise RuntimeError("the keeper of the cluster's processes is gone, and they with it")
        return dict(json.loads(answer))


def main(folder: Path, cgroup: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    libc = ctypes.CDLL(None)
    children: dict[int, subprocess.Popen[bytes]] = {}
    owner = socket.socket(fileno=0)
    for line in owner.makefile("r"):
        request = json.loads(line)
        if "start" in request:
            try:
                with open(request["log"], "ab") as log:
                    child = subprocess.Popen(
                        request["start"],
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        env=request["environment"],
                        start_new_session=True,
                        preexec_fn=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),
                    )
                children[child.pid] = child
                answer: dict[str, Any] = {"pid": child.pid}
            except OSError as error:
                answer = {"error": str(error)}
        else:
            answer = {"code": children[request["poll"]].poll()}
        with contextlib.suppress(BrokenPipeError):
            owner.sendall(json.dumps(answer).encode() + b"\n")
    for child in reversed(children.values()):
        child.kill()
    for child in children.values():
        child.wait()
    if cgroup:
        _remove_cgroups(cgroup)
    shutil.rmtree(folder, ignore_errors=True)


def _remove_cgroups(name: str) -> None:
    """Removes /sys/fs/cgroup/*/NAME (version 1) or /sys/fs/cgroup/NAME, and kills what still lives in them."""
    deadline = time.monotonic() + 20
    roots = [*CGROUPS.glob(f"*/{name}"), CGROUPS / name]
    while (left := [root for root in roots if root.exists()]) and time.monotonic() < deadline:
        for root in left:
            for folder in [*sorted(root.rglob("*/"), key=lambda path: -len(path.parts)), root]:
                with contextlib.suppress(OSError, ValueError):
                    for pid in (folder / "cgroup.procs").read_text().split():
                        os.kill(int(pid), signal.SIGKILL)
                with contextlib.suppress(OSError):
                    folder.rmdir()
        time.sleep(0.05)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
