"""A manifest for Kubernetes: an Indexed Job with a pod for each node, and the Service that names the pods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

from lightkit.errors import ConfigError
from lightkit.launch.launch_spec import LaunchSpec
from lightkit.launch.torchrun import node_script

# The label of the pods with the unique id of the job.
_RUN_ID = "metadata.labels['batch.kubernetes.io/controller-uid']"

# Seconds for all pods to join. A pod that gave up while another one waits for a machine or pulls its image would count
# as failed.
_JOIN_TIMEOUT = 3600


@dataclass(frozen=True)
class Kubernetes:
    """The settings of Kubernetes.

    Args:
        image: the container image, with lightkit installed.
        gpus: the number of GPUs of each pod.
        volume_claim: the name of a PersistentVolumeClaim that all pods mount as working directory, for runs and
            checkpoints; None for none.
        namespace: the namespace; None for that of kubectl's context.

    Raises:
        ConfigError: a value is out of range.
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


def manifest(spec: LaunchSpec, kubernetes: Kubernetes) -> str:
    """Returns the manifest of a job as YAML, which ``kubectl apply`` takes."""
    return yaml.dump_all(_documents(spec, kubernetes), Dumper=_Dumper, sort_keys=False, width=1000)


def _documents(spec: LaunchSpec, kubernetes: Kubernetes) -> list[dict[str, Any]]:
    metadata = {"name": spec.name, "labels": {"app.kubernetes.io/name": "lightkit"}}
    if kubernetes.namespace:
        metadata["namespace"] = kubernetes.namespace
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata,
        "spec": {
            "clusterIP": "None",
            # The pods need each other's names before they are ready.
            "publishNotReadyAddresses": True,
            "selector": {"batch.kubernetes.io/job-name": spec.name},
            "ports": [{"name": "rendezvous", "port": spec.port}],
        },
    }
    indexed_job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata,
        "spec": {
            "completionMode": "Indexed",
            "completions": spec.nodes,
            "parallelism": spec.nodes,
            "backoffLimit": spec.max_restarts * spec.nodes,
            "template": {
                "metadata": {"labels": metadata["labels"]},
                "spec": {
                    # With the name of the Service, the name of a pod is NAME-INDEX.NAME.
                    "subdomain": spec.name,
                    "restartPolicy": "OnFailure",
                    "containers": [_container(spec, kubernetes)],
                    "volumes": _volumes(kubernetes),
                },
            },
        },
    }
    return [service, indexed_job]


def _container(spec: LaunchSpec, kubernetes: Kubernetes) -> dict[str, Any]:
    node = node_script(
        spec,
        host=f"{spec.name}-0.{spec.name}",
        is_host="$((JOB_COMPLETION_INDEX == 0))",
        run_id='"$LIGHTKIT_RUN_ID"',
        join_timeout=_JOIN_TIMEOUT,
    )
    mounts = [{"name": "shared-memory", "mountPath": "/dev/shm"}]
    container: dict[str, Any] = {
        "name": "train",
        "image": kubernetes.image,
        "command": ["bash", "-euo", "pipefail", "-c"],
        # Kubernetes would replace $(NAME) by its own variables.
        "args": [node.replace("$", "$$")],
        "env": [{"name": "LIGHTKIT_RUN_ID", "valueFrom": {"fieldRef": {"fieldPath": _RUN_ID}}}],
        "ports": [{"containerPort": spec.port}],
    }
    if kubernetes.volume_claim:
        mounts.append({"name": "work", "mountPath": "/work"})
        container["workingDir"] = "/work"
    if kubernetes.gpus:
        container["resources"] = {"limits": {"nvidia.com/gpu": kubernetes.gpus}}
    container["volumeMounts"] = mounts
    return container


def _volumes(kubernetes: Kubernetes) -> list[dict[str, Any]]:
    # The default of 64 MB is too small for NCCL and the workers of a data loader.
    volumes: list[dict[str, Any]] = [{"name": "shared-memory", "emptyDir": {"medium": "Memory"}}]
    if kubernetes.volume_claim:
        volumes.append({"name": "work", "persistentVolumeClaim": {"claimName": kubernetes.volume_claim}})
    return volumes


class _Dumper(yaml.SafeDumper):
    """A YAML dumper that writes texts of several lines as literal blocks, and writes no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)
