"""What an installation decides: the file that the chart's ConfigMap holds and `python -m kubepeft_operator --config FILE` reads.

Everything here has a default that works, but for the image of the jobs. No secret belongs into it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, ValidationError

from kubepeft import manifest
from kubepeft.errors import UserError
from kubepeft.types.base import AnnotationMap, LabelMap, Name, ShortText, Type
from kubepeft.types.pod import EnvVar, LocalObject, Resources, Toleration

Namespaces = Annotated[list[Name], Field(max_length=256)]


class StageDefaults(Type):
    """What the pods of one stage get where the manifest's own `pod` says nothing of it."""

    resources: Resources = Resources()
    node_selector: LabelMap = {}
    tolerations: Annotated[list[Toleration], Field(max_length=32)] = []
    priority_class_name: Name | None = None
    runtime_class_name: Name | None = None
    grace_period_seconds: int = Field(120, ge=30, description="how long a pod may take to save after SIGTERM")


class CaBundle(Type):
    """A ConfigMap with CA certificates that is looked for in each FineTune's own namespace."""

    config_map: Name
    key: ShortText = "ca.crt"


class JobDefaults(Type):
    """What every Job gets."""

    image: Annotated[str, Field(min_length=1, max_length=1024)] = Field(description="the jobs image")
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    image_pull_secrets: Annotated[list[LocalObject], Field(max_length=8)] = Field(
        [], description="Secrets of the FineTune's own namespace"
    )
    output_uri: str | None = Field(
        None, description="where FineTunes without output.uri publish: below it, NAMESPACE/NAME"
    )
    env: Annotated[list[EnvVar], Field(max_length=64)] = Field(
        [], description="such as AWS_ENDPOINT_URL and AWS_REGION; the manifest's own pod.env wins"
    )
    ca_bundle: CaBundle | None = Field(None, description="becomes AWS_CA_BUNDLE, SSL_CERT_FILE and REQUESTS_CA_BUNDLE")
    service_account_name: Name | None = Field(
        None, description="account of the pods, for workload identity; they never get its Kubernetes token"
    )
    gpu_resource: ShortText = "nvidia.com/gpu"
    run_as_user: int = Field(65532, ge=1, description="user and group of the pods; never root")
    labels: LabelMap = {}
    annotations: AnnotationMap = {}
    prepare: StageDefaults = StageDefaults()
    train: StageDefaults = StageDefaults()
    infer: StageDefaults = StageDefaults()


class LeaderElection(Type):
    """A coordination.k8s.io Lease decides which replica acts; times in seconds as in client-go."""

    enabled: bool = True
    lease_name: Name = "kubepeft-operator"
    lease_duration: float = Field(15, gt=1, le=300, description="a lease not renewed for so long may be taken")
    renew_deadline: float = Field(10, gt=0.5, le=300, description="a leader that can't renew for so long exits")
    retry_period: float = Field(2, gt=0.1, le=60, description="between tries")


class Config(Type):
    """The operator's configuration."""

    jobs: JobDefaults
    watch_namespaces: Namespaces = Field([], description="only these; none is every namespace of the cluster")
    leader_election: LeaderElection = LeaderElection()
    workers: int = Field(
        4, ge=1, le=64, description="objects looked at side by side; more only make an API server at its limit slower"
    )
    metrics_port: int = Field(8080, ge=0, le=65535, description="/metrics; 0 for any free one")
    health_port: int = Field(8081, ge=0, le=65535, description="/healthz and /readyz; 0 for any free one")
    progress_interval_seconds: float = Field(
        10, ge=1, le=3600, description="least time between two looks at a running pod's metrics page"
    )
    stuck_after_seconds: float = Field(
        300, ge=1, description="a pod that waits longer than this counts as stuck in events and metrics"
    )


def load(path: Path) -> Config:
    """The configuration in a YAML file.

    Raises:
        UserError: reason BadConfig, with a line for every mistake found.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        return Config.model_validate(data)
    except ValidationError as error:
        mistakes = "\n".join(words for _, words in manifest.explain(error, Config))
        raise UserError(
            "BadConfig", mistakes, where=str(path), mend="mend the chart's values and install again"
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError("BadConfig", str(error), where=str(path), mend="give a readable YAML file") from None
