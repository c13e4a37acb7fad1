"""Calls to the API server: raw JSON in and out, with the official client as transport (TLS, kubeconfig, service account tokens).

Nothing here retries: a failed call raises, and whoever called is level-triggered and comes again. Typed objects and the client's own
watch stay out of it: they take several times the time and memory, and the watch loses what a custom resource needs.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal
from urllib.parse import quote, urlencode, urlsplit

import orjson
import urllib3
from kubernetes.client.configuration import Configuration
from kubernetes.client.rest import RESTClientObject
from kubernetes.config import ConfigException, load_incluster_config, load_kube_config
from prometheus_client import Counter, Histogram

Object = dict[str, Any]
Operations = list[Object]
"""Of a JSON patch (RFC 6902)."""
PATCH_TYPES = {
    "merge": "application/merge-patch+json",
    "apply": "application/apply-patch+yaml",
    "json": "application/json-patch+json",
}
NO_RETRIES = urllib3.Retry(False)  # nor redirects
SUCCESS = range(200, 300)

REQUESTS = Counter(
    "rest_client_requests_total",
    "Calls to the API server; the code is <error> where no answer came",
    ["method", "verb", "resource", "code"],
)
DURATION = Histogram(
    "rest_client_request_duration_seconds",
    "Time of calls to the API server, watches aside",
    ["verb"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)


@dataclass(frozen=True)
class Resource:
    """A kind as the API server's paths name it."""

    group: str
    version: str
    plural: str
    kind: str

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    def path(self, namespace: str | None = None, name: str = "", subresource: str = "") -> str:
        parts = [f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"]
        if namespace:
            parts += ["namespaces", quote(namespace, safe="")]
        parts += [self.plural, *([quote(name, safe="")] if name else []), *([subresource] if subresource else [])]
        return "/".join(parts)


JOBS = Resource("batch", "v1", "jobs", "Job")
PODS = Resource("", "v1", "pods", "Pod")
LEASES = Resource("coordination.k8s.io", "v1", "leases", "Lease")
EVENTS = Resource("events.k8s.io", "v1", "events", "Event")


class ApiError(Exception):
    """A call that did not succeed.

    status: the HTTP status, 0 where no answer came.
    reason: metav1.Status.reason (Forbidden, Invalid …), or Unreachable.
    retry_after: seconds that the server asked to wait.
    """

    def __init__(self, status: int, reason: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(f"{reason} ({status}): {message}" if status else f"{reason}: {message}")
        self.status, self.reason, self.message, self.retry_after = status, reason, message, retry_after


class NotFound(ApiError):
    """404."""


class Conflict(ApiError):
    """409: the object has changed since it was read."""


class AlreadyExists(ApiError):
    """409: the name is taken."""


class Gone(ApiError):
    """410: the resourceVersion or continue token is too old; list again."""


class NotLeading(ApiError):
    """A write that was not sent, because this process does not hold the lease (or can't be sure that it does)."""


class Watch:
    """An open stream of watch events. Iterate once; `close` may be called from another thread and ends the iteration."""

    def __init__(self, response: urllib3.BaseHTTPResponse) -> None:
        self._response = response
        self._closed = False

    def __iter__(self) -> Iterator[Object]:
        """Events, {"type": ADDED | MODIFIED | DELETED | BOOKMARK, "object": …}, until the server or `close` ends the stream.

        Raises:
            Gone: the resourceVersion is too old.
            ApiError: any other end.
        """
        rest = b""
        try:
            for data in self._response.stream(1 << 16, decode_content=True):
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    if line:
                        event = orjson.loads(line)
                        if event["type"] == "ERROR":
                            raise _error(event["object"].get("code", 500), event["object"], None)
                        yield event
        except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            if not self._closed:
                raise ApiError(0, "Unreachable", f"the watch was cut: {error}") from None
        finally:
            self._response.close()

    def close(self) -> None:
        self._closed = True
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # it has ended by itself
            self._response.shutdown()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._response.close()


class Api:
    """The API server, for any number of threads.

    guard: asked right before every write; where it says no the write is not sent and NotLeading is raised. What is on its way already
        can't be called back, so a caller's writes must do no harm when they come late: a resourceVersion, a name that can be there
        once, a uid to delete.
    timeout: seconds a call may take to connect, and between two pieces of its answer.
    connections: how many are kept open: the workers and the watches.
    """

    def __init__(
        self,
        configuration: Configuration,
        *,
        user_agent: str,
        connections: int = 16,
        timeout: float = 30,
        guard: Callable[[], bool] | None = None,
    ) -> None:
        configuration.connection_pool_maxsize = connections
        configuration.keep_alive = True
        self._configuration = configuration
        # The client's own request() adds nothing but time to what its pool does, a fifth of a call's.
        self._pool = RESTClientObject(configuration).pool_manager.connection_from_url(configuration.host)
        self._prefix = urlsplit(configuration.host).path.rstrip("/")
        self._headers = {"User-Agent": user_agent, "Accept": "application/json"}
        self._timeout = timeout
        self._guard = guard

    @classmethod
    def connect(
        cls,
        kubeconfig: Path | None = None,
        *,
        user_agent: str,
        connections: int = 16,
        timeout: float = 30,
        guard: Callable[[], bool] | None = None,
    ) -> Api:
        """By `kubeconfig`, else $KUBECONFIG, else the pod's service account, else ~/.kube/config.

        Raises:
            ConfigException (kubernetes.config): there is none of them, or it can't be read.
        """
        configuration = Configuration()
        if kubeconfig is None and "KUBECONFIG" not in os.environ and "KUBERNETES_SERVICE_HOST" in os.environ:
            load_incluster_config(configuration)
        else:
            file = None if kubeconfig is None else str(kubeconfig)
            load_kube_config(file, client_configuration=configuration, persist_config=False)
        return cls(configuration, user_agent=user_agent, connections=connections, timeout=timeout, guard=guard)

    def get(self, resource: Resource, namespace: str | None, name: str) -> Object:
        return self._call("get", "GET", resource, resource.path(namespace, name))

    def list_pages(
        self,
        resource: Resource,
        namespace: str | None = None,
        *,
        label_selector: str = "",
        field_selector: str = "",
        limit: int = 500,
    ) -> Iterator[Object]:
        """List objects page by page, {"metadata": {"resourceVersion": …}, "items": […]}, all of one moment.

        Raises:
            Gone: paging took so long (minutes) that the moment is forgotten.
        """
        query = {"labelSelector": label_selector, "fieldSelector": field_selector, "limit": str(limit)}
        while True:
            page = self._call("list", "GET", resource, resource.path(namespace), query)
            for item in page["items"]:  # lists of built-in kinds leave these two out
                item["apiVersion"], item["kind"] = resource.api_version, resource.kind
            yield page
            token = page["metadata"].get("continue")
            if not token:
                return
            query["continue"] = token

    def list(
        self,
        resource: Resource,
        namespace: str | None = None,
        *,
        label_selector: str = "",
        field_selector: str = "",
        limit: int = 500,
    ) -> list[Object]:
        pages = self.list_pages(
            resource, namespace, label_selector=label_selector, field_selector=field_selector, limit=limit
        )
        return [item for page in pages for item in page["items"]]

    def create(self, resource: Resource, namespace: str | None, body: Object) -> Object:
        """Raises: AlreadyExists."""
        return self._call("create", "POST", resource, resource.path(namespace), body=body)

    def patch(
        self,
        resource: Resource,
        namespace: str | None,
        name: str,
        body: Object | Operations,
        *,
        kind: Literal["merge", "apply", "json"] = "merge",
        subresource: str = "",
        field_manager: str = "",
    ) -> Object:
        """`apply` is a server-side apply that takes over fields of others (force) and needs `field_manager`.

        Raises: NotFound; Conflict where the body holds an old metadata.resourceVersion.
        """
        query = {"fieldManager": field_manager, "force": "true" if kind == "apply" else ""}
        path = resource.path(namespace, name, subresource)
        return self._call("patch", "PATCH", resource, path, query, body, PATCH_TYPES[kind], subresource=subresource)

    def replace(
        self, resource: Resource, namespace: str | None, name: str, body: Object, *, subresource: str = ""
    ) -> Object:
        """Raises: NotFound; Conflict where the body holds an old metadata.resourceVersion."""
        path = resource.path(namespace, name, subresource)
        return self._call("update", "PUT", resource, path, body=body, subresource=subresource)

    def delete(
        self,
        resource: Resource,
        namespace: str | None,
        name: str,
        *,
        uid: str | None = None,
        propagation: Literal["Background", "Foreground", "Orphan"] = "Background",
        grace_seconds: int | None = None,
    ) -> None:
        """Raises: NotFound; Conflict where `uid` is another object's."""
        body: Object = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": propagation}
        if uid is not None:
            body["preconditions"] = {"uid": uid}
        if grace_seconds is not None:
            body["gracePeriodSeconds"] = grace_seconds
        self._call("delete", "DELETE", resource, resource.path(namespace, name), body=body)

    def watch(
        self,
        resource: Resource,
        namespace: str | None = None,
        *,
        resource_version: str,
        label_selector: str = "",
        field_selector: str = "",
        timeout_seconds: int,
        read_timeout: float | None = None,
    ) -> Watch:
        """What happens after `resource_version`, bookmarks included, for at most `timeout_seconds` by the server's clock.

        read_timeout: the silence after which the connection counts as cut; ten seconds more than the server's time, where none is given.
            Bookmarks can't be counted on: the server sends none of a kind that has not changed since it started.

        Raises:
            Gone: the resourceVersion is too old (it may also be raised while iterating).
        """
        query = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": resource_version,
            "timeoutSeconds": str(timeout_seconds),
            "labelSelector": label_selector,
            "fieldSelector": field_selector,
        }
        silence = timeout_seconds + 10 if read_timeout is None else read_timeout
        timeout = (min(self._timeout, 10.0), silence)
        response = self._send("watch", "GET", resource, resource.path(namespace), query, watch_timeout=timeout)
        return Watch(response)

    def close(self) -> None:
        self._pool.close()

    def _call(
        self,
        verb: str,
        method: str,
        resource: Resource,
        path: str,
        query: dict[str, str] | None = None,
        body: object = None,
        content_type: str = "application/json",
        *,
        subresource: str = "",
    ) -> Object:
        started = time.monotonic()
        response = self._send(verb, method, resource, path, query, body, content_type, subresource=subresource)
        DURATION.labels(verb).observe(time.monotonic() - started)
        try:
            answer: Object = orjson.loads(response.data)
        except ValueError as error:
            raise ApiError(0, "Unreachable", f"{method} {path}: the answer is no JSON: {error}") from None
        return answer

    def _send(
        self,
        verb: str,
        method: str,
        resource: Resource,
        path: str,
        query: dict[str, str] | None = None,
        body: object = None,
        content_type: str = "application/json",
        *,
        subresource: str = "",
        watch_timeout: tuple[float, float] | None = None,
    ) -> urllib3.BaseHTTPResponse:
        """A successful response; of a watch the body is not read yet."""
        headers = dict(self._headers)
        if bearer := self._configuration.auth_settings().get("BearerToken"):
            headers["Authorization"] = str(bearer["value"])  # asked each time: service account tokens change every hour
        if body is not None:
            headers["Content-Type"] = content_type
        url = self._prefix + path
        if filled := {key: value for key, value in (query or {}).items() if value}:
            url += "?" + urlencode(filled)
        counted = f"{resource.plural}/{subresource}" if subresource else resource.plural
        if self._guard and method != "GET" and not self._guard():
            raise NotLeading(0, "NotLeading", f"{method} {path} was not sent: this process does not hold the lease")
        connect, read = watch_timeout or (min(self._timeout, 10.0), self._timeout)
        try:
            response = self._pool.urlopen(
                method,
                url,
                body=None if body is None else orjson.dumps(body),
                headers=headers,
                retries=NO_RETRIES,
                timeout=urllib3.Timeout(connect=connect, read=read),
                preload_content=watch_timeout is None,
            )
            data = b"" if response.status in SUCCESS else response.data
        except (urllib3.exceptions.HTTPError, OSError) as error:
            REQUESTS.labels(method, verb, counted, "<error>").inc()
            raise ApiError(0, "Unreachable", f"{method} {path}: {error}") from None
        status = response.status
        REQUESTS.labels(method, verb, counted, str(status)).inc()
        if status in SUCCESS:
            return response
        try:
            document = orjson.loads(data)
        except ValueError:
            document = {"message": data[:300].decode(errors="replace").strip()}
        raise _error(status, document, response.headers.get("Retry-After"))


def _error(status: int, document: object, retry_after: str | None) -> ApiError:
    """The exception for an answer; `document` is a metav1.Status where the API server itself answered."""
    fields = document if isinstance(document, dict) else {}
    reason = str(
        fields.get("reason")
        or {404: "NotFound", 409: "Conflict", 410: "Gone", 429: "TooManyRequests"}.get(status, "Unknown")
    )
    message = str(fields.get("message") or f"HTTP status {status}")
    seconds = float(retry_after) if retry_after and retry_after.isdigit() else None
    if seconds is None and isinstance(details := fields.get("details"), dict) and details.get("retryAfterSeconds"):
        seconds = float(details["retryAfterSeconds"])
    kinds: dict[int, type[ApiError]] = {404: NotFound, 409: Conflict, 410: Gone}
    kind = AlreadyExists if reason == "AlreadyExists" else kinds.get(status, ApiError)
    return kind(status, reason, message, seconds)


__all__ = [
    "EVENTS", "JOBS", "LEASES", "PODS", "AlreadyExists", "Api", "ApiError", "ConfigException", "Conflict", "Gone", "NotFound",
    "NotLeading", "Object", "Resource", "Watch",
]  # fmt: skip
