"""Manifests against the schemas that Kubernetes, Kubeflow and SkyPilot publish."""

from __future__ import annotations

import ast
import contextlib
import importlib.metadata
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from golden_files import FOLDER

MANIFESTS = sorted(path.name for path in FOLDER.glob("k8s-*.yaml"))
TASKS = sorted(path.name for path in FOLDER.glob("skypilot-*.yaml"))


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text(encoding="utf-8")))


def check_with_kubernetes(document: dict[str, Any]) -> None:
    validator = pytest.importorskip("kubernetes_validate")
    # podFailurePolicy is stable since 1.31.
    for version in ("1.31", validator.latest_version()):
        validator.validate(document, version, strict=True)


@pytest.mark.parametrize("name", MANIFESTS)
def test_kubernetes_accepts_the_manifest(name: str) -> None:
    for document in documents(name):
        if document["kind"] != "PyTorchJob":
            check_with_kubernetes(document)
            continue
        for replica in document["spec"]["pytorchReplicaSpecs"].values():
            spec = {**replica["template"]["spec"], "restartPolicy": "Never"}
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": spec}
            check_with_kubernetes(pod)


def test_a_wrong_manifest_is_noticed() -> None:
    validator = pytest.importorskip("kubernetes_validate")
    job = documents("k8s-1x8.yaml")[-1]
    job["spec"]["backofLimit"] = job["spec"].pop("backoffLimit")
    with pytest.raises(validator.ValidationError, match="backofLimit"):
        check_with_kubernetes(job)


def files_of(distribution: str) -> dict[str, Path]:
    """The files of an installed distribution, whether or not it can be imported."""
    try:
        found = importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{distribution} is not here: pip install --no-deps {distribution}")
    return {str(file): Path(str(file.locate())) for file in found.files or ()}


def kubeflow_models() -> dict[str, tuple[dict[str, str], dict[str, str]]]:
    """Type and published name of each field, by model, as Kubeflow generates them from its CRDs."""
    models = {}
    for name, path in files_of("kubeflow-training").items():
        if "/training/models/kubeflow_org_v1_" not in name or not name.endswith(".py"):
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                tables = {
                    each.targets[0].id: ast.literal_eval(each.value)
                    for each in node.body
                    if isinstance(each, ast.Assign) and isinstance(each.targets[0], ast.Name)
                }
                models[node.name] = (tables["openapi_types"], tables["attribute_map"])
    return models


def wrong(value: Any, kind: str, models: dict[str, Any], where: str) -> Iterator[str]:
    """What in `value` is not as a model says; models of Kubernetes itself are left out."""
    if kind.startswith("dict("):
        for key, inner in value.items():
            yield from wrong(inner, kind[5:-1].split(", ")[1], models, f"{where}.{key}")
    elif kind in models:
        types_, names = models[kind]
        fields = {published: types_[field] for field, published in names.items()}
        for key, inner in value.items():
            if key in fields:
                yield from wrong(inner, fields[key], models, f"{where}.{key}")
            else:
                yield f"{where}.{key}"
    elif type(value).__name__ != kind and kind in ("int", "str"):
        yield f"{where}: {value!r}"


def test_kubeflow_has_the_fields_of_the_pytorchjob() -> None:
    models = kubeflow_models()
    for name in MANIFESTS:
        for job in documents(name):
            if job["kind"] == "PyTorchJob":
                assert not list(wrong(job, "KubeflowOrgV1PyTorchJob", models, "job"))
    job["spec"]["runPolicy"]["backofLimit"] = 3
    job["spec"]["pytorchReplicaSpecs"]["Master"]["replicas"] = "1"
    found = list(wrong(job, "KubeflowOrgV1PyTorchJob", models, "job"))
    assert len(found) == 2 and any("backofLimit" in each for each in found)


class Module:
    """Stands for a module of SkyPilot: the literals in its source, and nothing for the rest."""

    def __init__(self, source: str = "") -> None:
        for node in ast.parse(source).body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                with contextlib.suppress(ValueError):
                    setattr(self, node.targets[0].id, ast.literal_eval(node.value))

    def __getattr__(self, name: str) -> Any:
        return "" if name.isupper() else Module()

    def __call__(self, *values: Any) -> list[str]:
        return []

    def __iter__(self) -> Iterator[str]:
        return iter(())


def skypilot_schemas(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """SkyPilot's module of schemas, as strict as its server has them, without its dependencies."""
    files = files_of("skypilot")
    source = ast.parse(files["sky/utils/schemas.py"].read_text(encoding="utf-8"))
    source.body = [
        node
        for node in source.body
        if not (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sky"))
    ]
    constants = Module(files["sky/skylet/constants.py"].read_text(encoding="utf-8"))
    monkeypatch.setenv(constants.ENV_VAR_IS_SKYPILOT_SERVER, "true")
    sky = Module()
    sky.plugins = types.SimpleNamespace(plugins_loaded=lambda: True)
    for name in ("sky", "sky.data", "sky.serve", "sky.server", "sky.utils"):
        monkeypatch.setitem(sys.modules, name, sky)
    space = {"constants": constants, "autostop_lib": Module(), "kubernetes_enums": Module()}
    exec(compile(source, "schemas.py", "exec"), space)
    return types.SimpleNamespace(**space)


@pytest.mark.parametrize("name", TASKS)
def test_skypilot_accepts_the_task(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schemas = skypilot_schemas(monkeypatch)
    (task,) = documents(name)
    jsonschema.validate(task, schemas.get_task_schema())
    jsonschema.validate(task["resources"], schemas.get_resources_schema())
    for mount in task.get("file_mounts", {}).values():
        jsonschema.validate(mount, schemas.get_storage_schema())
    for wrong in ({"num_node": 1}, {"num_nodes": "2"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**task, **wrong}, schemas.get_task_schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"job_recovery": {"on_codes": [7]}}, schemas.get_resources_schema())
