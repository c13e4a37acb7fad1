"""A Kubernetes cluster of one real node: kubelet, containerd, runc, CNI, kube-proxy and CoreDNS beside a control plane.

The node lives in namespaces of its own (processes, mounts, network), so it changes nothing on the machine and ends with its first process:
no mount, network device, route or firewall rule is left. One pair of devices joins it to the machine, in both directions: pods reach servers
of the machine at `host_address`, also by the name `HOST_NAME`, and the machine reaches pods and Services at their own addresses.
NetworkPolicies are accepted and not enforced. Needs root on Linux.
"""

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
import time
import urllib.error
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.cluster import build, images
from tests.cluster.build import CannotBuild
from tests.cluster.control_plane import ControlPlane, is_ready
from tests.cluster.keeper import CGROUPS, Keeper

NODE = "node"
HOST_NAME = "host.test"
GPUS = 2
COMPONENTS = ("containerd", "coredns", "kube-proxy", "kubelet")
_SOCKET = "/run/containerd/containerd.sock"
_TOOLS = {
    "ip": "iproute2",
    "nft": "nftables",
    "unshare": "util-linux",
    "/usr/lib/cni/ptp": "containernetworking-plugins",
}
_CLUSTERS = 64


class Cluster(ControlPlane):
    """A running cluster with one node, called `NODE`, that says it has `GPUS` GPUs.

    Attributes:
        host_address: of this machine as pods see it; tests' servers listen on it.
        node_address: of the node.
    """

    def __init__(
        self,
        *,
        audit: bool = False,
        arguments: Mapping[str, Sequence[str]] | None = None,
        gpus: int = GPUS,
        images_kept: bool = True,
    ) -> None:
        """Start one; returns when the node is Ready and shows its GPUs.

        Args:
            audit: as for ControlPlane.
            arguments: as for ControlPlane, and for the node's components.
            gpus: how many `nvidia.com/gpu` the node has.
            images_kept: whether the images in its containerd outlive the cluster, for the next one: loading takes minutes.

        Raises:
            CannotBuild: the machine lacks something; the message says what.
            RuntimeError: a component did not start.
        """
        _check_machine()
        for program in (*COMPONENTS, "ctr", "containerd-shim-runc-v2", "runc", "pause"):
            build.program(program)
        pause_image = images.build_pause()
        self.gpus = gpus
        folder = Path(tempfile.mkdtemp(prefix="kubepeft-cluster-"))
        self._cgroup = folder.name
        self._store, lock = _image_store(folder) if images_kept else (folder / "containerd", None)
        keeper = Keeper(folder, cgroup=self._cgroup, lock=lock)
        try:
            (folder / "logs").mkdir()
            self._init = _start_namespaces(keeper, folder, self._store)
            number = _join(self._init)
            self.host_address, self.node_address = _address("10.213", number, 1), _address("10.213", number, 2)
            self.pod_cidr, service_cidr = f"10.214.{number}.0/24", f"10.215.{number}.0/24"
            _route(self._init, number, self.node_address, self.host_address, [self.pod_cidr, service_cidr])
            _make_cgroup(self._cgroup)
        except BaseException:
            keeper.close()
            raise
        super().__init__(
            address=self.host_address,
            service_cidr=service_cidr,
            audit=audit,
            arguments=arguments,
            keeper=keeper,
            folder=folder,
        )
        try:
            self._configure()
            self.start("containerd")
            self._remove_old_containers()
            self.load_image(pause_image)
            for component in ("coredns", "kube-proxy", "kubelet"):
                self.start(component)
        except BaseException:
            self.close()
            raise

    # What tests use

    def run(self, *argv: str | Path, check: bool = True, **options: Any) -> subprocess.CompletedProcess[Any]:
        """Run a program within the node, as its administrator would."""
        return subprocess.run([*_enter(self._init), *argv], check=check, **options)

    def load_image(self, name: str) -> None:
        """Give the node's containerd an image that `images` built. Layers that it has are not copied again."""
        blobs = (self._store / "io.containerd.content.v1.content/blobs/sha256").glob("*")
        present = {f"sha256:{blob.name}" for blob in blobs}
        command = [*_enter(self._init), *self._ctr_command("images", "import", "--local", "-")]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as ctr:
            assert ctr.stdin
            assert ctr.stdout
            with contextlib.suppress(BrokenPipeError):  # it says why on its output
                images.write_archive(name, ctr.stdin, present)
                ctr.stdin.close()
            words = ctr.stdout.read().decode(errors="replace")
        if ctr.returncode:
            raise RuntimeError(f"{name} could not be loaded into the node's containerd:\n{words[-4000:]}")
        self._remove_old_images()

    def images(self) -> list[str]:
        """Names of the images that the node has."""
        return self._ctr("images", "ls", "--quiet").stdout.split()

    def volume(self, claim: str, namespace: str = "default", files: Path | None = None) -> Path:
        """Make a PersistentVolumeClaim that is bound to a folder of this machine, which is returned.

        Args:
            claim: its name.
            namespace: where it is made.
            files: a folder whose content it begins with.
        """
        folder = self.folder / "volumes" / namespace / claim
        if files:
            shutil.copytree(files, folder)
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o777)  # pods run as users of their own
        name, size = f"{namespace}-{claim}", {"storage": "100Gi"}
        common = {"accessModes": ["ReadWriteMany"], "storageClassName": ""}
        reference = {"namespace": namespace, "name": claim}
        self.apply(
            {
                "apiVersion": "v1",
                "kind": "PersistentVolume",
                "metadata": {"name": name},
                "spec": {**common, "capacity": size, "hostPath": {"path": str(folder)}, "claimRef": reference},
            },
            {
                "apiVersion": "v1",
                "kind": "PersistentVolumeClaim",
                "metadata": reference,
                "spec": {**common, "resources": {"requests": size}, "volumeName": name},
            },
        )
        return folder

    def host_service(self, name: str, port: int, namespace: str = "default") -> str:
        """A Service in front of a server of this machine that listens on `host_address`. Returns its DNS name."""
        metadata = {"name": name, "namespace": namespace}
        ports = [{"name": "main", "port": port, "protocol": "TCP"}]
        self.apply(
            {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": {"ports": ports}},
            {
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {**metadata, "labels": {"kubernetes.io/service-name": name}},
                "addressType": "IPv4",
                "ports": ports,
                "endpoints": [{"addresses": [self.host_address]}],
            },
        )
        return f"{name}.{namespace}.svc.cluster.local"

    def start(self, component: str) -> None:
        if component == "kubelet":
            self._forget_ready()
        super().start(component)
        if component == "containerd":
            version = self._ctr_command("version")
            self._wait_for(component, lambda: self.run(*version, check=False, capture_output=True).returncode == 0)
        if component == "kubelet":
            self._wait_for(component, self._node_is_ready)
            self._advertise_gpus()

    def pid(self, component: str) -> int:
        pid = super().pid(component)
        if component not in COMPONENTS:
            return pid
        return psutil.Process(pid).children()[0].pid  # below nsenter

    # Within

    def _remove_old_images(self) -> None:
        """Those that a newer one took the name of: containerd keeps them under their digests, gigabytes of them."""
        listing = [line.split() for line in self._ctr("images", "ls").stdout.splitlines()[1:]]
        named = {digest for name, _, digest, *_ in listing if not name.startswith("sha256:")}
        if old := [name for name, _, digest, *_ in listing if name.startswith("sha256:") and digest not in named]:
            self._ctr("images", "rm", "--sync", *old)

    def _node_is_ready(self) -> bool:
        with contextlib.suppress(urllib.error.HTTPError):
            return is_ready(self.request(f"/api/v1/nodes/{NODE}"))
        return False

    def _command(self, component: str) -> list[str | Path]:
        if component not in COMPONENTS:
            return super()._command(component)
        program, *arguments = self._commands[component]
        return [*_enter(self._init), build.BIN / program, *arguments]

    def _ctr_command(self, *arguments: str) -> list[str | Path]:
        return [build.BIN / "ctr", "--address", _SOCKET, "--namespace", "k8s.io", *arguments]

    def _ctr(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run(*self._ctr_command(*arguments), capture_output=True, text=True)

    def _remove_old_containers(self) -> None:
        """Those of an earlier cluster with the same images; containerd forgets them when it starts again."""
        if old := self._ctr("containers", "ls", "--quiet").stdout.split():
            self._ctr("containers", "rm", *old)
            if boxes := [line.split()[0] for line in self._ctr("sandboxes", "ls").stdout.splitlines()[1:]]:
                self._ctr("sandboxes", "rm", "--force", *boxes)
            self.stop("containerd")
            self.start("containerd")

    def _forget_ready(self) -> None:
        """So that the word of the kubelet that starts is waited for, not the last one of its forerunner."""
        patch = {"status": {"conditions": [{"type": "Ready", "status": "Unknown", "reason": "KubeletStarts"}]}}
        with contextlib.suppress(urllib.error.HTTPError):  # the first start: there is no node yet
            self.request(f"/api/v1/nodes/{NODE}/status", "PATCH", patch, "application/strategic-merge-patch+json")

    def _advertise_gpus(self) -> None:
        """What a device plugin would do. A kubelet keeps it, but one that makes its node anew."""
        count = {"nvidia.com/gpu": str(self.gpus)}
        patch = {"status": {"capacity": count, "allocatable": count}}
        self.request(f"/api/v1/nodes/{NODE}/status", "PATCH", patch, "application/merge-patch+json")

    def _configure(self) -> None:
        folder = self.folder
        self.authority.issue("kubelet", f"system:node:{NODE}", groups=["system:nodes"], hosts=[NODE, self.node_address])
        kubelet = self.kubeconfig_for(f"system:node:{NODE}", ["system:nodes"])
        proxy = self.kubeconfig_for("system:kube-proxy")
        names = self.kubeconfig_for("coredns", ["system:masters"])
        pause = images.build_pause()
        (folder / "cni").mkdir()
        (folder / "resolv.conf").write_text("")
        (folder / "containerd.toml").write_text(
            _CONTAINERD.format(pause=pause, cni=folder / "cni", runc=build.BIN / "runc")
        )
        (folder / "cni" / "pods.conflist").write_text(json.dumps(_cni(self.pod_cidr)))
        words = {"address": self.node_address, "host": self.host_address, "name": HOST_NAME, "kubeconfig": names}
        (folder / "Corefile").write_text(_COREFILE.format(**words))
        (folder / "kubelet.yaml").write_text(yaml.safe_dump(self._kubelet_configuration()))
        (folder / "kube-proxy.yaml").write_text(yaml.safe_dump(self._proxy_configuration(proxy)))
        self._commands: dict[str, list[str | Path]] = {
            "containerd": ["containerd", "--config", folder / "containerd.toml"],
            "coredns": ["coredns", "-conf", folder / "Corefile"],
            "kube-proxy": ["kube-proxy", "--config", folder / "kube-proxy.yaml", "--hostname-override", NODE],
            "kubelet": [
                *("kubelet", "--config", folder / "kubelet.yaml", "--kubeconfig", kubelet),
                *("--hostname-override", NODE, "--node-ip", self.node_address),
            ],
        }

    def _kubelet_configuration(self) -> dict[str, Any]:
        pki = self.folder / "pki"
        return {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "address": self.node_address,
            "authentication": {"anonymous": {"enabled": False}, "x509": {"clientCAFile": str(self.ca)}},
            "authorization": {"mode": "Webhook"},
            "tlsCertFile": str(pki / "kubelet.crt"),
            "tlsPrivateKeyFile": str(pki / "kubelet.key"),
            "containerRuntimeEndpoint": f"unix://{_SOCKET}",
            "clusterDNS": [self.node_address],
            "clusterDomain": "cluster.local",
            "resolvConf": str(self.folder / "resolv.conf"),
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{self._cgroup}",
            "enforceNodeAllocatable": [],
            "failCgroupV1": False,
            "failSwapOn": False,
            "makeIPTablesUtilChains": False,
            "imageGCHighThresholdPercent": 100,  # images are loaded, not pulled: none may be thrown away
            "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
            "registryPullQPS": 0,
        }

    def _proxy_configuration(self, kubeconfig: Path) -> dict[str, Any]:
        return {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "mode": "nftables",
            "clientConnection": {"kubeconfig": str(kubeconfig)},
            "clusterCIDR": self.pod_cidr,
            "bindAddress": self.node_address,
            "healthzBindAddress": f"{self.node_address}:10256",
            "metricsBindAddress": f"{self.node_address}:10249",
            "conntrack": {"maxPerCore": 0},  # else it sets the machine's own limit
            "nftables": {"minSyncPeriod": "100ms", "syncPeriod": "30s"},
        }


_CONTAINERD = """\
version = 3
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.devmapper"]

[plugins."io.containerd.cri.v1.images"]
  snapshotter = "overlayfs"
[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = "{pause}"

[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true # a root without CAP_SYS_RESOURCE can't lower it
[plugins."io.containerd.cri.v1.runtime".cni]
  bin_dirs = ["/usr/lib/cni"]
  conf_dir = "{cni}"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
  BinaryName = "{runc}"
  SystemdCgroup = false
"""

_COREFILE = """\
cluster.local:53 in-addr.arpa:53 {{
  bind {address}
  errors
  kubernetes cluster.local in-addr.arpa {{
    kubeconfig {kubeconfig}
    ttl 1
  }}
}}
{name}:53 {{
  bind {address}
  hosts {{
    {host} {name}
  }}
}}
.:53 {{
  bind {address}
  template ANY ANY {{
    rcode NXDOMAIN
  }}
}}
"""


def _cni(subnet: str) -> dict[str, Any]:
    """Routed pods. On a bridge, a pod's answer to its neighbour would pass by the Service that the neighbour asked."""
    ipam = {"type": "host-local", "ranges": [[{"subnet": subnet}]], "routes": [{"dst": "0.0.0.0/0"}]}
    return {"cniVersion": "1.0.0", "name": "pods", "plugins": [{"type": "ptp", "ipMasq": False, "ipam": ipam}]}


_KERNEL = {
    "vm/overcommit_memory": "1",
    "vm/panic_on_oom": "0",
    "kernel/panic": "10",
    "kernel/panic_on_oops": "1",
    "kernel/keys/root_maxkeys": "1000000",
    "kernel/keys/root_maxbytes": "25000000",
}
"""Settings of the whole machine that a kubelet makes. It finds them made, in files of its own, and leaves the machine's alone."""


def _check_machine() -> None:
    if os.geteuid() != 0:
        raise CannotBuild("a Kubernetes node needs root")
    for tool, package in _TOOLS.items():
        if not shutil.which(tool):
            raise CannotBuild(f"{tool} is needed for a Kubernetes node: install {package}")


def _image_store(folder: Path) -> tuple[Path, int | None]:
    """Where containerd keeps its images, and a lock on it: the one that outlives clusters, or a new one while another has that."""
    kept = build.cache_folder() / "node"
    (kept / "containerd").mkdir(parents=True, exist_ok=True)
    lock = os.open(kept / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return folder / "containerd", None
    return kept / "containerd", lock


def _start_namespaces(keeper: Keeper, folder: Path, store: Path) -> int:
    """Start the node's first process. Returns its process id.

    Every path that programs of a node write to outside of `folder` is bound to a place in it.
    """
    log = folder / "logs" / "node.log"
    unshare = [
        "unshare",
        "--fork",
        "--kill-child",
        "--pid",
        "--mount-proc",
        "--mount",
        "--propagation=slave",
        "--net",
        "--ipc",
        "--uts",
    ]
    outer = psutil.Process(keeper.start([*unshare, build.BIN / "pause"], log))
    deadline = time.monotonic() + 10
    while not (children := outer.children()) or children[0].name() != "pause":
        if keeper.exit_code(outer.pid) is not None or time.monotonic() > deadline:
            raise CannotBuild(f"this machine gives no namespaces to a node: {log.read_text().strip()}")
        time.sleep(0.01)
    init = children[0].pid
    script = [
        "mount --make-rshared /",
        "mount -t tmpfs -o mode=755 run /run",
    ]
    for place in ("lib", "log", "cache"):
        (folder / "var" / place).mkdir(parents=True)
        script.append(f"mount --bind {folder}/var/{place} /var/{place}")
    store.mkdir(exist_ok=True)
    script.append("mkdir -p /var/lib/containerd")
    script.append(f"mount --bind {store} /var/lib/containerd")
    for name, value in _KERNEL.items():
        file = folder / "kernel" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{value}\n")
        script.append(f"mount --bind {file} /proc/sys/{name}")
    script.append("echo 1 > /proc/sys/net/ipv4/ip_forward")
    _sh(script, init)
    return init


def _join(init: int) -> int:
    """Join the node to this machine by a pair of devices. Returns a number that no other cluster on it has."""
    for number in range(_CLUSTERS):
        device = f"kubepeft{number}"
        command = ["ip", "link", "add", device, "type", "veth", "peer", "name", "eth0", "netns", str(init)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            return number
        if "File exists" not in done.stderr:
            raise CannotBuild(f"this machine gives no network device to a node: {done.stderr.strip()}")
    raise CannotBuild(f"{_CLUSTERS} clusters run on this machine already")


def _route(init: int, number: int, node: str, host: str, cidrs: Sequence[str]) -> None:
    device = f"kubepeft{number}"
    _sh([f"ip address add {host}/30 dev {device}", f"ip link set {device} up"])
    inside = ["ip link set lo up", f"ip address add {node}/30 dev eth0", "ip link set eth0 up"]
    _sh([*inside, f"ip route add default via {host}"], init)
    _sh([f"ip route add {cidr} via {node} dev {device}" for cidr in cidrs])


def _make_cgroup(name: str) -> None:
    """The node's own control groups: of version 1 one in each hierarchy, of version 2 a single one."""
    if (CGROUPS / "cgroup.controllers").exists():
        parents = [CGROUPS]
        controllers = (CGROUPS / "cgroup.controllers").read_text().split()
        (CGROUPS / "cgroup.subtree_control").write_text(" ".join(f"+{one}" for one in controllers))
    else:
        parents = [folder for folder in CGROUPS.iterdir() if (folder / "cgroup.procs").exists()]
    for parent in parents:
        group = parent / name
        group.mkdir()
        for setting in ("cpuset.cpus", "cpuset.mems"):  # version 1 starts them empty, and then nothing can run
            if (group / "cpuset.cpu_exclusive").exists():
                (group / setting).write_text((parent / setting).read_text())


def _enter(init: int) -> list[str]:
    return ["nsenter", f"--target={init}", "--pid", "--mount", "--net", "--ipc", "--uts", "--"]


def _sh(script: Sequence[str], init: int | None = None) -> None:
    command = [*(_enter(init) if init else []), "sh", "-euc", "\n".join(script)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise CannotBuild(f"this machine can't run a Kubernetes node: {done.stdout.strip()}")


def _address(network: str, number: int, host: int) -> str:
    return f"{network}.{number}.{host}"
