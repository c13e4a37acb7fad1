"""A proxy in front of a real API server that makes faults on request: silence, cuts, refusals, answers of its own.

Clients speak plain HTTP to it; to the server it is the kubeconfig's user. What it is not told to spoil, it passes on byte by byte.
"""

import contextlib
import select
import socket
import ssl
import threading
import time
import urllib.parse
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml


@dataclass(frozen=True)
class Request:
    method: str
    target: str
    body: bytes
    at: float
    """time.monotonic()"""

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    @property
    def watches(self) -> bool:
        return "watch=true" in self.target


@dataclass(frozen=True)
class Answer:
    """In place of the server's. `forwarded`: the server gets the request all the same. `cut`: the connection ends without a word."""

    status: int = 500
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""
    forwarded: bool = False
    cut: bool = False


class ApiProxy:
    """`kubeconfig` leads through it. `requests` holds all that came, in order.

    rule: sees every request and may give an answer of its own; None passes the request on.
    """

    def __init__(self, url: str, ca: Path, certificate: Path, key: Path, folder: Path) -> None:
        self.rule: Callable[[Request], Answer | None] = lambda request: None
        self.requests: list[Request] = []
        parts = urllib.parse.urlsplit(url)
        self._upstream = (parts.hostname or "", parts.port or 443)
        self._tls = ssl.create_default_context(cafile=str(ca))
        self._tls.load_cert_chain(certificate, key)
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._connections = 0
        self._silent_up_to = 0.0
        self._watch_lag = 0.0
        self._listener: socket.socket | None = None
        self.port = 0
        self.accept()
        self.url = f"http://127.0.0.1:{self.port}"
        self.kubeconfig = folder / f"proxy-{self.port}.kubeconfig"
        self.kubeconfig.write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "clusters": [{"name": "proxy", "cluster": {"server": self.url}}],
                    "users": [{"name": "nobody", "user": {}}],
                    "contexts": [{"name": "proxy", "context": {"cluster": "proxy", "user": "nobody"}}],
                    "current-context": "proxy",
                }
            )
        )

    def silence_open(self) -> None:
        """Not a byte passes on the connections that are open now, and they stay open, until `resume`. New ones work."""
        self._silent_up_to = self._connections

    def silence(self) -> None:
        """The same for new connections too."""
        self._silent_up_to = float("inf")

    def resume(self) -> None:
        """What was held back flows on."""
        self._silent_up_to = 0.0

    def cut(self) -> None:
        """Ends all open connections."""
        with self._lock:
            for one in self._open:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)

    def refuse(self) -> None:
        """New connections are refused, open ones are cut."""
        if listener := self._listener:
            self._listener = None
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes the accept(), which else keeps the port open
            listener.close()
        self.cut()

    def accept(self) -> None:
        """Connections are taken (again, at the same port)."""
        self._listener = socket.create_server(("127.0.0.1", self.port), reuse_port=False)
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def lag_watches(self, seconds: float) -> None:
        """Everything that watches say comes so much later."""
        self._watch_lag = seconds

    def close(self) -> None:
        self.refuse()

    def __enter__(self) -> "ApiProxy":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        try:
            with (
                socket.create_connection(self._upstream, timeout=10) as plain,
                self._tls.wrap_socket(plain, server_hostname=self._upstream[0]) as server,
            ):
                server.settimeout(None)
                with self._lock:
                    self._open |= {client, server}
                    self._connections += 1
                    number = self._connections
                try:
                    self._pipe(client, server, number)
                finally:
                    with self._lock:
                        self._open -= {client, server}
        except OSError:
            pass
        finally:
            client.close()

    def _pipe(self, client: socket.socket, server: ssl.SSLSocket, number: int) -> None:
        """One thread for both directions: OpenSSL's connections are not for two."""
        asked = b""
        held: deque[tuple[float, bytes]] = deque()  # when it may go to the client, and what
        watching, instead = False, None
        while True:
            if number <= self._silent_up_to:
                time.sleep(0.02)
                continue
            while held and held[0][0] <= time.monotonic():
                client.sendall(held.popleft()[1])
            ready, _, _ = select.select([client, server], [], [], 0 if server.pending() else 0.02)
            if client in ready:
                data = client.recv(1 << 16)
                if not data:
                    return
                asked += data
                while parsed := _first_request(asked):
                    request, raw, asked = parsed
                    self.requests.append(request)
                    watching, instead = request.watches, self.rule(request)
                    if instead is None or instead.forwarded:
                        server.sendall(raw)
                    elif self._answer(client, instead):
                        return
            if server in ready or server.pending():
                try:
                    server.setblocking(False)
                    data = server.recv(1 << 16)
                except ssl.SSLWantReadError:  # a session ticket, which is no data
                    continue
                finally:
                    server.setblocking(True)
                if instead is not None:
                    self._answer(client, instead)
                    return
                if data:
                    held.append((time.monotonic() + (self._watch_lag if watching else 0), data))
                else:
                    while held:
                        client.sendall(held.popleft()[1])
                    return

    @staticmethod
    def _answer(client: socket.socket, answer: Answer) -> bool:
        """Gives an answer of the proxy's own; returns whether the connection must end."""
        if not answer.cut:
            head = f"HTTP/1.1 {answer.status} Fault\r\nContent-Length: {len(answer.body)}\r\n"
            head += "".join(f"{name}: {value}\r\n" for name, value in answer.headers)
            client.sendall(head.encode() + b"\r\n" + answer.body)
        return answer.cut


def _first_request(data: bytes) -> tuple[Request, bytes, bytes] | None:
    """The first whole request in `data`, its bytes, and what follows it."""
    head, found, _ = data.partition(b"\r\n\r\n")
    if not found:
        return None
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    start = len(head) + 4
    end = start + int(headers.get("content-length", 0))
    if len(data) < end:
        return None
    method, target, _ = first.split(" ")
    return Request(method, target, data[start:end], time.monotonic()), data[:end], data[end:]
