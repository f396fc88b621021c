"""Where replicas of a variant run and what each asks of Ray: pure functions of its manifest and the configuration.

CPU variants stay off machines with accelerators where there are others: Ray by itself spreads them over both, and a GPU
machine that is full of them has an idle GPU. A machine's accelerator is a label that Ray finds out by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ray.util.accelerators import accelerators

from fettle.autoscale import check_gpu_share, gpu_share
from fettle.config import PlacementConfig, ReplicaConfig, ServeConfig
from fettle.manifest import TaskKind, VariantManifest

ACCELERATOR_LABEL = "ray.io/accelerator-type"


def placement_of(config: ServeConfig, family: str, variant: str) -> PlacementConfig:
    """What `placement` says of a variant: by `family:variant`, else by the variant's id."""
    given = config.placement
    return given.get(f"{family}:{variant}") or given.get(variant) or PlacementConfig()


def replicas_of(config: ServeConfig, family: str, variant: str) -> ReplicaConfig:
    """`replicas` with what `placement` says otherwise of this variant.

    Raises:
        ValidationError: the two together are wrong, such as a minimum above the maximum.
    """
    own = placement_of(config, family, variant).model_dump(include=set(ReplicaConfig.model_fields), exclude_none=True)
    return ReplicaConfig.model_validate({**config.replicas.model_dump(), **own})


def actor_options(
    manifest: VariantManifest,
    replicas: ReplicaConfig,
    place: PlacementConfig,
    *,
    cpu_nodes: bool,
    needed_bytes: int = 0,
) -> dict[str, Any]:
    """Ray's options for a replica.

    `cpu_nodes`: there are machines without accelerators, and CPU variants run on these alone. `needed_bytes`: memory of
    a replica, for its share of a GPU.
    """
    gpus = replica_gpus(manifest, replicas, needed_bytes)
    options: dict[str, Any] = {"num_cpus": replica_cpus(manifest, replicas), "num_gpus": gpus}
    memory = place.memory_bytes or manifest.resources.memory_bytes
    if memory:
        options["memory"] = memory
    if place.accelerator is not None:
        options["accelerator_type"] = place.accelerator
    labels = dict(place.labels)
    if not gpus and cpu_nodes and place.accelerator is None:
        labels.setdefault(ACCELERATOR_LABEL, f"!in({','.join(known_accelerators())})")
    if labels:
        options["label_selector"] = labels
    return options


def replica_cpus(manifest: VariantManifest, config: ReplicaConfig) -> float:
    return manifest.resources.cpus if config.cpus is None else config.cpus


def replica_gpus(manifest: VariantManifest, config: ReplicaConfig, needed_bytes: int = 0) -> float:
    """On CUDA a whole GPU unless something else was said: Ray hides the GPUs from a replica that asks for none.

    Where the memory of a card is known, replicas share it as far as what each needs fits.

    Raises:
        UsageError: those that share a GPU would need more memory than it has.
    """
    if config.device == "cpu":
        return 0.0
    card = config.gpu_memory_bytes
    if config.gpus is not None:
        if card is not None and config.gpus > 0:
            check_gpu_share(manifest.id, config.gpus, needed_bytes, card)
        return config.gpus
    if card is not None:
        return gpu_share(manifest.id, needed_bytes, card)
    return manifest.resources.gpus or 1.0


def replica_bytes(manifest: VariantManifest, settings: ServeConfig) -> int:
    """Memory of one replica: what measuring it took at most, and for text the keys and values that it may hold."""
    peak = 0 if manifest.measured is None else manifest.measured.peak_memory_bytes
    return peak + (settings.text.cache_bytes if manifest.task.kind is TaskKind.GENERATE else 0)


def known_accelerators() -> list[str]:
    """The values that Ray gives the label."""
    return sorted({value for name, value in vars(accelerators).items() if name.isupper() and isinstance(value, str)})


def has_cpu_nodes(nodes: Iterable[Mapping[str, Any]]) -> bool:
    """Whether one of Ray's machines takes work and has no accelerator. `nodes` as `ray.nodes()` gives them."""
    return any(
        node["Alive"]
        and node["Resources"].get("CPU", 0) > 0
        and not node["Resources"].get("GPU", 0)
        and ACCELERATOR_LABEL not in node["Labels"]
        for node in nodes
    )
