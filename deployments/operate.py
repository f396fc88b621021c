"""What an operator does to a service that runs: replace what it serves, begin rollouts and end them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from deployments.rollouts import RolloutView
from deployments.server import connected, redeploy
from deployments.versions import ask_monitor, is_declared, versions_of
from fettle.config import FamilyConfig, RolloutConfig, ServeConfig
from fettle.errors import UnavailableError, UsageError

TAKEN_OVER_WITHIN_S = 180.0
EVERY_S = 1.0


@contextmanager
def connected_service(address: str | None, application: str) -> Iterator[Service]:
    """Raises UnavailableError if no such service runs."""
    with connected(address):
        yield Service(application)


@dataclass(frozen=True, slots=True)
class Service:
    """A service by the name of its application."""

    application: str

    @property
    def config(self) -> ServeConfig:
        """What it was deployed with."""
        try:
            config: ServeConfig = ask_monitor(self.application, "served")
        except Exception as error:
            # Of Ray, of Serve, of the network, or the monitor's own: with any of them it is not known what is served.
            raise UnavailableError(f"application {self.application!r} does not answer: {error!r}") from error
        return config

    def rollouts(self) -> list[RolloutView]:
        """Asked again while the monitor starts anew with what was deployed."""
        deadline = time.monotonic() + TAKEN_OVER_WITHIN_S
        while True:
            try:
                views: list[RolloutView] = ask_monitor(self.application, "rollouts")
            except Exception as error:
                # As above; what the last one was is told if it does not pass.
                if time.monotonic() > deadline:
                    raise UnavailableError(f"the monitor does not answer: {error!r}") from error
                time.sleep(EVERY_S)
            else:
                return views

    def start(self, family: str | None, rollout: RolloutConfig) -> None:
        """Deploy the new version beside the old one.

        Raises:
            UsageError: no such family, one is under way, or a file says what is deployed.
        """
        config = self.config
        if is_declared(self.application):
            raise UsageError(
                "this service was deployed from a file, which would undo a rollout at its next deploy; write "
                f"`rollout: {{path: {rollout.path}, steps: {rollout.steps}}}` below the family there, and deploy it"
            )
        stable = [version.name for version in versions_of(config) if version.stable is None]
        place = stable.index(named(stable, family))
        if config.families[place].rollout is not None:
            raise UsageError(
                f"a rollout of {stable[place]!r} is there; end it with `fettle rollout finish`, or abort it"
            )
        self._replace(config, place, config.families[place].model_copy(update={"rollout": rollout}))
        self._await(lambda views: any(view.config == rollout for view in views))

    def end(self, family: str | None, *, promote: bool) -> None:
        """Decide by hand. Raises UsageError if there is nothing to decide."""
        views = [view for view in self.rollouts() if not view.position.over]
        chosen = named([view.family for view in views], family)
        [name] = [view.name for view in views if view.family == chosen]
        complaint = ask_monitor(self.application, "end_rollout", name, promote)
        if complaint is not None:
            raise UsageError(complaint)

    def finish(self) -> None:
        """Deploy without the versions whose rollout is over: what won answers alone."""
        if is_declared(self.application):
            return
        config = self.config
        ended = {view.family: view for view in self.rollouts() if view.position.over}
        if not ended:
            return
        families = []
        for version in versions_of(config):
            if version.stable is None:
                families.append(_without_loser(version.settings, version.name, ended.get(version.name)))
        redeploy(config.model_copy(update={"families": families}), self.application)
        self._await(lambda views: not any(view.family in ended for view in views))

    def _replace(self, config: ServeConfig, place: int, family: FamilyConfig) -> None:
        families = [*config.families[:place], family, *config.families[place + 1 :]]
        redeploy(config.model_copy(update={"families": families}), self.application)

    def _await(self, done: Callable[[list[RolloutView]], bool]) -> None:
        """Until the new monitor answers: the old one does so for a moment more."""
        deadline = time.monotonic() + TAKEN_OVER_WITHIN_S
        while not done(self.rollouts()):
            if time.monotonic() > deadline:
                raise UnavailableError("Serve has not taken the change over; `serve status` says why")
            time.sleep(EVERY_S)


def _without_loser(settings: FamilyConfig, name: str, ended: RolloutView | None) -> FamilyConfig:
    if ended is None:
        return settings
    won = {"path": ended.path} if ended.position.status == "promoted" else {}
    # The name stays what clients ask for, whatever the new version's directory is called.
    return settings.model_copy(update={"rollout": None, "name": name, **won})


def named(names: list[str], wanted: str | None) -> str:
    """The one that is meant. Raises UsageError if that is not clear."""
    if wanted is None and len(names) == 1:
        return names[0]
    if wanted not in names:
        raise UsageError(f"--family: name one of {', '.join(names) or 'none, since nothing is there'}")
    assert wanted is not None
    return wanted
