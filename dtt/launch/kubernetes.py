"""Kubernetes: an Indexed Job with a pod for each node, or a PyTorchJob of Kubeflow.

The configuration goes along as a ConfigMap, as it was resolved and checked here; runs and data are
on a volume that all pods see.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dtt.config.parser import at_least
from dtt.config.yaml_text import Tree, write_manifest
from dtt.errors import ConfigError
from dtt.launch.job import Job
from dtt.launch.shell import folded
from dtt.launch.torchrun import PORT, agent

EXAMPLES = (
    "dtt launch k8s -c run.yaml --nodes 4 --gpus-per-node 8 --image registry/dtt --claim work",
    "dtt launch k8s -c run.yaml --nodes 4 --gpus-per-node 8 --image registry/dtt --claim work \\\n"
    "      --kind pytorchjob --print > job.yaml",
)
KINDS = ("job", "pytorchjob")
CONFIG = "/etc/dtt"
PERMANENT = [2, 3, 4, 5, 6, 8, 70, 76]
"""Exit codes after which another try would end alike (docs/errors.md)."""
RETRIES = 3
"""Losses of each node that the job survives; preemptions and evictions do not count."""
AGAIN = 138
"""Stands for 7 and 75 under the training operator, which starts a pod again from 128 on."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what Kubernetes must know beside the job."""
    add = parser.add_argument
    add("--image", metavar="IMAGE", help="container image with dtt")
    add("--claim", metavar="NAME", help="PersistentVolumeClaim for runs and data (ReadWriteMany)")
    add("--mount", default="/work", metavar="PATH", help="where it is mounted (default: /work)")
    add("--kind", choices=KINDS, default="job", metavar="job|pytorchjob", help="default: job")
    add("--namespace", metavar="NAME", help="default: that of kubectl's context")
    add("--cpus", type=at_least(1), metavar="N", help="CPU cores of each pod")
    add("--memory", type=_quantity, metavar="SIZE", help="memory of each pod, such as 64Gi")
    add(
        "--grace",
        type=at_least(1),
        default=300,
        metavar="SECONDS",
        help="time for the save between SIGTERM and SIGKILL (default: 300)",
    )


def write(job: Job, options: argparse.Namespace) -> str:
    """Return the manifest; ConfigError where what a pod needs is not said."""
    if not options.image:
        raise ConfigError("k8s: no container image is given", "give --image IMAGE, one with dtt")
    if not options.claim:
        raise ConfigError(
            "k8s: no volume is given, and a pod's own disk is lost with it",
            "give --claim NAME, a PersistentVolumeClaim for runs and data",
        )
    documents = [_config_map(job, options)]
    if options.kind == "pytorchjob":
        documents.append(_pytorch_job(job, options))
    else:
        if job.nodes > 1:
            documents.append(_service(job, options))
        documents.append(_indexed_job(job, options))
    return "---\n".join(map(write_manifest, documents))


def run(job: Job, options: argparse.Namespace, text: str) -> int:
    """Submit the manifest with kubectl, and say how to follow and stop it."""
    if shutil.which("kubectl") is None:
        raise ConfigError(
            "kubectl is not in PATH", "install it, or give --print > job.yaml to apply it elsewhere"
        )
    where = ["--namespace", options.namespace] if options.namespace else []
    done = subprocess.run(["kubectl", *where, "apply", "-f", "-"], input=text, text=True)
    kind = "pytorchjob" if options.kind == "pytorchjob" else "job"
    kubectl = shlex.join(["kubectl", *where])
    if done.returncode:
        raise ConfigError(
            f"kubectl apply ended with {done.returncode}",
            f"see its message; an old job of that name must go first: "
            f"{kubectl} delete {kind} {job.label}",
        )
    print(f"follow: {kubectl} logs -f --prefix -l app.kubernetes.io/instance={job.label}")
    print(f"stop:   {kubectl} delete {kind} {job.label}    (saves first)")
    return 0


def _quantity(text: str) -> str:
    if not re.fullmatch(r"[0-9]+(?:\.[0-9]+)?(?:[kMGTP]|[KMGTP]i)?", text):
        raise argparse.ArgumentTypeError(f"should be a size such as 64Gi, got {text!r}")
    return text


def _head(job: Job, options: argparse.Namespace, version: str, kind: str) -> Tree:
    meta: Tree = {"name": job.label}
    if options.namespace:
        meta["namespace"] = options.namespace
    meta["labels"] = _labels(job)
    return {"apiVersion": version, "kind": kind, "metadata": meta}


def _labels(job: Job) -> dict[str, str]:
    return {"app.kubernetes.io/name": "dtt", "app.kubernetes.io/instance": job.label}


def _config_map(job: Job, options: argparse.Namespace) -> Tree:
    return {**_head(job, options, "v1", "ConfigMap"), "data": {"config.yaml": job.config}}


