"""The manifests are whole, valid for Kubernetes, and fit one another and the application."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from act_serve.server.config import read_settings
from act_serve.server.keys_file import read_keys_file
from tests.deploy.manifests import (
    BASE,
    DEPLOY,
    FOLDERS,
    KUSTOMIZE,
    OVERLAYS,
    documents,
    kustomization,
    named_paths,
    ray_service,
    resources,
    serve_config,
)

CUSTOM = {"RayService", "PodMonitor", "PrometheusRule"}
SCHEMAS = "1.32"
by_name = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
by_overlay = pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda folder: folder.name)


def rendered(overlay: Path) -> list[dict[str, Any]]:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    done = subprocess.run(["kubectl", "kustomize", str(overlay)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def cluster(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    (service,) = [m for m in manifests if m["kind"] == "RayService"]
    found: dict[str, Any] = service["spec"]["rayClusterConfig"]
    return found


def pods(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    (group,) = config["workerGroupSpecs"]
    return {"head": config["headGroupSpec"]["template"], "engine": group["template"]}


def check_schema(manifest: dict[str, Any]) -> None:
    if manifest["kind"] not in CUSTOM:
        kubernetes_validate.validate(manifest, SCHEMAS, strict=True)


def test_the_overlays() -> None:
    assert [overlay.name for overlay in OVERLAYS] == ["cpu-demo", "gpu", "s3"]


@by_name
def test_all_that_is_named_is_there_and_all_that_is_there_is_named(folder: Path) -> None:
    named = named_paths(folder)
    assert len(named) == len(set(named))
    for path in named:
        assert path.is_file() or (path / "kustomization.yaml").is_file(), path
    assert {path for path in named if path.parent == folder} == set(folder.iterdir()) - {folder / "kustomization.yaml"}


@by_name
def test_every_resource_is_named_once(folder: Path) -> None:
    names = [(m["apiVersion"], m["kind"], m["metadata"]["name"]) for m in resources(folder)]
    assert len(names) == len(set(names))
    assert names


@by_name
def test_core_kinds_follow_their_schemas(folder: Path) -> None:
    for manifest in resources(folder):
        check_schema(manifest)


def test_a_wrong_field_would_be_found() -> None:
    (budget,) = documents(BASE / "disruption-budget.yaml")
    budget["spec"]["maxUnavailble"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        check_schema(budget)


@by_overlay
def test_kubectl_renders_an_overlay_into_valid_manifests(overlay: Path) -> None:
    manifests = rendered(overlay)
    for manifest in manifests:
        check_schema(manifest)
        assert manifest["kind"] == "Namespace" or manifest["metadata"]["namespace"] == "act-serve"
    tag = kustomization(overlay)["images"][0]["newTag"]
    claims = {m["metadata"]["name"] for m in manifests if m["kind"] == "PersistentVolumeClaim"}
    mounted = set()
    for pod in pods(cluster(manifests)).values():
        metadata = {"name": "any", **pod["metadata"]}
        check_schema({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod["spec"]})
        (container,) = pod["spec"]["containers"]
        assert container["image"] == f"act-serve:{tag}"
        volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
        assert volumes == {mount["name"] for mount in container["volumeMounts"]}
        mounted |= {v["persistentVolumeClaim"]["claimName"] for v in pod["spec"]["volumes"] if "emptyDir" not in v
                    and "secret" not in v}  # fmt: skip
    assert mounted == claims
    (service,) = [m for m in manifests if m["kind"] == "RayService"]
    assert service["spec"]["serveConfigV2"] == serve_config(overlay)


@by_overlay
def test_engines_and_routers_fit_the_pods_that_may_be_there(overlay: Path) -> None:
    config = cluster(rendered(overlay))
    (group,) = config["workerGroupSpecs"]
    (application,) = yaml.safe_load(serve_config(overlay))["applications"]
    settings = read_settings(application["args"])
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert settings.engine_cpus + settings.router_cpus <= float(limits["cpu"]) < 2 * settings.engine_cpus + 1
    assert settings.engine_gpus == float(limits.get("nvidia.com/gpu", 0))
    assert group["minReplicas"] == group["replicas"] == settings.engine_replicas
    assert group["maxReplicas"] == settings.engine_max_replicas
    assert settings.router_cpus > 0, "a router without CPUs may be placed on the head"


@pytest.mark.parametrize("folder", [BASE, *OVERLAYS], ids=lambda folder: folder.name)
def test_the_serve_config_is_what_ray_and_the_application_accept(folder: Path) -> None:
    from ray.serve.schema import ServeDeploySchema

    config = yaml.safe_load(serve_config(folder))
    ServeDeploySchema.model_validate(config)
    (application,) = config["applications"]
    settings = read_settings(application["args"])
    assert str(settings.keys) == "/etc/act-serve/keys.yaml"
    assert settings.engine_replicas > 1 or settings.engine_surge_percent > 0, "a change would leave no engine"
    module, _, name = application["import_path"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    assert application["args"]["store"].startswith("s3://" if folder.name == "s3" else "/")


def test_the_ray_service() -> None:
    service = ray_service()
    spec = service["spec"]
    config = spec["rayClusterConfig"]
    assert service["apiVersion"] == "ray.io/v1"
    lock = (DEPLOY.parent / "requirements.lock").read_text().splitlines()
    assert f"ray=={config['rayVersion']}" in lock
    assert config["enableInTreeAutoscaling"] is True
    assert spec["excludeHeadPodFromServeSvc"] is True
    assert config["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    grace = {}
    for role, pod in pods(config).items():
        assert pod["metadata"]["labels"] == {"app": "act-serve", "role": role}
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        (container,) = pod["spec"]["containers"]
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert {"startupProbe", "readinessProbe", "livenessProbe"} <= container.keys()
        grace[role] = pod["spec"]["terminationGracePeriodSeconds"], container
    seconds, engine = grace["engine"]
    pause = int(engine["lifecycle"]["preStop"]["exec"]["command"][1])
    (application,) = yaml.safe_load(spec["serveConfigV2"])["applications"]
    assert read_settings(application["args"]).engine_stop_s <= pause < seconds


def test_policies_and_budget_select_the_pods() -> None:
    labels = [pod["metadata"]["labels"] for pod in pods(ray_service()["spec"]["rayClusterConfig"]).values()]
    policies = documents(BASE / "network-policy.yaml")
    (budget,) = documents(BASE / "disruption-budget.yaml")
    selectors = [policy["spec"]["podSelector"] for policy in policies] + [budget["spec"]["selector"]]
    for selector in selectors:
        assert any(selector["matchLabels"].items() <= pod.items() for pod in labels), selector
    by_policy = {policy["metadata"]["name"]: policy["spec"] for policy in policies}
    (clients,) = by_policy["act-serve-clients"]["ingress"]
    assert clients["ports"] == [{"port": 8000}]
    everything = [rule for spec in by_policy.values() for rule in spec["ingress"] if "ports" not in rule]
    assert everything == [{"from": [{"podSelector": {"matchLabels": {"app": "act-serve"}}}]}]


def test_the_run_book_gives_the_sizes_of_the_shipped_abilities() -> None:
    book = (DEPLOY / "README.md").read_text()
    shipped = list((DEPLOY.parent / "abilities").glob("*/*/ability.json"))
    assert {path.parts[-3] for path in shipped} == {"de", "es", "extract", "fr", "reason"}
    for path in shipped:
        counts = json.loads(path.read_text())["counts"]
        parameters = counts["parameters"] / 1e6
        row = f"| `{path.parts[-3]}` | {counts['channels']:,} | {parameters:.1f} M | {counts['bytes'] / 1e6:.1f} MB | "
        assert row + f"{2 * parameters:.0f} MB | {4 * parameters:.0f} MB |" in book


def test_the_example_of_a_keys_file_is_one() -> None:
    assert [record.id for record in read_keys_file(KUSTOMIZE / "keys.example.yaml")] == ["operator", "support-desk"]


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_the_images_run_as_a_user_and_ask_ready(kind: str) -> None:
    text = (DEPLOY / f"docker/{kind}.Dockerfile").read_text().replace("\\\n", " ")
    words = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    given = dict(words)
    base = given["ARG"].partition("=")[2]
    assert base.rpartition(":")[2].count(".") == 2, "the base is pinned to a patch release"
    assert given["USER"] == "1000:1000"
    assert "/ready" in given["HEALTHCHECK"]
    copied = {source for name, rest in words if name == "COPY" for source in rest.split()[:-1]
              if not source.startswith("--")}  # fmt: skip
    assert all((DEPLOY.parent / source).exists() for source in copied)
    ignored = (DEPLOY.parent / ".dockerignore").read_text().splitlines()
    assert {f"!{source}" for source in copied} <= set(ignored)
    assert "--constraint" in text
