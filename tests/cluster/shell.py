"""`make cluster`: a shell with a real one-node Kubernetes, the chart installed, and an S3 server; all of it ends with the shell."""

import os
import signal
import subprocess
import sys
import tempfile
import types
from pathlib import Path

from tests.cluster import build, images
from tests.cluster.node import Cluster
from tests.servers import ACCESS_KEY, SECRET_KEY, S3Server

CHART = build.REPOSITORY / "charts" / "kubepeft"
WELCOME = """
A Kubernetes {version} with one node and {gpus} GPUs that are none. Leave this shell, and it is gone.

  kubectl, helm     talk to it; KUBECONFIG is set, and works in other terminals too:
                    export KUBECONFIG={kubeconfig}
  S3                {endpoint} for pods and for this shell, where the AWS_ variables are set; its buckets are the folders of
                    {buckets}
                    Secret `s3` of namespace default has its keys: credentials: {{s3: s3}}
  logs              {logs}
"""


def main() -> int:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    print("── cluster: starting (seconds; minutes where its programs are not built yet)", flush=True)
    try:
        cluster = Cluster()
    except build.CannotBuild as error:
        print(error, file=sys.stderr)
        return 1
    with cluster, tempfile.TemporaryDirectory(prefix="kubepeft-s3-") as buckets:
        s3 = S3Server(Path(buckets), host=cluster.host_address)
        try:
            for bucket in ("datasets", "adapters"):
                s3.make_bucket(bucket)
            _install(cluster, s3)
            _shell(cluster, s3)
        finally:
            s3.stop()
    print("── cluster: gone", flush=True)
    return 0


def _install(cluster: Cluster, s3: S3Server) -> None:
    """The chart, with images built from this checkout."""
    settings = {"jobs.s3.endpoint": s3.endpoint, "jobs.s3.region": "us-east-1", "jobs.outputUri": "s3://adapters"}
    for target, prefix in {"operator": "image", "jobs": "jobs.image"}.items():
        name = images.build_image(target)
        print(f"── image {name}: loading into the node", flush=True)
        cluster.load_image(name)
        settings[f"{prefix}.repository"], _, settings[f"{prefix}.tag"] = name.rpartition(":")
    keys = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
    cluster.apply({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s3"}, "stringData": keys})
    print("── chart: installing", flush=True)
    values = [word for key, value in settings.items() for word in ("--set-string", f"{key}={value}")]
    namespace = ("--namespace", "kubepeft-system", "--create-namespace")
    cluster.helm("install", "kubepeft", str(CHART), *namespace, "--wait", "--timeout=2m", *values)


def _shell(cluster: Cluster, s3: S3Server) -> None:
    words = {"version": build.KUBERNETES, "gpus": cluster.gpus, "kubeconfig": cluster.kubeconfig, "logs": cluster.logs}
    print(WELCOME.format(**words, endpoint=s3.endpoint, buckets=s3.root))
    path = os.pathsep.join([str(build.BIN), str(build.REPOSITORY / ".venv" / "bin"), os.environ["PATH"]])
    environment = {**os.environ, **s3.environment(), "PATH": path, "KUBECONFIG": str(cluster.kubeconfig)}
    subprocess.run(
        [os.environ.get("SHELL", "/bin/sh")], env=environment, check=False
    )  # its last command's code says nothing


def _end(number: int, _: types.FrameType | None) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
