"""Binds a family to Ray Serve: `build` is what `serve run deployments.app:build family=DIR` and `fettle serve` call.

One deployment for each variant, and the router before them as the ingress.
"""

# No `from __future__ import annotations` here: Ray reads the annotation of `build`'s argument as a class.

import asyncio
import gc
import uuid
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import ray
from pydantic import BaseModel
from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from deployments import endpoints
from deployments.api import ROW_PATHS, build_api
from deployments.batcher import Batcher
from deployments.border import Api
from deployments.cycle import lighten
from deployments.exporter import Exporter
from deployments.fleet import Fleet, deployment_name
from deployments.followers import autoscaling_stats, demands_of, followers
from deployments.journal import speak
from deployments.keyring import Keyring
from deployments.lane import Lane, Queued, Replicas
from deployments.links import Links
from deployments.listeners import accept_many
from deployments.monitor import MonitorDeployment, MonitorReply, RouterReport
from deployments.placement import actor_options, has_cpu_nodes, placement_of, replica_bytes, replicas_of
from deployments.router import Router
from deployments.router_metrics import RouterMetrics
from deployments.scaling import ROUTER, scaling_config
from deployments.served import ServedFamily, served_variants
from deployments.telemetry import Telemetry
from deployments.text_router import TextRouter
from deployments.text_variant import ReplicaStreams, TextOptions, TextVariant
from deployments.tracing import open_tracer
from deployments.trial import Trial
from deployments.variant import Followed, ReplicaSlots, Variant, await_replicas, follow_replicas
from deployments.versions import Version, least_replicas, still_asked, versions_of
from deployments.watch import Watch
from fettle import __version__, latency, model_store
from fettle.config import ServeConfig, StoreConfig, TextConfig
from fettle.costs import CALL_MS, RowCosts, batch_tokens, good_tokens, niceness, work_shares
from fettle.drafting import choose_draft
from fettle.errors import UsageError
from fettle.family import Family
from fettle.latency import TextCosts
from fettle.manifest import TaskKind, VariantManifest
from fettle.model_store import VariantFiles
from fettle.scheduling import BatchBounds, Queue
from fettle.store import sha256_bytes
from fettle.usage import Usage
from workers.engine import EngineOptions
from workers.generator import ALONE_CHUNK

# The router's own bound is the predicted work in its queues; Serve must not queue or refuse before it.
INGRESS_CONCURRENCY = 10_000
# How many times its full time a call may take before it counts as lost; a replica's engine, twice that.
SLOW = 20
STUCK = 2
ROUTER_REQUESTS = 64.0
# Things that were made since the collector last looked, and still are: Python's own 700 are those of a few requests.
COLLECT_EVERY = 50_000
# So often it looks at the new alone before it looks at the older too, and at those before it looks at all.
COLLECT_OLDER = (5, 5)
# What only replaced routers asked goes so long after they did.
KEPT_S = 30.0


