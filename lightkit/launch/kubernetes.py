"""A manifest for Kubernetes: an Indexed Job of one pod a node, and the Service that gives the pods their names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

from lightkit.errors import ConfigError
from lightkit.launch.job import Job, script

# A job that its pods carry the id of, which no other job ever has.
_RUN_ID = "metadata.labels['batch.kubernetes.io/controller-uid']"

# Seconds for all pods to be there. One that gave up on another, which waits for a machine or loads its image, would
# count as failed.
_PATIENCE = 3600


@dataclass(frozen=True)
class Kubernetes:
    """What Kubernetes alone asks for.

    Args:
        image: of the container, with lightkit in it.
        gpus: in each pod.
        volume_claim: a claim on a volume that all pods share: the runs lie on it, and so does what they go on from.
        namespace: None for that of the context.
    """

    image: str
    gpus: int = 0
    volume_claim: str | None = None
    namespace: str | None = None

    def __post_init__(self) -> None:
        if not self.image or any(character.isspace() for character in self.image):
            raise ConfigError(f"--image {self.image!r}: expected the name of a container image")
        if self.gpus < 0:
            raise ConfigError(f"--gpus {self.gpus}: expected 0 or more")


def manifest(job: Job, kubernetes: Kubernetes) -> str:
    """The manifest, for ``kubectl apply``."""
    return yaml.dump_all(_documents(job, kubernetes), Dumper=_Dumper, sort_keys=False, width=1000)


def _documents(job: Job, kubernetes: Kubernetes) -> list[dict[str, Any]]:
    metadata = {"name": job.name, "labels": {"app.kubernetes.io/name": "lightkit"}}
    if kubernetes.namespace:
        metadata["namespace"] = kubernetes.namespace
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata,
        "spec": {
            "clusterIP": "None",
            # The pods must find each other to become ready.
            "publishNotReadyAddresses": True,
            "selector": {"batch.kubernetes.io/job-name": job.name},
            "ports": [{"name": "rendezvous", "port": job.port}],
        },
    }
    indexed_job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata,
        "spec": {
            "completionMode": "Indexed",
            "completions": job.nodes,
            "parallelism": job.nodes,
            "backoffLimit": job.max_restarts * job.nodes,
            "template": {
                "metadata": {"labels": metadata["labels"]},
                "spec": {
                    # With the name of the Service, each pod is found as NAME-INDEX.NAME.
                    "subdomain": job.name,
                    "restartPolicy": "OnFailure",
                    "containers": [_container(job, kubernetes)],
                    "volumes": _volumes(kubernetes),
                },
            },
        },
    }
    return [service, indexed_job]


def _container(job: Job, kubernetes: Kubernetes) -> dict[str, Any]:
    node = script(
        job,
        host=f"{job.name}-0.{job.name}",
        is_host="$((JOB_COMPLETION_INDEX == 0))",
        run_id='"$LIGHTKIT_RUN_ID"',
        patience=_PATIENCE,
    )
    mounts = [{"name": "shared-memory", "mountPath": "/dev/shm"}]
    container: dict[str, Any] = {
        "name": "train",
        "image": kubernetes.image,
        "command": ["bash", "-euo", "pipefail", "-c"],
        # Kubernetes itself would put its variables in for $(NAME).
        "args": [node.replace("$", "$$")],
        "env": [{"name": "LIGHTKIT_RUN_ID", "valueFrom": {"fieldRef": {"fieldPath": _RUN_ID}}}],
        "ports": [{"containerPort": job.port}],
    }
    if kubernetes.volume_claim:
        mounts.append({"name": "work", "mountPath": "/work"})
        container["workingDir"] = "/work"
    if kubernetes.gpus:
        container["resources"] = {"limits": {"nvidia.com/gpu": kubernetes.gpus}}
    container["volumeMounts"] = mounts
    return container


def _volumes(kubernetes: Kubernetes) -> list[dict[str, Any]]:
    # A container's own has 64 MB, which NCCL and the workers of a data loader soon fill.
    volumes: list[dict[str, Any]] = [{"name": "shared-memory", "emptyDir": {"medium": "Memory"}}]
    if kubernetes.volume_claim:
        volumes.append({"name": "work", "persistentVolumeClaim": {"claimName": kubernetes.volume_claim}})
    return volumes


class _Dumper(yaml.SafeDumper):
    """Writes scripts as a person would, and nothing by reference to what was written before."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)
