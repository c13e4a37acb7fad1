"""The Job of a stage: one function makes every Job, and stages differ in payload and resources alone.

Pure. A Job is made once and never applied again: its template is immutable, and where Kueue holds the queue, `suspend` is Kueue's.
https://kubernetes.io/docs/reference/kubernetes-api/workload-resources/job-v1/
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from kubepeft import stage
from kubepeft.errors import EXIT_SAVED, EXIT_USER, UserError
from kubepeft.stage import InferStage, PrepareStage, TrainStage
from kubepeft.storage.uri import parse_uri
from kubepeft.types import API_VERSION
from kubepeft.types.objects import BatchInferenceSpec, FineTuneSpec
from kubepeft_operator.config import Config, StageDefaults

Object = dict[str, Any]
StageName = Literal["prepare", "train", "infer"]

QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
PRIORITY_LABEL = "kueue.x-k8s.io/priority-class"
MANAGED_BY = {"app.kubernetes.io/managed-by": "kubepeft-operator"}
"""On every Job and pod; the operator watches no others."""
SELECTOR = ",".join(f"{key}={value}" for key, value in MANAGED_BY.items())
STAGE_LABEL = "kubepeft.io/stage"
OWNER_LABELS = {"FineTune": "kubepeft.io/fine-tune", "BatchInference": "kubepeft.io/batch-inference"}
DOCUMENT = "kubepeft.io/document"
"""The annotation that holds the stage's document."""

CONTAINER = "kubepeft"
NAME_LIMIT = 52
"""Pods add "-INDEX-xxxxx" to a Job's name, and an Indexed Job's host names must be DNS labels of at most 63 characters."""
DOCUMENT_LIMIT = 128 * 1024 - 64
"""Linux takes no environment variable of 128 KiB or more (MAX_ARG_STRLEN); annotations may hold 256 KiB together."""
ANNOTATIONS_LIMIT = 256 * 1024 - 4096

RESULT_PATH = "/dev/termination-log"
CLAIMS_DIR = "/mnt/claims"
CACHE_DIR = "/mnt/cache"
SCRATCH = "/tmp"
CA_DIR = "/etc/kubepeft/ca"


@dataclass(frozen=True)
class Owner:
    """The FineTune or BatchInference that a Job is made for."""

    kind: Literal["FineTune", "BatchInference"]
    namespace: str
    name: str
    uid: str
    labels: dict[str, str]

    @property
    def queued(self) -> bool:
        """Whether Kueue decides when its Jobs run."""
        return QUEUE_LABEL in self.labels

    def reference(self) -> Object:
        """The ownerReference of its children: they go when it goes, and a foreground deletion waits for them."""
        return {
            "apiVersion": API_VERSION,
            "kind": self.kind,
            "name": self.name,
            "uid": self.uid,
            "controller": True,
            "blockOwnerDeletion": True,
        }


def owner_of(obj: Object) -> Owner:
    metadata = obj["metadata"]
    return Owner(obj["kind"], metadata["namespace"], metadata["name"], metadata["uid"], metadata.get("labels") or {})


def job_name(owner: Owner, name: StageName) -> str:
    """The one name of this owner's Job of this stage; an object made again under the same name has another UID and so other Jobs."""
    mark = hashlib.sha256(owner.uid.encode()).hexdigest()[:10]
    tail = f"-{name}-{mark}"
    return owner.name.replace(".", "-")[: NAME_LIMIT - len(tail)].rstrip("-") + tail


def mounts_of(*uris: str | None) -> dict[str, str]:
    """claim → folder, for the pvc:// addresses among these."""
    claims = (parse_uri(uri).root for uri in uris if uri and uri.startswith("pvc://"))
    return {claim: f"{CLAIMS_DIR}/{claim}" for claim in claims}


def cache_dir(spec: FineTuneSpec | BatchInferenceSpec) -> str | None:
    return f"{CACHE_DIR}/models" if spec.cache else None


def build(
    owner: Owner,
    spec: FineTuneSpec | BatchInferenceSpec,
    document: PrepareStage | TrainStage | InferStage,
    config: Config,
    *,
    writable: Iterable[str] = (),
) -> Object:
    """The Job that runs `document` for `owner`.

    writable: claims among document.mounts that the stage publishes to; the others are mounted read-only.
    Raises:
        UserError: reason SpecTooLarge when the document fits no environment variable.
    """
    text = document.dumps()
    annotations = {**config.jobs.annotations, **spec.pod.annotations, DOCUMENT: text}
    _check_size(text, annotations)
    labels = {**config.jobs.labels, **spec.pod.labels, **_labels(owner, document.stage)}
    queue = {key: value for key, value in owner.labels.items() if key in (QUEUE_LABEL, PRIORITY_LABEL)}
    shards = document.shards if isinstance(document, InferStage) else None
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": job_name(owner, document.stage),
            "namespace": owner.namespace,
            "labels": _labels(owner, document.stage) | queue,
            "ownerReferences": [owner.reference()],
        },
        "spec": {
            **_counting(spec.backoff_limit, shards),
            # Kueue starts what is suspended; so nothing runs in the moment before it has seen the Job.
            "suspend": owner.queued,
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {"rules": _failure_rules()},
            "template": {
                "metadata": {"labels": labels, "annotations": annotations},
                "spec": _pod(spec, document, config, frozenset(writable)),
            },
        },
    }