@serve.deployment
@serve.ingress()
class RouterIngress:
    """The router as Serve's ingress. Several replicas share nothing and agree, since they read the same families."""

    def __init__(
        self,
        config: ServeConfig,
        handles: Mapping[str, Mapping[str, DeploymentHandle]],
        monitor: DeploymentHandle,
        kept: Collection[DeploymentHandle] = (),
    ) -> None:
        """`kept`: replicas that only the routers before this one ask; there are some while a service is replaced."""
        speak()
        accept_many()
        lighten(ROW_PATHS)
        followed: dict[str, Followed] = {}
        links: dict[str, Links] = {}
        families = {}
        versions = versions_of(config)
        for version in versions:
            name, family = version.name, version.family
            shares = work_shares(family, handles[name])
            batchers: dict[str, Queued] = {}
            for variant, handle in handles[name].items():
                manifest = family.variant(variant)
                stuck = stuck_after_s(manifest, config)
                links[handle.deployment_name] = own = Links(endpoints.find if config.wire else None, stuck)
                if manifest.task.kind is TaskKind.GENERATE:
                    streams = ReplicaStreams(handle, stuck, own)
                    batchers[variant] = make_lane(manifest, streams, config)
                    followed[handle.deployment_name] = streams
                else:
                    slots = ReplicaSlots(handle, config.replicas.places, 1 / config.routers, stuck, own)
                    batchers[variant] = make_batcher(manifest, slots, config, shares[variant])
                    followed[handle.deployment_name] = slots
            families[name] = served = ServedFamily.of(version.settings, name, family, batchers, config.gears)
            served.sleeps = any(not replicas_of(config, version.prefix, each).min_replicas for each in batchers)
            for batcher in batchers.values():
                batcher.calm = served.is_calm

        async def send(report: RouterReport) -> MonitorReply:
            reply: MonitorReply = await monitor.sync.remote(report)
            return reply

        router, telemetry = uuid.uuid4().hex[:8], Telemetry()
        trials = {
            version.stable: Trial(families[version.stable], families[version.name], version.rollout)
            for version in versions
            if version.stable is not None
        }
        usage = Usage()
        watch = Watch(router, families, telemetry, send, config.monitor.share, trials=trials.values(), usage=usage)
        self._keyring = Keyring.of(config, usage)
        made = Router(families, config.limits, config.classes, telemetry, watch, id=router, trials=trials)
        tracer = open_tracer(config.tracing)
        self._api = build_api(made, self._keyring, TextRouter(made), proxy_secret_of(config), tracer)
        self._fleet = Fleet()
        most = {
            (name, variant): replicas_of(config, name, variant).max_replicas
            for name in handles
            for variant in handles[name]
        }
        self._metrics = RouterMetrics(made, self._fleet, Exporter(), most)
        self._watch, self._demands = watch, demands_of(handles, families)
        self._followed, self._links = followers(followed, self._demands), links
        if kept and config.replicas.min_replicas:
            # The routers before this one answer until it can. A new version is waited for by its rollout.
            needed = [
                handle.deployment_name
                for version in versions
                for variant, handle in handles[version.name].items()
                if version.stable is None and replicas_of(config, version.name, variant).min_replicas
            ]
            await_replicas(needed, serve.get_replica_context().app_name)

    def __serve_build_asgi_app__(self) -> Api:
        following = follow_replicas(self._followed, self._links, serve.get_replica_context().app_name, self._fleet)
        loop = asyncio.get_running_loop()
        self._running = [
            loop.create_task(run) for run in (following, self._watch.run(), self._metrics.run(), self._keyring.follow())
        ]
        collect_seldom()
        return self._api

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What `deployments.scaling` decides by; Serve asks once a second."""
        return autoscaling_stats(self._demands)


def build(args: ServeConfig) -> Application:
    """The Serve application for a configuration.

    Raises:
        FamilyError, IntegrityError: a family is missing or damaged.
        UsageError: a variant that is not there or not measured; two families of one name.
    """
    config = absolute(args)
    # Here, where the user sees it, and not in every process.
    open_tracer(config.tracing)
    versions = versions_of(config)
    nodes = ray.nodes() if config.cpu_nodes is None and ray.is_initialized() else []
    cpu_nodes = config.cpu_nodes or (config.cpu_nodes is None and has_cpu_nodes(nodes))
    handles = {
        version.name: {
            variant: deployment(version, variant, config, cpu_nodes=cpu_nodes, least=least_replicas(version, variant))
            for variant in served_variants(version.settings, version.family)
        }
        for version in versions
    }
    named = {_name(each) for variants in handles.values() for each in variants.values()}
    kept = []
    for version, running in still_asked(versions):
        for variant in served_variants(version.settings, version.family):
            old = deployment(version, variant, running, cpu_nodes=cpu_nodes, kept=True)
            if _name(old) not in named:
                named.add(_name(old))
                kept.append(old)
    router = RouterIngress.options(  # type: ignore[attr-defined]
        name=ROUTER,
        # A call is a request here; Ray's own policy, should it decide, would aim at this many at a time.
        autoscaling_config=scaling_config(
            config.routers, config.max_routers or config.routers, config.autoscale, fallback=ROUTER_REQUESTS
        ),
        max_ongoing_requests=INGRESS_CONCURRENCY,
        ray_actor_options={"num_cpus": config.router_cpus},
        max_replicas_per_node=config.routers_per_node,
        max_surge_percent=100,
        graceful_shutdown_timeout_s=config.drain_s,
        version=code_version(config, sorted(named)),
        _internal=True,
    )
    monitor = MonitorDeployment.options(  # type: ignore[attr-defined]
        version=code_version(config), _internal=True
    ).bind(config)
    return router.bind(config, handles, monitor, kept)


def absolute(config: ServeConfig) -> ServeConfig:
    """With absolute paths, since Ray's processes have working directories of their own."""
    families = []
    for family in config.families:
        update: dict[str, object] = {"path": model_store.absolute(family.path)}
        if family.rollout is not None:
            update["rollout"] = family.rollout.model_copy(update={"path": model_store.absolute(family.rollout.path)})
        families.append(family.model_copy(update=update))
    keys = None if config.keys_file is None else model_store.absolute(config.keys_file)
    return config.model_copy(update={"families": families, "keys_file": keys})


