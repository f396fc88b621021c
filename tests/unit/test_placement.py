"""What a replica asks of Ray, from its manifest and the configuration; and which deployments a service is made of."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from deployments.placement import (
    ACCELERATOR_LABEL,
    actor_options,
    has_cpu_nodes,
    known_accelerators,
    placement_of,
    replicas_of,
)
from fettle.config import FamilyConfig, PlacementConfig, ReplicaConfig, ServeConfig
from fettle.manifest import Resources, VariantManifest
from tests.fakes import make_fake_family


@pytest.fixture
def manifest(tmp_path: Path) -> VariantManifest:
    return make_fake_family(tmp_path / "family").variant("fake")


def settings(**changes: object) -> ServeConfig:
    return ServeConfig.model_validate({"families": [FamilyConfig(path="f")], **changes})


def node(**resources: float) -> dict[str, object]:
    labels = {ACCELERATOR_LABEL: "L4"} if resources.get("GPU") else {}
    return {"Alive": True, "Resources": resources, "Labels": labels}


def test_a_cpu_variant_keeps_off_machines_with_accelerators(manifest: VariantManifest):
    asked = actor_options(manifest, ReplicaConfig(), PlacementConfig(), cpu_nodes=True)
    assert (asked["num_cpus"], asked["num_gpus"]) == (1.0, 0.0)
    assert asked["label_selector"][ACCELERATOR_LABEL].startswith("!in(")
    assert {"A100", "H100", "L4", "T4"} <= set(known_accelerators())


def test_it_takes_them_where_there_are_no_others(manifest: VariantManifest):
    assert "label_selector" not in actor_options(manifest, ReplicaConfig(), PlacementConfig(), cpu_nodes=False)


def test_a_cuda_variant_gets_a_gpu_of_its_type_and_memory(manifest: VariantManifest):
    place = PlacementConfig(accelerator="L4", memory_bytes=8 << 30)
    asked = actor_options(manifest, ReplicaConfig(device="cuda"), place, cpu_nodes=True)
    assert asked == {"num_cpus": 1.0, "num_gpus": 1.0, "memory": 8 << 30, "accelerator_type": "L4"}


def test_the_manifest_speaks_where_the_configuration_does_not(manifest: VariantManifest):
    measured = manifest.model_copy(update={"resources": Resources(cpus=2, gpus=0.5, memory_bytes=1000)})
    asked = actor_options(measured, ReplicaConfig(device="cuda"), PlacementConfig(), cpu_nodes=True)
    assert asked == {"num_cpus": 2.0, "num_gpus": 0.5, "memory": 1000}
    told = actor_options(measured, ReplicaConfig(device="cuda", cpus=1, gpus=0.25), PlacementConfig(), cpu_nodes=True)
    assert (told["num_cpus"], told["num_gpus"]) == (1.0, 0.25)
    assert actor_options(measured, ReplicaConfig(gpus=1), PlacementConfig(), cpu_nodes=False)["num_gpus"] == 0.0


def test_labels_of_the_users_own_are_kept(manifest: VariantManifest):
    place = PlacementConfig(labels={"zone": "a", ACCELERATOR_LABEL: "!L4"})
    asked = actor_options(manifest, ReplicaConfig(), place, cpu_nodes=True)
    assert asked["label_selector"] == {"zone": "a", ACCELERATOR_LABEL: "!L4"}


def test_one_variant_may_differ_and_a_family_s_own_more_so():
    config = settings(
        replicas={"max_replicas": 4, "device": "cuda", "gpus": 1},
        placement={"int8": {"device": "cpu", "min_replicas": 2}, "sections:int8": {"max_replicas": 8}},
    )
    assert replicas_of(config, "sections", "fp16") == config.replicas
    other = replicas_of(config, "emb", "int8")
    assert (other.device, other.min_replicas, other.max_replicas) == ("cpu", 2, 4)
    assert replicas_of(config, "sections", "int8").max_replicas == 8
    assert placement_of(config, "emb", "fp16") == PlacementConfig()


def test_what_is_wrong_together_is_refused():
    with pytest.raises(ValidationError, match="exceeds max_replicas"):
        replicas_of(settings(placement={"int8": {"min_replicas": 9}}), "sections", "int8")
    with pytest.raises(ValidationError, match="accelerator is for device cuda"):
        PlacementConfig(accelerator="L4", device="cpu")


def test_which_machines_count_as_cpu_nodes():
    gpu, cpu, head = node(CPU=8, GPU=1), node(CPU=4), node()
    assert has_cpu_nodes([gpu, cpu, head])
    assert not has_cpu_nodes([gpu, head])
    assert not has_cpu_nodes([gpu, {**cpu, "Alive": False}])
