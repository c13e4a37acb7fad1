"""A real Kubernetes control plane for tests: etcd, API server, controller manager and scheduler, started in seconds, gone when closed.

No node is in it: pods stay Pending unless `tests.cluster.node` or `tests.cluster.simulated` adds one. Everything lies in one temporary
folder and listens on one address with a certificate authority of its own. Needs no root.
"""

import base64
import contextlib
import datetime
import ipaddress
import json
import os
import signal
import socket
import ssl
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import yaml

from tests.cluster import build
from tests.cluster.keeper import Keeper
from tests.cluster.pki import Authority
from tests.servers import free_port

COMPONENTS = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler")
RUNNING: "list[ControlPlane]" = []
"""Those that are up; a failing test shows their logs."""

SCALE: dict[str, list[str]] = {
    "kube-apiserver": ["--max-requests-inflight=2000", "--max-mutating-requests-inflight=1000"],
    "kube-controller-manager": ["--kube-api-qps=1000", "--kube-api-burst=2000", "--concurrent-job-syncs=20"],
}
"""Arguments for thousands of objects: with the defaults, the controllers' own limits are what a test would measure."""


class ControlPlane:
    """A running control plane.

    Attributes:
        url: of the API server, https.
        ca: file with the certificate that signed its.
        kubeconfig: of an administrator (group system:masters).
        folder: of everything it has; `logs/` below it holds one file for each component.
    """

    def __init__(
        self,
        *,
        address: str = "127.0.0.1",
        service_cidr: str = "10.96.0.0/16",
        audit: bool = False,
        arguments: Mapping[str, Sequence[str]] | None = None,
        keeper: Keeper | None = None,
        folder: Path | None = None,
    ) -> None:
        """Start one, and return when it answers and its controllers run.

        Args:
            address: what the API server listens on; pods must be able to reach it.
            service_cidr: addresses of Services.
            audit: whether every API call is written down, for `api_calls`.
            arguments: more of them by component, such as `SCALE`.
            keeper: keeps the processes where the cluster has more of them; and then `folder` is its folder.

        Raises:
            RuntimeError: a component did not start; the end of its log is in the message.
        """
        for component in (*COMPONENTS, "kubectl"):
            build.program(component)
        self.folder = folder or Path(tempfile.mkdtemp(prefix="kubepeft-cluster-"))
        self.keeper = keeper or Keeper(self.folder)
        self.address, self.service_cidr, self.audit = address, service_cidr, audit
        self.logs = self.folder / "logs"
        self.logs.mkdir(exist_ok=True)
        self._arguments = arguments or {}
        self._processes: dict[str, int] = {}
        RUNNING.append(self)
        try:
            self._set_up()
            for component in COMPONENTS:
                self.start(component)
            self._wait_for_controllers()
        except BaseException:
            self.close()
            raise

    def _set_up(self) -> None:
        self._etcd_port, self._etcd_peer_port, self.port = free_port(), free_port(), free_port(self.address)
        self.url = f"https://{self.address}:{self.port}"
        self.authority = authority = Authority(self.folder / "pki")
        self.ca = authority.ca
        first_service = str(next(ipaddress.ip_network(self.service_cidr).hosts()))
        names = ["localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc", self.address, first_service]
        authority.issue("etcd", "etcd", hosts=["localhost", "127.0.0.1"])
        authority.issue("apiserver", "kube-apiserver", hosts=[*names, "kubernetes.default.svc.cluster.local"])
        authority.issue("apiserver-etcd", "kube-apiserver")
        authority.issue("apiserver-kubelet", "kube-apiserver", groups=["system:masters"])
        authority.key_pair("service-accounts")
        self.kubeconfig = self.kubeconfig_for("admin", ["system:masters"])
        self._administrator = ssl.create_default_context(cafile=self.ca)
        self._administrator.load_cert_chain(self.folder / "pki/user-admin.crt", self.folder / "pki/user-admin.key")
        # Administrators: with rights of their own, which the API server takes a while to know, their start takes seconds longer.
        self._controllers = self.kubeconfig_for("system:kube-controller-manager", ["system:masters"])
        (self.folder / "audit.yaml").write_text(yaml.safe_dump(_AUDIT_POLICY))
        scheduler = {
            "apiVersion": "kubescheduler.config.k8s.io/v1",
            "kind": "KubeSchedulerConfiguration",
            "leaderElection": {"leaderElect": False},
            "clientConnection": {
                "kubeconfig": str(self.kubeconfig_for("system:kube-scheduler", ["system:masters"])),
                "qps": 1000,
                "burst": 2000,
            },
        }
        (self.folder / "scheduler.yaml").write_text(yaml.safe_dump(scheduler))

    # Components

    def start(self, component: str) -> None:
        """Start a component that does not run; returns when it is ready (the controllers and the scheduler: at once)."""
        if component in self._processes:
            raise RuntimeError(f"{component} runs already")
        argv = [*self._command(component), *self._arguments.get(component, ())]
        self._processes[component] = self.keeper.start(argv, self.log(component))
        if component == "etcd":
            self._wait_for(component, lambda: _listens("127.0.0.1", self._etcd_port))
        if component == "kube-apiserver":
            self._wait_for(component, self.is_ready)

    def stop(self, component: str, signal_number: int = signal.SIGTERM, timeout: float = 60) -> None:
        """End a component and wait until its process is gone. The API server takes a few seconds after SIGTERM."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid(component), signal_number)
        pid = self._processes.pop(component)
        deadline = time.monotonic() + timeout
        while self.keeper.exit_code(pid) is None:
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"{component} did not end within {timeout:g} s of signal {signal_number}\n{self.tail(component)}"
                )
            time.sleep(0.02)

    def restart_api_server(self, signal_number: int = signal.SIGTERM) -> None:
        """The API server goes away and comes back at the same address."""
        self.stop("kube-apiserver", signal_number)
        self.start("kube-apiserver")

    def pid(self, component: str) -> int:
        """For signals such as SIGSTOP."""
        return self._processes[component]

    def close(self) -> None:
        """Kill everything and remove the folder."""
        if self in RUNNING:
            RUNNING.remove(self)
        self.keeper.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Who talks to it

    def kubeconfig_for(self, user: str, groups: Sequence[str] = ()) -> Path:
        """A kubeconfig with a client certificate for this user of these groups."""
        file = f"user-{user.replace(':', '-').replace('/', '-')}"
        certificate, key = self.authority.issue(file, user, groups=groups)
        return self._write_kubeconfig(
            file, {"client-certificate-data": _base64(certificate), "client-key-data": _base64(key)}
        )

    def service_account_token(self, namespace: str, name: str, seconds: int = 3600) -> str:
        """A token of a service account that exists."""
        return self.kubectl("create", "token", name, "--namespace", namespace, f"--duration={seconds}s").strip()

    def kubeconfig_for_service_account(self, namespace: str, name: str) -> Path:
        """A kubeconfig with a token of a service account that exists."""
        return self._write_kubeconfig(f"sa-{namespace}-{name}", {"token": self.service_account_token(namespace, name)})

    def _write_kubeconfig(self, file: str, user: dict[str, str]) -> Path:
        path = self.folder / f"{file}.kubeconfig"
        path.touch(mode=0o600)
        cluster = {"server": self.url, "certificate-authority-data": _base64(self.ca)}
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": "user", "user": user}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "user"}}],
            "current-context": "test",
        }
        path.write_text(yaml.safe_dump(content))
        return path

    def kubectl(
        self, *arguments: str, input: str | None = None, kubeconfig: Path | None = None, timeout: float = 120
    ) -> str:
        """What kubectl prints.

        Raises:
            RuntimeError: it failed; the message is what it said.
        """
        return self._client("kubectl", *arguments, input=input, kubeconfig=kubeconfig, timeout=timeout)

    def helm(self, *arguments: str, kubeconfig: Path | None = None, timeout: float = 300) -> str:
        """What helm prints.

        Raises:
            RuntimeError: it failed; the message is what it said.
        """
        return self._client("helm", *arguments, input=None, kubeconfig=kubeconfig, timeout=timeout)

    def _client(self, program: str, *arguments: str, input: str | None, kubeconfig: Path | None, timeout: float) -> str:
        done = subprocess.run(
            [build.program(program), *arguments],
            input=input,
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, "HOME": str(self.folder), "KUBECONFIG": str(kubeconfig or self.kubeconfig)},
        )
        if done.returncode:
            raise RuntimeError(f"{program} {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def apply(self, *objects: dict[str, Any]) -> None:
        """Server-side apply of plain objects."""
        if objects:
            self.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", input=yaml.safe_dump_all(objects))

    def request(self, path: str, method: str = "GET", body: Any = None, content_type: str = "application/json") -> Any:
        """The API server's answer to an administrator, as plain data; much quicker than a kubectl.

        Raises:
            urllib.error.HTTPError: it refused.
        """
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": content_type, "Accept": "application/json"}
        asked = urllib.request.Request(self.url + path, data=data, headers=headers, method=method)
        with urllib.request.urlopen(asked, timeout=30, context=self._administrator) as answer:
            return json.load(answer)

    # What it did

    def log(self, component: str) -> Path:
        """The log file of a component."""
        return self.logs / f"{component}.log"

    def tail(self, component: str, lines: int = 20) -> str:
        """The end of a component's log."""
        file = self.log(component)
        text = file.read_text(errors="replace") if file.exists() else ""
        return "\n".join(text.splitlines()[-lines:])

    def api_calls(
        self, *, user: str | None = None, user_agent: str | None = None, since: float = 0
    ) -> list[dict[str, Any]]:
        """Audit events (https://kubernetes.io/docs/reference/config-api/apiserver-audit.v1/) of calls that were answered.

        A call is in it when its answer is complete, a watch when it has begun.

        Args:
            user: name of the user.
            user_agent: how the user agent begins.
            since: seconds of the epoch.
        """
        if not self.audit:
            raise RuntimeError("this control plane keeps no audit log: start it with audit=True")
        with open(self.folder / "audit.log") as file:
            events = [json.loads(line) for line in file if line.endswith("\n")]
        return [
            event
            for event in events
            if (event["stage"] == "ResponseStarted") == (event["verb"] == "watch")
            and user in (None, event["user"]["username"])
            and event.get("userAgent", "").startswith(user_agent or "")
            and _epoch(event["requestReceivedTimestamp"]) >= since
        ]

    def is_ready(self) -> bool:
        """Whether the API server says that it is."""
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"{self.url}/readyz", timeout=5, context=self._administrator) as answer,
        ):
            return bool(answer.status == 200)
        return False

    # Within

    def _command(self, component: str) -> list[str | Path]:
        return [build.BIN / component, *self._flags(component)]

    def _flags(self, component: str) -> list[str]:
        pki = self.folder / "pki"
        match component:
            case "etcd":
                client, peer = f"https://127.0.0.1:{self._etcd_port}", f"http://127.0.0.1:{self._etcd_peer_port}"
                return [
                    f"--data-dir={self.folder / 'etcd'}",
                    f"--listen-client-urls={client}",
                    f"--advertise-client-urls={client}",
                    f"--listen-peer-urls={peer}",
                    f"--initial-advertise-peer-urls={peer}",
                    f"--initial-cluster=default={peer}",
                    f"--cert-file={pki / 'etcd.crt'}",
                    f"--key-file={pki / 'etcd.key'}",
                    f"--trusted-ca-file={self.ca}",
                    "--client-cert-auth",
                    "--unsafe-no-fsync",  # outlives a kill of the process, not of the machine: all that a test needs
                    "--quota-backend-bytes=8589934592",  # as etcd suggests for large clusters; bench/scale.py writes that much
                    "--log-level=warn",
                ]
            case "kube-apiserver":
                loopback = self.address.startswith("127.")
                return [
                    f"--etcd-servers=https://127.0.0.1:{self._etcd_port}",
                    f"--etcd-cafile={self.ca}",
                    f"--etcd-certfile={pki / 'apiserver-etcd.crt'}",
                    f"--etcd-keyfile={pki / 'apiserver-etcd.key'}",
                    f"--bind-address={self.address}",
                    f"--secure-port={self.port}",
                    # A loopback address must not be advertised, and without nodes nobody reads the advertised one.
                    f"--advertise-address={'192.0.2.1' if loopback else self.address}",
                    f"--tls-cert-file={pki / 'apiserver.crt'}",
                    f"--tls-private-key-file={pki / 'apiserver.key'}",
                    f"--client-ca-file={self.ca}",
                    f"--kubelet-client-certificate={pki / 'apiserver-kubelet.crt'}",
                    f"--kubelet-client-key={pki / 'apiserver-kubelet.key'}",
                    f"--kubelet-certificate-authority={self.ca}",
                    "--kubelet-preferred-address-types=InternalIP",
                    "--authorization-mode=Node,RBAC",
                    # The second one is OpenShift's default: who sets blockOwnerDeletion must be allowed to set the owner's finalizers.
                    "--enable-admission-plugins=NodeRestriction,OwnerReferencesPermissionEnforcement",
                    "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
                    f"--service-account-signing-key-file={pki / 'service-accounts.key'}",
                    f"--service-account-key-file={pki / 'service-accounts.pub'}",
                    f"--service-cluster-ip-range={self.service_cidr}",
                    "--profiling=false",
                    "--shutdown-watch-termination-grace-period=1s",  # else open watches hold a stop up for a minute
                    *([f"--audit-policy-file={self.folder / 'audit.yaml'}"] if self.audit else []),
                    *([f"--audit-log-path={self.folder / 'audit.log'}"] if self.audit else []),
                ]
            case "kube-controller-manager":
                return [
                    f"--kubeconfig={self._controllers}",
                    f"--service-account-private-key-file={pki / 'service-accounts.key'}",
                    f"--root-ca-file={self.ca}",
                    "--leader-elect=false",
                    "--secure-port=0",
                ]
            case "kube-scheduler":
                return [f"--config={self.folder / 'scheduler.yaml'}", "--secure-port=0"]
        raise ValueError(f"no component is called {component}: there are {', '.join(COMPONENTS)}")

    def _wait_for(self, component: str, ready: Any, timeout: float = 60) -> None:
        deadline = time.monotonic() + timeout
        while not ready():
            code = self.keeper.exit_code(self._processes[component])
            if code is not None or time.monotonic() > deadline:
                what = f"did not get ready in {timeout:g} s" if code is None else f"ended with code {code}"
                raise RuntimeError(f"{component} {what}; the end of its log:\n{self.tail(component)}")
            time.sleep(0.05)

    def _wait_for_controllers(self) -> None:
        """They run when the first namespace has its default service account."""

        def has_account() -> bool:
            with contextlib.suppress(urllib.error.HTTPError):
                self.request("/api/v1/namespaces/default/serviceaccounts/default")
                return True
            return False

        self._wait_for("kube-controller-manager", has_account)


_AUDIT_POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [{"level": "Metadata"}],
}


def is_ready(node: Mapping[str, Any]) -> bool:
    """Whether a Node says that it is Ready."""
    return any(one["type"] == "Ready" and one["status"] == "True" for one in node["status"].get("conditions", []))


def _listens(address: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=1):
        return True
    return False


def _base64(file: Path) -> str:
    return base64.b64encode(file.read_bytes()).decode()


def _epoch(timestamp: str) -> float:
    return datetime.datetime.fromisoformat(timestamp).timestamp()


def control_plane_logs(lines: int = 20) -> Iterator[tuple[str, str]]:
    """Component and the end of its log, for every control plane that runs."""
    for cluster in RUNNING:
        for file in sorted(cluster.logs.glob("*.log")):
            yield f"{file.stem} ({cluster.url})", cluster.tail(file.stem, lines)