def code_version(*parts: object) -> str:
    """Replicas are replaced when this changes. Only `serve.run` asks for it; `serve deploy` replaces all of them."""
    written = [part.model_dump_json() if isinstance(part, BaseModel) else repr(part) for part in parts]
    return sha256_bytes("\n".join([__version__, *written]).encode())[:16]


def _name(application: Application) -> str:
    name: str = application._bound_deployment.name
    return name


def named_families(config: ServeConfig) -> dict[str, Family]:
    """The families by the name they are served under.

    Raises:
        UsageError: two have the same name.
    """
    return {version.name: version.family for version in versions_of(config) if version.stable is None}


def deployment(
    version: Version,
    variant: str,
    settings: ServeConfig,
    *,
    cpu_nodes: bool = False,
    least: int = 0,
    kept: bool = False,
) -> Application:
    """One variant's deployment, with its share of CPU, GPU and memory and Ray's autoscaling.

    `cpu_nodes`: see `placement.actor_options`; `least`: see `versions.least_replicas`; `kept`: for the routers that are
    being replaced, and nothing of it stays when nobody asks any more.
    """
    config, family = replicas_of(settings, version.prefix, variant), version.family
    place = placement_of(settings, version.prefix, variant)
    manifest = family.variant(variant)
    engine = EngineOptions(device=config.device, threads=config.threads)
    nice = niceness(family, variant, config)
    generates, needed_bytes = manifest.task.kind is TaskKind.GENERATE, replica_bytes(manifest, settings)
    kind: Any = TextVariant if generates else Variant
    draft = draft_of(family, variant, settings.text) if generates else None
    guesses = None if draft is None else files_of(version, draft, settings.store)
    stuck = STUCK * stuck_after_s(manifest, settings)
    text = TextOptions(engine, settings.text, nice, guesses, stuck, settings.wire)
    own = [text] if generates else [engine, nice, stuck, settings.wire]
    arguments = (files_of(version, variant, settings.store), *own, settings.tracing)
    bound: Application = kind.options(
        name=deployment_name(version.name, variant, family.version),
        version=code_version(arguments),
        _internal=True,
        max_ongoing_requests=settings.text.slots + settings.text.waiting if generates else config.places,
        ray_actor_options=actor_options(manifest, config, place, cpu_nodes=cpu_nodes, needed_bytes=needed_bytes),
        autoscaling_config=scaling_config(
            0 if kept else min(config.max_replicas, max(config.min_replicas, least)),
            config.max_replicas,
            settings.autoscale.model_copy(update={"zero_delay_s": KEPT_S}) if kept else settings.autoscale,
            needed_bytes,
        ),
        # A batch that Ray's handle holds back looks again soon: the pause would be idle time of a replica.
        request_router_config=RequestRouterConfig(initial_backoff_s=0.002, backoff_multiplier=2, max_backoff_s=0.01),
        health_check_period_s=2.0,
        # A process that is frozen is started again after three of these.
        health_check_timeout_s=10.0,
        graceful_shutdown_timeout_s=20.0,
        max_surge_percent=settings.surge_percent,
        max_replicas_per_node=config.max_per_node,
    ).bind(*arguments)
    return bound