def _check_size(text: str, annotations: dict[str, str]) -> None:
    size = len(text.encode())
    total = sum(len(key) + len(value.encode()) for key, value in annotations.items())
    if size > DOCUMENT_LIMIT or total > ANNOTATIONS_LIMIT:
        raise UserError(
            "SpecTooLarge",
            f"the spec takes {size:,} bytes as a stage's document, and with the pod's annotations {total:,}; "
            f"pods take {DOCUMENT_LIMIT:,} and {ANNOTATIONS_LIMIT:,}",
            where="spec",
            mend="shorten its longest lists and texts, such as trainableTokenIndices or promptTuningInitText",
        )


def _labels(owner: Owner, name: str) -> dict[str, str]:
    return {
        **MANAGED_BY,
        "app.kubernetes.io/name": "kubepeft",
        "app.kubernetes.io/component": name,
        # A label holds 63 characters; the whole name is in the ownerReference.
        "app.kubernetes.io/instance": _label(owner.name),
        STAGE_LABEL: name,
        OWNER_LABELS[owner.kind]: _label(owner.name),
    }


def _label(name: str) -> str:
    return name[:63].rstrip("-.")


def _counting(backoff_limit: int, shards: int | None) -> Object:
    if shards is None:
        return {"completions": 1, "parallelism": 1, "backoffLimit": backoff_limit}
    return {
        "completionMode": "Indexed",
        "completions": shards,
        "parallelism": shards,
        "backoffLimitPerIndex": backoff_limit,
    }


def _failure_rules() -> list[Object]:
    """What ends a Job at once, what is tried again for nothing, and (by no rule) what counts.

    EXIT_USER ends an Indexed Job too: without that shard the run can't be complete, so the other shards' GPUs are given back.
    What they have answered stays in storage.
    """

    def exits(code: int, action: str) -> Object:
        return {
            "action": action,
            "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": [code]},
        }

    disrupted = {"type": "DisruptionTarget", "status": "True"}
    return [
        exits(EXIT_USER, "FailJob"),
        exits(EXIT_SAVED, "Ignore"),
        {"action": "Ignore", "onPodConditions": [disrupted]},
    ]


def _pod(
    spec: FineTuneSpec | BatchInferenceSpec,
    document: PrepareStage | TrainStage | InferStage,
    config: Config,
    writable: frozenset[str],
) -> Object:
    wish, jobs = spec.pod, config.jobs
    defaults: StageDefaults = getattr(jobs, document.stage)
    volumes, mounts = _volumes(spec, document, config, writable)
    secrets = {one.name: None for one in (*wish.image_pull_secrets, *jobs.image_pull_secrets)}
    found: Object = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": defaults.grace_period_seconds,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": jobs.run_as_user,
            "runAsGroup": jobs.run_as_user,
            "fsGroup": jobs.run_as_user,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "nodeSelector": {**defaults.node_selector, **wish.node_selector},
        "tolerations": [one.to_json() for one in (*wish.tolerations, *defaults.tolerations)],
        "affinity": wish.affinity,
        "priorityClassName": wish.priority_class_name or defaults.priority_class_name,
        "runtimeClassName": wish.runtime_class_name or defaults.runtime_class_name,
        "serviceAccountName": wish.service_account_name or jobs.service_account_name,
        "imagePullSecrets": [{"name": name} for name in secrets],
        "volumes": volumes,
        "containers": [
            {
                "name": CONTAINER,
                "image": jobs.image,
                "imagePullPolicy": jobs.image_pull_policy,
                "command": ["python", "-m", "kubepeft_jobs", document.stage],
                "env": _environment(spec, config),
                "envFrom": [
                    {"secretRef": {"name": name}}
                    for name in dict.fromkeys((spec.credentials.s3, spec.credentials.hugging_face))
                    if name
                ],
                "ports": [{"name": "metrics", "containerPort": stage.METRICS_PORT}],
                "resources": _resources(wish.resources.to_json(), defaults.resources.to_json(), document, config),
                "terminationMessagePath": RESULT_PATH,
                "securityContext": {
                    "allowPrivilegeEscalation": False,
                    "readOnlyRootFilesystem": True,
                    "capabilities": {"drop": ["ALL"]},
                },
                "volumeMounts": mounts,
            }
        ],
    }
    return {key: value for key, value in found.items() if value not in (None, {}, [])}


