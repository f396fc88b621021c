"""The versions of families that a service holds, and what of a running one must stay while another replaces it.

Every version has deployments of its own, so that an old router never meets a new replica: points, tokenizers and widths
belong to a version. Serve deletes deployments that a new configuration does not name, at once; so `build` names those
of the running service once more, for the routers that are still asking them.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from threading import Thread
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.context import _get_global_client
from ray.serve.schema import DeploymentStatus

from deployments.fleet import deployment_name
from fettle.config import FamilyConfig, RolloutConfig, ServeConfig
from fettle.errors import FettleError, UsageError
from fettle.family import Family
from fettle.model_store import ModelStore

logger = logging.getLogger("ray.serve.fettle")

MONITOR = "Monitor"
ANSWER_WITHIN_S = 10.0


@dataclass(frozen=True, slots=True)
class Version:
    """One version of a family. `name` is what requests may ask for; `old` the version that it is to take over from."""

    name: str
    settings: FamilyConfig
    family: Family
    old: Version | None = None

    @property
    def stable(self) -> str | None:
        """The name that it is to take over."""
        return None if self.old is None else self.old.name

    @property
    def prefix(self) -> str:
        return self.stable or self.name

    @property
    def rollout(self) -> RolloutConfig:
        """The settings by which a new version takes over."""
        assert self.old is not None
        assert self.old.settings.rollout is not None
        return self.old.settings.rollout


def versions_of(config: ServeConfig) -> list[Version]:
    """The families by the name they are served under, each followed by the new version that it has, if any.

    Raises:
        UsageError: two have the same name, or a new version is none.
    """
    store = ModelStore(config.store)
    found: list[Version] = []
    for settings in config.families:
        family = store.family(settings.path)
        name = settings.name or family.name
        if any(version.name == name for version in found):
            raise UsageError(f"two families are called {name!r}; give one of them another name")
        old = Version(name, settings, family)
        found.append(old)
        if settings.rollout is not None:
            found.append(_new_version(old, store.family(settings.rollout.path)))
    return found


def _new_version(old: Version, new: Family) -> Version:
    name, settings, family = old.name, old.settings, old.family
    assert settings.rollout is not None
    if new.version == family.version:
        raise UsageError(f"{settings.rollout.path} holds the version of {name!r} that is served already")
    if new.manifest.task.kind is not family.manifest.task.kind:
        raise UsageError(
            f"{settings.rollout.path} does another task than {name!r}; serve it as a family of another name"
        )
    own = settings.model_copy(update={"path": settings.rollout.path, "rollout": None, "name": None})
    if settings.variants is not None:
        kept = [variant for variant in settings.variants if variant in new.variants]
        own = own.model_copy(update={"variants": kept or None})
    return Version(f"{name}@{new.version}", own, new, old)


def running_configs() -> Iterator[ServeConfig]:
    """What services of this kind on the running Ray were deployed with; none where Ray or Serve does not run."""
    if not ray.is_initialized():
        return
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return
    for name, details in client.get_serve_details()["applications"].items():
        if MONITOR not in details["deployments"]:
            continue
        try:
            yield ask_monitor(name, "served")
        except Exception as error:
            # Without it this is a deploy as Serve does it, with a gap for requests, and not a reason to refuse one.
            logger.warning("application %s does not say what it serves: %r", name, error)


def least_replicas(version: Version, variant: str) -> int:
    """How many replicas a variant of a new version needs for its last step, by what runs of the old one's now.

    Autoscaling would come after the share has grown, and what waits meanwhile would count as slowness.
    """
    if version.old is None or not ray.is_initialized():
        return 0
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return 0
    name = deployment_name(version.old.name, variant, version.old.family.version)
    wanted = [
        application["deployments"][name]["target_num_replicas"]
        for application in client.get_serve_details()["applications"].values()
        if name in application["deployments"]
    ]
    return math.ceil(version.rollout.steps[-1] * max(wanted, default=0))


def is_declared(application: str) -> bool:
    """Whether a config file says what is deployed (`serve deploy`), and not a program (`fettle serve`)."""
    found = _get_global_client().get_serve_details()["applications"].get(application, {})
    return found.get("deployed_app_config") is not None


def start_failure(version: Version, application: str) -> str | None:
    """What Serve says of a version's replicas that it has given up starting."""
    try:
        details = _get_global_client().get_serve_details()["applications"][application]["deployments"]
    except RayError as error:
        logger.warning("Serve's controller does not answer: %s", error)
        return None
    for name, deployment in details.items():
        own = name.startswith(f"{version.prefix}.") and name.endswith(f"@{version.family.version}")
        if own and deployment["status"] == DeploymentStatus.DEPLOY_FAILED:
            return f"{name}: {last_line(deployment['message'])}"
    return None


def last_line(message: str) -> str:
    """Of a traceback, what was raised."""
    lines = [line.strip() for line in message.strip().splitlines() if line.strip()]
    return lines[-1] if lines else "Serve gave up starting its replicas"


def still_asked(versions: Iterable[Version]) -> list[tuple[Version, ServeConfig]]:
    """The versions of running services that serve a family of these, which old routers go on asking.

    What cannot be read any more is left out.
    """
    names = {version.prefix for version in versions}
    found = []
    for running in running_configs():
        try:
            old = versions_of(running)
        except FettleError as error:
            logger.warning("the running version cannot be read, so its requests may fail meanwhile: %s", error)
            continue
        if names & {version.prefix for version in old}:
            found += [(version, running) for version in old]
    return found


def ask_monitor(application: str, method: str, *arguments: object) -> Any:
    """What a method of an application's monitor returns."""

    async def call() -> Any:
        handle = serve.get_deployment_handle(MONITOR, application)
        return await asyncio.wait_for(getattr(handle, method).remote(*arguments), ANSWER_WITHIN_S)

    return asyncio.run_coroutine_threadsafe(call(), _loop()).result()


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """One that runs as long as the process: handles of Serve's fast path are bound to theirs."""
    loop = asyncio.new_event_loop()
    Thread(target=loop.run_forever, daemon=True).start()
    return loop
