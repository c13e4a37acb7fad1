"""Real servers for tests, and a proxy that makes real faults in front of them.

S3: versitygw over a POSIX folder. Web and hub: http.server. No test's expectation is decided here.
"""

import contextlib
import http.server
import json
import os
import random
import re
import select
import socket
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.cluster import build

REPOSITORY = Path(__file__).resolve().parent.parent
ACCESS_KEY, SECRET_KEY = "AKIATESTKEY", "wJalrTestSecret"


def free_port(host: str = "127.0.0.1") -> int:
    """A port below those that the kernel gives to outgoing connections, so that it stays free while its server restarts."""
    for port in random.sample(range(20000, 32000), 500):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind((host, port))
            return port
    raise RuntimeError(f"no free port on {host} between 20000 and 32000")


class S3Server:
    """A running versitygw whose buckets are the folders below `root`."""

    def __init__(
        self, root: Path, *, cert: Path | None = None, key: Path | None = None, host: str = "127.0.0.1"
    ) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        self.port = free_port(host)
        self.endpoint = f"http{'s' if cert else ''}://{host}:{self.port}"
        tls = ["--cert", str(cert), "--key", str(key)] if cert else []
        self._process = subprocess.Popen(
            [
                build.program("versitygw"),
                "--port",
                f"{host}:{self.port}",
                "--quiet",
                "--keep-alive",
                *tls,
                "posix",
                root,
            ],
            env={**os.environ, "ROOT_ACCESS_KEY": ACCESS_KEY, "ROOT_SECRET_KEY": SECRET_KEY},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection((host, self.port), timeout=1).close()
                break
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError("versitygw did not start") from None
                time.sleep(0.05)

    def environment(self, endpoint: str | None = None) -> dict[str, str]:
        """What a client needs to reach it; nothing of the machine's own AWS settings gets in."""
        return {
            "AWS_ENDPOINT_URL": endpoint or self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def make_bucket(self, name: str) -> str:
        (self.root / name).mkdir()
        return name

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(10)


class FaultProxy:
    """A TCP proxy to one server. Set the faults while it runs; that also closes what is open."""

    def __init__(self, host: str, port: int) -> None:
        self._upstream = (host, port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.requests_refused = 0
        self.connections_cut = 0
        self._busy_until, self._busy_code = 0.0, ""
        self._cuts: list[int] = []
        self._drop_answers_to: list[bytes] = []
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def answer_503(self, seconds: float, code: str = "SlowDown") -> None:
        """Answers every request with 503 and this S3 error code for so long; float("inf") for ever."""
        self._busy_code = code
        self._busy_until = time.monotonic() + seconds
        self._close_open()

    def cut_after(self, *sizes: int) -> None:
        """Each of the next connections is reset after so many bytes of answers."""
        self._cuts = list(sizes)
        self._close_open()

    def drop_answer_to(self, *requests: bytes) -> None:
        """Carries out the next request that begins so, and cuts the connection in place of its answer."""
        self._drop_answers_to = list(requests)
        self._close_open()

    def stop(self) -> None:
        self._listener.close()
        self._close_open()

    def _close_open(self) -> None:
        with self._lock:
            for connection in self._open:
                _reset(connection)
            self._open.clear()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        try:
            if time.monotonic() < self._busy_until:
                self._refuse(client)
                return
            with socket.create_connection(self._upstream) as server:
                with self._lock:
                    limit = self._cuts.pop(0) if self._cuts else None
                    self._open |= {client, server}
                self._pipe(client, server, limit)
                with self._lock:
                    self._open -= {client, server}
        except OSError:
            pass
        finally:
            client.close()

    def _refuse(self, client: socket.socket) -> None:
        head = b""
        client.settimeout(5)
        while b"\r\n\r\n" not in head and (data := client.recv(65536)):
            head += data
        if not head:
            return
        self.requests_refused += 1
        body = f"<Error><Code>{self._busy_code}</Code><Message>Please try again.</Message></Error>".encode()
        client.sendall(
            b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nConnection: close\r\n"
            b"Content-Length: %d\r\n\r\n" % len(body) + (b"" if head.startswith(b"HEAD") else body)
        )
        client.shutdown(socket.SHUT_WR)
        while client.recv(65536):  # the rest of the request, else closing resets the connection under the answer
            pass

    def _pipe(self, client: socket.socket, server: socket.socket, limit: int | None) -> None:
        answered, drop = 0, False
        while True:
            ready, _, _ = select.select([client, server], [], [], 30)
            if not ready:
                return
            if client in ready:
                data = client.recv(65536)
                if not data:
                    return
                with self._lock:
                    for start in self._drop_answers_to:
                        if data.startswith(start):
                            self._drop_answers_to.remove(start)
                            drop = True
                            break
                server.sendall(data)
            if server in ready:
                data = server.recv(65536)
                if not data:
                    return
                if drop and b"100 Continue" not in data[:40]:
                    self.connections_cut += 1
                    _reset(client)
                    return
                if limit is not None and answered + len(data) > limit:
                    client.sendall(data[: limit - answered])
                    self.connections_cut += 1
                    client.shutdown(socket.SHUT_WR)
                    return
                answered += len(data)
                client.sendall(data)


def _reset(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


@dataclass
class WebServer:
    """An HTTP server of `files` by path, with etags and ranges unless told otherwise.

    `answers` maps a path to a status; `before` sees every request (method, path, headers) first.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    answers: dict[str, tuple[int, dict[str, str]]] = field(default_factory=dict)
    ranges: bool = True
    requests: list[tuple[str, str, Mapping[str, str]]] = field(default_factory=list)
    extra_headers: dict[str, str] = field(default_factory=dict)
    route: Callable[[str, Mapping[str, str]], tuple[int, dict[str, str], bytes] | None] | None = None

    def __post_init__(self) -> None:
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer._answer(self)

            do_HEAD = do_GET  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

            def handle(self) -> None:
                with contextlib.suppress(ConnectionError):  # the client went away, which some tests are about
                    super().handle()

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        self.endpoint = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        path = request.path
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.requests.append((request.command, path, headers))
        status, more, body = self._find(path, headers)
        request.send_response(status)
        for name, value in more.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if request.command != "HEAD":
            try:
                request.wfile.write(body)
            except OSError:
                request.close_connection = True

    def _find(self, path: str, headers: Mapping[str, str]) -> tuple[int, dict[str, str], bytes]:
        plain = urllib.parse.unquote(path.partition("?")[0])
        if plain in self.answers:
            status, more = self.answers[plain]
            return status, more, b""
        if self.route and (answer := self.route(path, headers)):
            return answer
        if plain not in self.files:
            return 404, {}, b"not here"
        body = self.files[plain]
        etag = f'"{hash(body) & (1 << 64) - 1:x}"'
        more = {"ETag": etag, **self.extra_headers}
        wanted = re.match(r"bytes=(\d+)-(\d*)", headers.get("range", ""))
        if not wanted or not self.ranges or headers.get("if-range", etag) != etag:
            return 200, more, body
        first, last = int(wanted[1]), int(wanted[2] or len(body) - 1)
        if first >= len(body):
            return 416, {**more, "Content-Range": f"bytes */{len(body)}"}, b""
        part = body[first : last + 1]
        return 206, {**more, "Content-Range": f"bytes {first}-{first + len(part) - 1}/{len(body)}"}, part


@dataclass
class HubRepository:
    files: dict[str, bytes]
    commit: str
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    token: str | None = None


class HubServer(WebServer):
    """The routes of the Hugging Face Hub that reading needs, for `repositories` by "ORG/NAME" or "datasets/ORG/NAME"."""

    def __init__(self, repositories: dict[str, HubRepository]) -> None:
        self.repositories = repositories
        super().__init__(route=self._hub)

    def _hub(self, path: str, headers: Mapping[str, str]) -> tuple[int, dict[str, str], bytes] | None:
        plain = urllib.parse.unquote(path.partition("?")[0])
        api = re.match(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?\Z", plain)
        if api:
            name = api[2] if api[1] == "models" else f"datasets/{api[2]}"
            kind, revision = api[3], api[4] or "main"
            repository, refusal = self._open(name, revision, headers)
            if refusal:
                return refusal
            assert repository
            if kind == "tree":
                tree = [
                    {"type": "file", "path": key, "size": len(body), "oid": f"{abs(hash(body)):040x}"[:40]}
                    for key, body in repository.files.items()
                ]
                return self._json(tree)
            return self._json({"id": api[2], "sha": repository.commit, "siblings": [], "tags": [], "private": False})
        resolve = re.match(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)\Z", plain)
        if resolve:
            repository, refusal = self._open(resolve[1], resolve[2], headers)
            if refusal:
                return refusal
            assert repository
            if resolve[3] not in repository.files:
                return 404, {"X-Error-Code": "EntryNotFound"}, b""
            body = repository.files[resolve[3]]
            return 200, {"ETag": f'"{abs(hash(body)):x}"', "X-Repo-Commit": repository.commit}, body
        return None

    def _open(
        self, name: str, revision: str, headers: Mapping[str, str]
    ) -> tuple[HubRepository | None, tuple[int, dict[str, str], bytes] | None]:
        repository = self.repositories.get(name)
        if repository is None:
            return None, (401, {"X-Error-Code": "RepoNotFound"}, b"")
        allowed = repository.token is not None and headers.get("authorization") == f"Bearer {repository.token}"
        if repository.gated and not allowed:
            status = 403 if "authorization" in headers else 401
            return None, (status, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}, b"")
        if revision not in ("main", repository.commit, *repository.branches):
            return None, (404, {"X-Error-Code": "RevisionNotFound"}, b"")
        return repository, None

    @staticmethod
    def _json(value: object) -> tuple[int, dict[str, str], bytes]:
        return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()