def _resources(
    wish: Object, defaults: Object, document: PrepareStage | TrainStage | InferStage, config: Config
) -> Object:
    """The manifest's figures over the stage's defaults.

    A default request above the limit that the manifest gives would be refused, so it gives way.
    """
    limits = {**defaults["limits"], **wish["limits"]}
    requests = {name: amount for name, amount in defaults["requests"].items() if name not in wish["limits"]}
    requests |= wish["requests"]
    limits = {name: amount for name, amount in limits.items() if name in wish["limits"] or name not in wish["requests"]}
    if document.gpus:
        limits[config.jobs.gpu_resource] = document.gpus
    return {"requests": requests, "limits": limits}


def _environment(spec: FineTuneSpec | BatchInferenceSpec, config: Config) -> list[Object]:
    """Ours that the pod needs, then the installation's, then the manifest's, which wins; KUBEPEFT_ names are ours alone."""
    jobs = config.jobs
    plain: dict[str, str] = {
        "HOME": SCRATCH,
        "TMPDIR": SCRATCH,
        # Libraries ask for the user's name, and the user of a pod has no entry in /etc/passwd.
        "USER": "kubepeft",
        "HF_HOME": f"{CACHE_DIR}/huggingface" if spec.cache else f"{SCRATCH}/huggingface",
    }
    if jobs.ca_bundle:
        bundle = f"{CA_DIR}/{jobs.ca_bundle.key}"
        plain |= dict.fromkeys(("AWS_CA_BUNDLE", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"), bundle)
    merged: dict[str, Object] = {name: {"name": name, "value": value} for name, value in plain.items()}
    merged |= {one.name: one.to_json() for one in (*jobs.env, *spec.pod.env)}

    def field(name: str, path: str) -> Object:
        return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}

    ours = [
        field("KUBEPEFT_POD_NAME", "metadata.name"),
        field("KUBEPEFT_POD_UID", "metadata.uid"),
        {"name": stage.ENV_ATTEMPT, "value": "$(KUBEPEFT_POD_NAME)-$(KUBEPEFT_POD_UID)"},
        # Through the downward API, because in a plain value $(…) would be expanded.
        field(stage.ENV_STAGE, f"metadata.annotations['{DOCUMENT}']"),
        {"name": stage.ENV_RESULT, "value": RESULT_PATH},
    ]
    if isinstance(spec, BatchInferenceSpec):
        ours.append(field(stage.ENV_SHARD, "metadata.annotations['batch.kubernetes.io/job-completion-index']"))
    return [*merged.values(), *ours]


def _volumes(
    spec: FineTuneSpec | BatchInferenceSpec,
    document: PrepareStage | TrainStage | InferStage,
    config: Config,
    writable: frozenset[str],
) -> tuple[list[Object], list[Object]]:
    """Volumes and their mounts: the manifest's, claims of pvc:// addresses, the cache, scratch space, the CA bundle."""
    volumes: dict[str, Object] = {one.name: one.to_json(defaults=False) for one in spec.pod.volumes}
    for one in spec.pod.volumes:
        if one.empty_dir and not volumes[one.name].get("emptyDir"):
            volumes[one.name]["emptyDir"] = {}
    mounts = [one.to_json() for one in spec.pod.volume_mounts]

    def add(name: str, volume: Object, path: str, **more: Any) -> None:
        if any(mount["mountPath"].rstrip("/") == path for mount in mounts):
            return  # the manifest has put something of its own there
        volumes[name] = {"name": name, **volume}
        mounts.append({"name": name, "mountPath": path, **more})

    def claim(claim_name: str) -> Object:
        return {"persistentVolumeClaim": {"claimName": claim_name}}

    add("kubepeft-scratch", {"emptyDir": {}}, SCRATCH)
    for number, (name, folder) in enumerate(sorted(document.mounts.items())):
        read_only = {} if name in writable else {"readOnly": True}
        add(f"kubepeft-claim-{number}", claim(name), folder, **read_only)
    if spec.cache:
        add("kubepeft-cache", claim(spec.cache.claim), CACHE_DIR)
    if isinstance(document, TrainStage) and (document.gpus > 1 or document.training.dataloader_num_workers):
        # NCCL and data loaders pass tensors through shared memory; a container's own /dev/shm has 64 MB.
        add("kubepeft-shm", {"emptyDir": {"medium": "Memory"}}, "/dev/shm")
    if bundle := config.jobs.ca_bundle:
        add("kubepeft-ca", {"configMap": {"name": bundle.config_map}}, CA_DIR, readOnly=True)
    return list(volumes.values()), mounts
