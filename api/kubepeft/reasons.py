"""Why an object does not go on, in words: the reasons of its conditions, and what a person can do about each.

The operator writes them into conditions and events, and `kubepeft status` and docs/troubleshooting.md show them. Reasons that a stage itself
found (BadRow, NoSuchKey …) bring their own hint along and are not listed here.
"""

from __future__ import annotations

HINTS: dict[str, str] = {
    # Waiting: the object goes on by itself when the cause is gone.
    "Queued": "Kueue admits it when its queue has room: kubectl get workloads",
    "Unschedulable": "free or add such a node, or ask for less: gpus, pod.resources, pod.nodeSelector, pod.tolerations",
    "ImagePull": "check the image's name and pod.imagePullSecrets; the image is the chart's jobs.image",
    "MissingSecret": "create the Secret in this namespace, with the keys that the reference page names; the pod then starts by itself",
    "MissingConfigMap": "create the ConfigMap in this namespace; the pod then starts by itself",
    "ContainerConfig": "see the pod: kubectl describe pod",
    "VolumeNotMounted": "check that the claims and ConfigMaps that the manifest names exist and can be mounted on that node",
    "QuotaExceeded": "ask for less, or have the namespace's ResourceQuota raised: kubectl describe resourcequota",
    "PodRefused": "the cluster refused the pod; the message is its own: mend what it names, or ask whoever runs the cluster",
    "JobRefused": "the cluster refused the Job; the message is its own: mend what it names, or ask whoever runs the cluster",
    "PodStarting": "the node is pulling the image or mounting volumes",
    "PodPending": "the cluster has not taken the pod up yet: kubectl describe pod",
    "PodEnding": "the former pod saves and ends before the next one starts",
    "NameConflict": "delete or rename that object, or make this one anew under another name",
    "WaitingForAdapter": "it begins when that FineTune has published its adapter",
    "NoSuchFineTune": "create that FineTune in this namespace, or give adapter.uri",
    "Suspended": "set spec.suspend: false to go on",
    # Refused: a new object is needed.
    "InvalidSpec": "mend the spec and make the object anew",
    "NoOutput": "give output.uri, or have the chart's jobs.outputUri set",
    "SpecChanged": "put the former spec back, or make a new object",
    "SpecTooLarge": "shorten its longest lists and texts",
    # Ended.
    "OOMKilled": "raise pod.resources.limits.memory; for GPU memory, lower training.perDeviceTrainBatchSize or data.maxLength",
    "Evicted": "the node ran short: raise pod.resources.requests, ephemeral-storage included",
    "Killed": "often the memory limit: raise pod.resources.limits.memory",
    "StartFailed": "check that the image is a kubepeft jobs image of this version",
    "ExitCode": "see the log: kubepeft logs",
    "PodLost": "its node went away before the pod's outcome could be read; see the node's state, then make the object anew",
    "OutcomeLost": "pods vanish before their outcome can be read; see what deletes them, then make the object anew",
    "DeadlineExceeded": "raise activeDeadlineSeconds and make the object anew: it goes on from its last checkpoint",
    "FineTuneFailed": "see that FineTune: kubepeft status",
    "BackoffLimitExceeded": "see the attempts in status, then make the object anew: it goes on from its last checkpoint",
}
"""Reason → what to do."""


def tell(message: str, hint: str = "") -> str:
    """One line of a condition or an event: what is, and what to do."""
    message = " ".join(message.split())
    return f"{message} → {hint}" if hint else message