def _service(job: Job, options: argparse.Namespace) -> Tree:
    """It gives the pods names, those that are not ready yet, too."""
    spec = {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": _labels(job)}
    return {**_head(job, options, "v1", "Service"), "spec": spec}


def _indexed_job(job: Job, options: argparse.Namespace) -> Tree:
    policy: list[Tree] = [
        {
            "action": "FailJob",
            "onExitCodes": {"containerName": "dtt", "operator": "In", "values": PERMANENT},
        },
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {
            "action": "Ignore",
            "onExitCodes": {"containerName": "dtt", "operator": "In", "values": [75]},
        },
    ]
    script = _script(job, f"{job.label}-0.{job.label}", "JOB_COMPLETION_INDEX", "exec ", "")
    pod = _pod(job, options, "dtt", script)
    pod["spec"]["restartPolicy"] = "Never"
    if job.nodes > 1:
        pod["spec"]["subdomain"] = job.label
    spec: Tree = {
        "completions": job.nodes,
        "parallelism": job.nodes,
        "completionMode": "Indexed",
        "backoffLimit": RETRIES * job.nodes,
        "podFailurePolicy": {"rules": policy},
        "template": pod,
    }
    return {**_head(job, options, "batch/v1", "Job"), "spec": spec}


def _pytorch_job(job: Job, options: argparse.Namespace) -> Tree:
    after = (
        f'agent=$!\ntrap \'kill -s TERM "$agent"\' TERM\nwait "$agent"\ncode=$?\n'
        'while kill -0 "$agent" 2>/dev/null; do\n  wait "$agent"\n  code=$?\ndone\n'
        f'case "$code" in 7 | 75) code={AGAIN} ;; esac # another try may succeed\nexit "$code"\n'
    )
    script = _script(job, f"{job.label}-master-0", "RANK", "", f" &\n{after}")
    replicas: dict[str, Tree] = {}
    for role, number in (("Master", 1), ("Worker", job.nodes - 1)):
        if number:
            template = _pod(job, options, "pytorch", script)
            replicas[role] = {
                "replicas": number,
                "restartPolicy": "ExitCode",
                "template": template,
            }
    spec: Tree = {
        "runPolicy": {"cleanPodPolicy": "Running", "backoffLimit": RETRIES * job.nodes},
        "pytorchReplicaSpecs": replicas,
    }
    return {**_head(job, options, "kubeflow.org/v1", "PyTorchJob"), "spec": spec}


def _pod(job: Job, options: argparse.Namespace, container: str, script: str) -> Tree:
    limits: Tree = {"nvidia.com/gpu": job.gpus} if job.gpus else {}
    requests: Tree = {
        name: value
        for name, value in (("cpu", options.cpus), ("memory", options.memory))
        if value is not None
    }
    resources = {
        name: value for name, value in (("requests", requests), ("limits", limits)) if value
    }
    address = {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}
    main: dict[str, Any] = {
        "name": container,
        "image": options.image,
        "workingDir": options.mount,
        "command": ["/bin/sh", "-c", _literal(script)],
        "env": [
            address,
            *({"name": name, "value": _literal(value)} for name, value in job.environment),
        ],
        **({"resources": resources} if resources else {}),
        "volumeMounts": [
            {"name": "work", "mountPath": options.mount},
            {"name": "config", "mountPath": CONFIG},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }
    spec: Tree = {
        "terminationGracePeriodSeconds": options.grace,
        "containers": [main],
        "volumes": [
            {"name": "work", "persistentVolumeClaim": {"claimName": options.claim}},
            {"name": "config", "configMap": {"name": job.label}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
        ],
    }
    return {"metadata": {"labels": _labels(job)}, "spec": spec}


def _literal(text: str) -> str:
    """Return what Kubernetes, which replaces $(NAME) and $$, turns into `text`."""
    return re.sub(r"\$(?=[$(])", "$$", text)


def _script(job: Job, first: str, index: str, before: str, after: str) -> str:
    """Return what a pod runs: an agent that meets the others at the pod `first`."""
    given = ("-c", f"{CONFIG}/config.yaml", *job.others)
    inside = replace(job, python="python", arguments=given)
    if job.nodes == 1:
        words, train = agent(inside, ["--standalone"])
        text, own = "", []
    else:
        meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{first}:{PORT}"]
        words, train = agent(inside, [*meeting, "--rdzv-id", job.label])
        text = f'first=false\nif [ "${index}" = 0 ]; then first=true; fi\n'
        own = ["--rdzv-conf", '"is_host=$first"', "--local-addr", '"$POD_IP"']
    parts: list[Sequence[str]] = [[*map(shlex.quote, words), *own], [*map(shlex.quote, train)]]
    return f"{text}{before}{folded(*parts)}{after or chr(10)}"