def files_of(version: Version, variant: str, store: StoreConfig) -> VariantFiles:
    entries = version.family.manifest.variants
    [found] = [entry.manifest_sha256 for entry in entries if entry.id == variant]
    return VariantFiles(version.settings.path, variant, found, store)


def draft_of(family: Family, variant: str, config: TextConfig) -> str | None:
    """The variant whose guesses `variant` checks, if any."""
    if config.draft == "auto":
        return choose_draft(family.variants, variant)
    if config.draft == "off" or config.draft == variant:
        return None
    if config.draft not in family.variants:
        known = ", ".join(family.variants)
        raise UsageError(
            f"text.draft: family {family.name!r} has no variant {config.draft!r}; use one of {known}, or auto"
        )
    return config.draft


def stuck_after_s(manifest: VariantManifest, config: ServeConfig) -> float:
    """How long a call may be silent: far longer than any takes, however busy the machine."""
    assert manifest.measured is not None
    table, prompts = manifest.measured.latency, manifest.measured.prompts
    if manifest.task.kind is TaskKind.GENERATE and prompts is not None:
        # A replica that generates says something every second; a step is a piece of a prompt and a token for each text.
        slowest = latency.full_call_ms(prompts, ALONE_CHUNK) + latency.full_call_ms(table, 1)
    else:
        slowest = latency.full_call_ms(table, config.batch.max_tokens or good_tokens(table))
    return max(config.replicas.stuck_after_s, SLOW * slowest / 1000)


def make_batcher(
    manifest: VariantManifest, slots: ReplicaSlots, config: ServeConfig, work_share: float = 1.0
) -> Batcher:
    """The batcher before a variant. `work_share`: see `work_shares`."""
    assert manifest.measured is not None
    table = manifest.measured.latency
    bounds = config.batch
    tokens = bounds.max_tokens or batch_tokens(table, config.gears.objective_ms, work_share)
    return Batcher(
        slots=slots,
        cost=RowCosts(table, tokens, manifest.tokenizer.max_length),
        queue=Queue(BatchBounds(rows=bounds.max_rows, tokens=tokens, max_age_s=bounds.max_age_ms / 1000)),
        max_queue_s=bounds.max_queue_s,
        max_gap_queue_s=bounds.max_batch_queue_s,
        routers=config.routers,
        call_s=CALL_MS / 1000,
        stages=manifest.exits + 1,
    )


def make_lane(manifest: VariantManifest, replicas: Replicas, config: ServeConfig) -> Lane:
    """The lane before a variant that generates text."""
    measured = manifest.measured
    assert measured is not None
    if measured.prompts is None:
        raise UsageError(f"variant {manifest.id!r} was not measured as a text generator; run `fettle optimize` again")
    text = config.text
    return Lane(
        slots=replicas,
        costs=TextCosts(measured.prompts, measured.latency, text.slots, measured.typical_length),
        places=text.slots + text.waiting,
        max_queue_s=config.batch.max_queue_s,
        max_gap_queue_s=config.batch.max_batch_queue_s,
        routers=config.routers,
        call_s=CALL_MS / 1000,
    )


def collect_seldom() -> None:
    """What a router has when it begins lives as long as it does, and what a request leaves behind goes without the
    collector, but for a few things that hold each other: it looks at many new things at a time, seldom at older ones.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECT_EVERY, *COLLECT_OLDER)


def proxy_secret_of(config: ServeConfig) -> str | None:
    """What HAProxy adds to requests. Raises UsageError if the file cannot be read: the router would be open."""
    if config.proxy_secret_file is None:
        return None
    try:
        return Path(config.proxy_secret_file).read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        raise UsageError(f"proxy_secret_file {config.proxy_secret_file}: {error}") from None
