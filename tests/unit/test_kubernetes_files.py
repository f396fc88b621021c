"""deploy/rayservice.yaml: valid by KubeRay's own schema, and in step with cluster.yaml and deploy/serve.yaml.

`tests/data/rayservice-v1.schema.json.gz` is the OpenAPI schema of the RayService definition of KubeRay 1.7.0
(helm-chart/kuberay-operator/crds/ray.io_rayservices.yaml, Apache-2.0), version v1, without descriptions.
"""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from benchmarks.cluster import fast_path

ROOT = Path(__file__).parents[2]
MANIFEST = ROOT / "deploy" / "rayservice.yaml"
SCHEMA = ROOT / "tests" / "data" / "rayservice-v1.schema.json.gz"
KUBERNETES = "1.34"


@pytest.fixture(scope="module")
def documents() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(MANIFEST.read_text()))


@pytest.fixture(scope="module")
def service(documents) -> dict[str, Any]:
    (found,) = [document for document in documents if document["kind"] == "RayService"]
    return found


@pytest.fixture(scope="module")
def cluster(service) -> dict[str, Any]:
    return service["spec"]["rayClusterConfig"]


def strict(schema: Any) -> Any:
    """Kubernetes drops what a schema does not know; here that is an error."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    if "properties" in made and not made.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


def rayservice_schema() -> dict[str, Any]:
    return strict(json.loads(gzip.decompress(SCHEMA.read_bytes())))


def pods(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    return [group["template"]["spec"] for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]]


def test_it_is_what_kuberay_takes(service):
    plain = {key: value for key, value in service.items() if key != "metadata"}
    jsonschema.Draft202012Validator(rayservice_schema()).validate(plain)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "rayClusterConfig", "gcsFaultToleranceOptions", "redisAdress"), "redis:6379"),
        (("spec", "rayClusterConfig", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "rayClusterConfig", "authOptions", "mode"), "none"),
    ],
)
def test_the_schema_finds_mistakes(service, path, value):
    wrong = json.loads(json.dumps({key: value for key, value in service.items() if key != "metadata"}))
    at = wrong
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(rayservice_schema()).validate(wrong)


def test_the_rest_is_what_kubernetes_takes(documents):
    validator = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate (100 MB) checks it")
    rest = [document for document in documents if document["kind"] != "RayService"]
    assert {document["kind"] for document in rest} >= {"NetworkPolicy", "StatefulSet", "Service"}
    for document in rest:
        validator.validate(document, KUBERNETES, strict=True)


def test_the_service_is_that_of_the_serve_file(service):
    here = yaml.safe_load(service["spec"]["serveConfigV2"])
    there = yaml.safe_load((ROOT / "deploy" / "serve.yaml").read_text())
    ServeDeploySchema.model_validate(here)
    # On Kubernetes every node has a proxy, which the Service balances over; evidence lies on the shared volume.
    there["proxy_location"] = "EveryNode"
    there["http_options"]["host"] = "0.0.0.0"
    there["applications"][0]["args"]["monitor"]["directory"] = "/models/quality"
    assert here == there


def test_every_pod_has_the_environment_of_every_node(cluster):
    for pod in pods(cluster):
        (container,) = pod["containers"]
        given = {each["name"]: each["value"] for each in container["env"]}
        # The token is KubeRay's own business (authOptions).
        assert given | {"RAY_AUTH_MODE": "token"} == fast_path()


def test_the_head_outlives_itself_and_serves_nothing(service, cluster):
    assert cluster["gcsFaultToleranceOptions"]["redisAddress"].startswith("redis://fettle-redis:")
    assert "secretKeyRef" in cluster["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert service["spec"]["excludeHeadPodFromServeSvc"]


def test_only_the_token_opens_it(cluster):
    assert cluster["authOptions"] == {"mode": "token"}


def test_no_pod_runs_as_root(documents, cluster):
    (redis,) = [each["spec"]["template"]["spec"] for each in documents if each["kind"] == "StatefulSet"]
    for pod in [redis, *pods(cluster)]:
        assert pod["securityContext"]["runAsNonRoot"]
        assert all(not container["securityContext"]["allowPrivilegeEscalation"] for container in pod["containers"])


def test_rays_ports_are_rays_own(documents):
    policies = {each["metadata"]["name"]: each["spec"] for each in documents if each["kind"] == "NetworkPolicy"}
    rules = policies["fettle"]["ingress"]
    unlimited = [rule for rule in rules if "ports" not in rule]
    assert [rule["from"] for rule in unlimited] == [[{"podSelector": {"matchLabels": {"ray.io/is-ray-node": "yes"}}}]]
    for_all = [rule for rule in rules if any("fettle-client" in str(peer) for peer in rule["from"])]
    assert [rule["ports"] for rule in for_all] == [[{"port": 8000}]]


def test_one_version_of_ray_everywhere(cluster):
    of_cluster = re.search(r"ray\[serve\]==([\d.]+)", (ROOT / "cluster.yaml").read_text())
    of_image = re.search(r"ray\[serve\]==([\d.]+)", (ROOT / "deploy" / "Dockerfile").read_text())
    assert of_cluster
    assert of_image
    assert {cluster["rayVersion"], of_cluster[1], of_image[1]} == {cluster["rayVersion"]}
