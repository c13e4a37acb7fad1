"""What a user may say of the pods: named fields of the Kubernetes PodSpec and nothing else of it.

Field names and meanings are Kubernetes' own (https://kubernetes.io/docs/reference/kubernetes-api/workload-resources/pod-v1/).
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from kubepeft.types.base import AnnotationMap, FreeForm, LabelMap, Name, Path, Quantity, Rule, ShortText, Type

LabelValue = Annotated[str, Field(max_length=63)]

NOT_OURS = Rule(
    message="keys under kubepeft.io/ are kubepeft's own",
    cel="self.all(key, !key.startsWith('kubepeft.io/'))",
    check=lambda keys: not any(key.startswith("kubepeft.io/") for key in keys),
)


class Toleration(Type):
    """A Kubernetes Toleration."""

    key: ShortText | None = None
    operator: Literal["Exists", "Equal"] | None = None
    value: LabelValue | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    toleration_seconds: int | None = None


class KeyRef(Type):
    """One key of a Secret or ConfigMap in the same namespace."""

    name: Name
    key: ShortText
    optional: bool = False


class EnvSource(Type):
    """Where an environment variable's value comes from."""

    secret_key_ref: KeyRef | None = Field(
        None, description="a key of a Secret; whoever creates the object must be allowed to read it"
    )
    config_map_key_ref: KeyRef | None = Field(None, description="a key of a ConfigMap")
    rules: ClassVar = (
        Rule(
            message="give exactly one of secretKeyRef and configMapKeyRef",
            cel="has(self.secretKeyRef) != has(self.configMapKeyRef)",
            check=lambda self: (self.secret_key_ref is None) != (self.config_map_key_ref is None),
        ),
    )


class EnvVar(Type):
    """An environment variable of the training container."""

    name: Annotated[
        str,
        Field(min_length=1, max_length=256, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$"),
        Rule(
            message="names that begin with KUBEPEFT_ are kubepeft's own",
            cel="!self.startsWith('KUBEPEFT_')",
            check=lambda name: not name.startswith("KUBEPEFT_"),
        ),
    ]
    value: Annotated[str, Field(max_length=4096)] | None = None
    value_from: EnvSource | None = None
    rules: ClassVar = (
        Rule(
            message="give at most one of value and valueFrom",
            cel="!(has(self.value) && has(self.valueFrom))",
            check=lambda self: self.value is None or self.value_from is None,
        ),
    )


class ClaimVolume(Type):
    """A PersistentVolumeClaim of the same namespace."""

    claim_name: Name
    read_only: bool = False


class ConfigMapVolume(Type):
    """A ConfigMap of the same namespace."""

    name: Name


class EmptyDirVolume(Type):
    """A folder that lives as long as the pod."""

    medium: Literal["", "Memory"] = ""
    size_limit: Quantity | None = None


class Volume(Type):
    """A volume of the pod: exactly one kind."""

    name: Annotated[str, Field(min_length=1, max_length=63, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")]
    persistent_volume_claim: ClaimVolume | None = None
    config_map: ConfigMapVolume | None = None
    empty_dir: EmptyDirVolume | None = None
    rules: ClassVar = (
        Rule(
            message="give exactly one of persistentVolumeClaim, configMap and emptyDir",
            cel="[has(self.persistentVolumeClaim), has(self.configMap), has(self.emptyDir)].filter(given, given).size() == 1",
            check=lambda self: [self.persistent_volume_claim, self.config_map, self.empty_dir].count(None) == 2,
        ),
        Rule(
            message="volume names that begin with kubepeft- are kubepeft's own",
            cel="!self.name.startsWith('kubepeft-')",
            check=lambda self: not self.name.startswith("kubepeft-"),
        ),
    )


class VolumeMount(Type):
    """Where a volume appears in the container."""

    name: ShortText
    mount_path: Path
    sub_path: Path | None = None
    read_only: bool = False


class Resources(Type):
    """CPU, memory and ephemeral storage of the container; GPUs are said by `gpus`."""

    requests: Annotated[dict[str, Quantity], Field(max_length=16)] = {}
    limits: Annotated[dict[str, Quantity], Field(max_length=16)] = {}


class LocalObject(Type):
    """An object of the same namespace, by name."""

    name: Name


class Pod(Type):
    """The pods of a FineTune or BatchInference, beyond what kubepeft sets itself."""

    node_selector: LabelMap = {}
    tolerations: Annotated[list[Toleration], Field(max_length=32)] = []
    affinity: FreeForm | None = Field(None, description="a Kubernetes Affinity")
    resources: Resources = Resources()
    env: Annotated[list[EnvVar], Field(max_length=64)] = []
    volumes: Annotated[list[Volume], Field(max_length=16)] = []
    volume_mounts: Annotated[list[VolumeMount], Field(max_length=32)] = []
    priority_class_name: Name | None = None
    runtime_class_name: Name | None = None
    service_account_name: Name | None = None
    image_pull_secrets: Annotated[list[LocalObject], Field(max_length=8)] = []
    labels: Annotated[LabelMap, NOT_OURS] = {}
    annotations: Annotated[AnnotationMap, NOT_OURS] = {}
    rules: ClassVar = (
        Rule(
            message="every volumeMounts[].name must be the name of one of volumes[]",
            cel="!has(self.volumeMounts) || self.volumeMounts.all(mount, has(self.volumes) && "
            "self.volumes.exists(volume, volume.name == mount.name))",
            check=lambda self: {m.name for m in self.volume_mounts} <= {v.name for v in self.volumes},
        ),
    )
