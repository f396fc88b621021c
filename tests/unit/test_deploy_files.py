"""cluster.yaml and deploy/serve.yaml: valid by Ray's own schemas, and in step with what `fettle serve` does."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve import Application
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve.schema import ServeDeploySchema

from deployments import app, fastpath
from deployments.versions import versions_of
from fettle.config import ServeConfig
from tests.fakes import FakeVariant, make_fake_family

ROOT = Path(__file__).parents[2]
START_COMMANDS = ("head_start_ray_commands", "worker_start_ray_commands")
# Paths and ports that keep two services on one machine apart; drains that are short since no load balancer watches.
OF_ONE_MACHINE = (
    "RAY_SERVE_HAPROXY_",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING",
    "RAY_SERVE_PROXY_MIN_DRAINING",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL",
)


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


@pytest.fixture(scope="module")
def on_premise() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "deploy" / "cluster-local.yaml").read_text())


@pytest.fixture(scope="module")
def service() -> ServeDeploySchema:
    return ServeDeploySchema.model_validate(yaml.safe_load((ROOT / "deploy" / "serve.yaml").read_text()))


def start(cluster: dict[str, Any], commands: str) -> str:
    (command,) = [command for command in cluster[commands] if "ray start" in command]
    return command


def exported(command: str) -> dict[str, str]:
    """What the command exports before it starts Ray."""
    before = command.partition("ray start")[0]
    exports = [part.strip() for part in before.split(";") if part.strip().startswith("export ")]
    return dict(word.split("=", 1) for part in exports for word in shlex.split(part)[1:])


def test_the_cluster_passes_rays_schema(cluster):
    validate_config(prepare_config(cluster))


@pytest.mark.parametrize("commands", START_COMMANDS)
def test_every_node_starts_with_the_fast_path(cluster, commands):
    variables = exported(start(cluster, commands))
    assert variables.items() >= (fastpath.FAST | fastpath.PATIENCE).items()


@pytest.mark.parametrize("commands", START_COMMANDS)
def test_every_node_starts_as_fettle_serve_does(cluster, commands):
    alone = fastpath.environment(Path("scratch"), fast=True, cores=4)
    shared = {name: value for name, value in alone.items() if not name.startswith(OF_ONE_MACHINE)}
    assert exported(start(cluster, commands)) == shared | fastpath.FAST | {"RAY_AUTH_MODE": "token"}


def test_only_the_token_opens_the_cluster(cluster):
    assert cluster["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    assert "-e RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]


def test_nothing_is_open_to_the_world(cluster):
    assert "--dashboard-host=127.0.0.1" in start(cluster, "head_start_ray_commands")
    assert "IpPermissions" not in cluster["provider"]["security_group"]


@pytest.mark.parametrize("commands", START_COMMANDS)
def test_the_object_store_has_a_size(cluster, commands):
    assert re.search(r"--object-store-memory=\d+\b", start(cluster, commands))


def test_groups(cluster):
    groups = cluster["available_node_types"]
    head = groups[cluster["head_node_type"]]
    assert head["resources"] == {"CPU": 0}, "routers and replicas must not land on the head"
    assert (groups["cpu"]["min_workers"], groups["cpu"]["max_workers"]) == (1, 8)
    assert "GPU" not in groups["cpu"]["resources"]
    assert (groups["gpu"]["min_workers"], groups["gpu"]["resources"]["GPU"]) == (0, 1)
    assert cluster["max_workers"] >= groups["cpu"]["max_workers"] + groups["gpu"]["max_workers"]


def test_one_version_of_ray_on_all_nodes(cluster):
    versions = re.findall(r"rayproject/ray:([\d.]+)|ray\[serve\]==([\d.]+)", (ROOT / "cluster.yaml").read_text())
    assert len(versions) == 4
    assert len({image or package for image, package in versions}) == 1


def test_every_node_installs_fettle(cluster):
    groups = cluster["available_node_types"].values()
    own = [group["worker_setup_commands"] for group in groups if "worker_setup_commands" in group]
    for commands in [cluster["setup_commands"], *own]:
        assert any("pip install" in command and "/home/ray/fettle" in command for command in commands)
    assert cluster["file_mounts"]["/home/ray/fettle"] == "."


def block(name: str) -> dict[str, Any]:
    """A commented block of cluster.yaml."""
    lines = (ROOT / "cluster.yaml").read_text().splitlines()
    return yaml.safe_load("\n".join(line.removeprefix(f"#{name} ") for line in lines if line.startswith(f"#{name} ")))


def test_the_cluster_on_google_cloud_passes_rays_schema(cluster):
    given = block("gcp")
    groups = cluster["available_node_types"]
    assert given["node_config"].keys() == groups.keys()
    made = cluster | {
        "provider": given["provider"],
        "available_node_types": {
            name: group | {"node_config": given["node_config"][name]} for name, group in groups.items()
        },
    }
    validate_config(prepare_config(made))


def test_the_cluster_on_ones_own_machines_passes_rays_schema(cluster):
    kept = {key: value for key, value in cluster.items() if key not in ("head_node_type", "available_node_types")}
    validate_config(prepare_config(kept | block("local")))


def test_the_file_for_machines_without_docker_passes_rays_schema(on_premise):
    validate_config(prepare_config(on_premise))


def test_the_file_for_machines_without_docker_does_what_the_cluster_does(cluster, on_premise):
    """The same exports and options, but for where the programs are, and that the head keeps replicas away itself."""
    for commands in START_COMMANDS:
        there, here = start(cluster, commands), start(on_premise, commands)
        is_head = commands.startswith("head")
        own = {"PATH": "/opt/fettle/bin:$PATH"} | ({"RAY_enable_autoscaler_v2": "0"} if is_head else {})
        assert exported(here) == exported(there) | own
        more = {"--num-cpus=0"} if is_head else set()
        assert set(here.partition("ray start")[2].split()) == set(there.partition("ray start")[2].split()) | more
    for remote, local in {"/models": "./models", "~/.ray/auth_token": "~/.ray/auth_token", "~/fettle": "."}.items():
        assert on_premise["file_mounts"][remote] == local
        assert local in cluster["file_mounts"].values()


def built(arguments: dict[str, Any]) -> Application:
    """As `serve deploy` and `serve run` call the builder: Ray turns the arguments into what its annotation says."""
    return call_user_app_builder_with_args_if_necessary(app.build, arguments)


def test_the_service_file_builds_fettle(service, tmp_path):
    family = make_fake_family(tmp_path / "sections")
    (application,) = service.applications
    assert application.import_path == "deployments.app:build"
    assert isinstance(built(application.args | {"families": [{"path": str(family.directory)}]}), Application)


def test_the_short_form_builds_fettle(tmp_path):
    family = make_fake_family(tmp_path / "sections")
    assert isinstance(built({"family": str(family.directory)}), Application)


def test_the_service_listens_on_the_loopback(service):
    assert service.http_options.host == "127.0.0.1"


def test_the_service_files_arguments_are_fettles(service):
    config = ServeConfig.model_validate(service.applications[0].args)
    assert [family.path for family in config.families] == ["/models/sections"]


def test_the_service_file_finds_its_families_on_the_cluster(cluster, service):
    config = ServeConfig.model_validate(service.applications[0].args)
    mounts = [Path(remote) for remote in cluster["file_mounts"]]
    for family in config.families:
        assert any(Path(family.path).is_relative_to(mount) for mount in mounts)


def test_a_call_is_stuck_only_long_after_its_time(tmp_path):
    """Twenty times a full call, or what the configuration says where that is longer; a replica has twice as long."""
    slow, fast = FakeVariant("slow", ms_per_call=2000.0), FakeVariant("fast", ms_per_call=1.0)
    family = make_fake_family(tmp_path / "sections", variants=[slow, fast])
    config = ServeConfig.model_validate({"family": str(family.directory), "replicas": {"stuck_after_s": 7}})
    assert app.stuck_after_s(family.variant("slow"), config) >= 40.0
    assert app.stuck_after_s(family.variant("fast"), config) == 7.0


def test_routers_and_replicas_of_a_variant_spread_over_nodes_where_that_is_asked_for(tmp_path):
    family = make_fake_family(tmp_path / "sections")
    for given in (None, 1):
        fields = {"replicas": {"max_per_node": given}, "routers_per_node": given}
        config = ServeConfig.model_validate({"family": str(family.directory), **fields})
        assert app.build(config)._bound_deployment._replica_config.max_replicas_per_node == given
        (version,) = versions_of(config)
        made = app.deployment(version, family.manifest.reference, config)
        assert made._bound_deployment._replica_config.max_replicas_per_node == given
