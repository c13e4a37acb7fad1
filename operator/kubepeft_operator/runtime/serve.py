"""/metrics on one port; /healthz and /readyz, which tell the truth, on another. Both on IPv4 and IPv6, where the machine has them."""

from __future__ import annotations

import http.server
import logging
import socket
import socketserver
import sys
import threading
from collections.abc import Callable, Sequence

from prometheus_client import MetricsHandler

log = logging.getLogger(__name__)

EVERYWHERE = "::" if socket.has_dualstack_ipv6() else "0.0.0.0"

Check = Callable[[], str | None]
"""Says what is wrong, or None."""


class Server(http.server.ThreadingHTTPServer):
    """Serves from the start, on threads of its own. `port` 0 takes a free one; `port` then holds it."""

    daemon_threads = True

    def __init__(self, port: int, handler: type[http.server.BaseHTTPRequestHandler], address: str) -> None:
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        super().__init__((address, port), handler)
        self.port = int(self.server_address[1])
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True).start()

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        socketserver.TCPServer.server_bind(self)  # HTTPServer's own asks the DNS for a name that nobody needs

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # which is a client that went away
            log.exception("a defect in answering a request")

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


class MetricsServer(Server):
    """Serves prometheus_client's registry."""

    def __init__(self, port: int, address: str = EVERYWHERE) -> None:
        super().__init__(port, MetricsHandler, address)


class HealthServer(Server):
    """Answers 200, or 503 with a line for each thing that is wrong.

    healthy: a kubelet restarts the pod when one of these finds something.
    ready: those, and what else must be so before the pod counts as up.
    """

    def __init__(
        self, port: int, *, healthy: Sequence[Check], ready: Sequence[Check], address: str = EVERYWHERE
    ) -> None:
        checks = {"/healthz": list(healthy), "/readyz": [*healthy, *ready]}

        class Handler(http.server.BaseHTTPRequestHandler):
            timeout = 10  # seconds; a client that says nothing is let go

            def do_GET(self) -> None:
                found = checks.get(self.path.partition("?")[0])
                if found is None:
                    self._answer(404, "here are /healthz and /readyz")
                    return
                wrong = [words for check in found if (words := check())]
                if wrong:
                    log.warning("%s: %s", self.path, "; ".join(wrong))
                self._answer(503 if wrong else 200, "\n".join(wrong) or "ok")

            def _answer(self, status: int, text: str) -> None:
                body = f"{text}\n".encode()
                self.send_response(status)
                self.send_header("Content-Type", "text/plain; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(port, Handler, address)
