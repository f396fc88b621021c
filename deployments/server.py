"""`fettle serve`: Ray and Serve started, or joined, with the application on them, until the user stops it.

The only place in the product that sets environment variables, since Ray reads its own when it is imported.
"""

from __future__ import annotations

import io
import logging
import math
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from deployments import fastpath, forkserver
from deployments.journal import OURS
from deployments.keyring import Keyring
from deployments.served import served_variants
from fettle.config import ServeConfig
from fettle.errors import UnavailableError, UsageError
from fettle.machine import usable_cores
from fettle.manifest import Runtime, TaskKind
from fettle.model_store import ModelStore
from fettle.quality import QualityStore, store_path
from fettle.usage import Ledger, Usage, ledger_path

if TYPE_CHECKING:
    from ray.serve.schema import LoggingConfig

APPLICATION = "fettle"
LOGGERS = ("ray.serve", OURS)
# What Ray's own processes, a router and the proxy take beside the replicas.
RAY_MEMORY_BYTES = 1_500_000_000
# While the service starts.
LOOK_EVERY_S = 0.1
REACHED_WITHIN_S = 60.0


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Where to listen and which Ray to use. `address` None starts a Ray of its own."""

    host: str = "127.0.0.1"
    port: int = 8000
    address: str | None = None
    fast: bool = True
    dashboard: bool = True
    verbose: bool = False


@contextmanager
def running(config: ServeConfig, options: ServerOptions) -> Iterator[str]:
    """Serve the configuration while the block runs; yields the base URL.

    Raises:
        UsageError: the port is taken, too little memory.
        FamilyError, IntegrityError: a family is missing or damaged.
        UnavailableError: Ray or a deployment did not come up; the message says where its log is.
    """
    check_port(options.host, options.port)
    with tempfile.TemporaryDirectory(prefix="fettle-") as scratch:
        fast = options.fast and fastpath.available()
        if fast and options.address is None:
            # Of a Ray that was started elsewhere, so was the proxy.
            config = config.model_copy(update={"proxy_secret_file": str(fastpath.guard(Path(scratch)))})
        os.environ.update(fastpath.environment(Path(scratch), fast=fast, cores=usable_cores()))
        with _workers(config, options, Path(scratch)) as python:
            needed = needs(config)
            check_memory(needed)
            if options.address is None:
                config = bounded(config)
            check_evidence(config)
            check_keys(config)
            with _ray(options, needed, python):
                _deploy(config, options)
                yield f"http://{options.host}:{options.port}"


def check_port(host: str, port: int) -> None:
    """Raises UsageError if the port is taken."""
    if not fastpath.is_free(host, port):
        raise UsageError(f"port {port} on {host} is in use; choose another with --port")


@dataclass(frozen=True, slots=True)
class Needs:
    """`memory_bytes` of the replicas that start at once, and Ray's `cpus` for all that may ever start."""

    memory_bytes: int
    cpus: float


def needs(config: ServeConfig) -> Needs:
    """What serving this takes on one machine, by the measurements in the manifests.

    Memory for what starts now; CPUs, which only count places there, twice: for another version beside it.
    """
    from deployments.placement import replica_cpus, replicas_of

    memory, cpus = RAY_MEMORY_BYTES, (config.max_routers or config.routers) * config.router_cpus
    for settings in config.families:
        family = ModelStore(config.store).family(settings.path)
        for name in served_variants(settings, family):
            manifest = family.variant(name)
            peak = manifest.measured.peak_memory_bytes if manifest.measured else 0
            replicas = replicas_of(config, settings.name or family.name, name)
            memory += peak * replicas.min_replicas
            cpus += replica_cpus(manifest, replicas) * replicas.max_replicas
    return Needs(memory, 2 * cpus)


def check_memory(needed: Needs) -> None:
    """Raises UsageError if more is needed than is free."""
    free = psutil.virtual_memory().available
    if needed.memory_bytes > free:
        raise UsageError(
            f"serving this needs about {needed.memory_bytes / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free; "
            "serve fewer variants (--variant) or fewer replicas (--min-replicas)"
        )


def bounded(config: ServeConfig) -> ServeConfig:
    """With as much memory for all replicas as is free, unless the configuration says how much."""
    if config.autoscale.memory_bytes is not None:
        return config
    free = max(1, psutil.virtual_memory().available - RAY_MEMORY_BYTES)
    return config.model_copy(update={"autoscale": config.autoscale.model_copy(update={"memory_bytes": free})})


def check_evidence(config: ServeConfig) -> None:
    """Raises QualityError if the evidence about a family cannot be kept where it should be, before anything starts."""
    for settings in config.families:
        family = ModelStore(config.store).family(settings.path)
        path = store_path(family.directory, settings.name or family.name, config.monitor.directory)
        QualityStore(path, config.monitor.delta).close()


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """A connection to a Ray that runs, as the service on it has it; `address` None: the one on this machine.

    Raises:
        UnavailableError: there is none.
    """
    os.environ.update(fastpath.PATIENCE | (fastpath.FAST if fastpath.available() else {}))
    import ray

    try:
        # What Ray says is no result of a command.
        with redirect_stdout(sys.stderr):
            ray.init(address=address or "auto", log_to_driver=False, logging_level=logging.ERROR, namespace="serve")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UnavailableError(f"no running Ray could be reached: {error}; give its --address") from error
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


def redeploy(config: ServeConfig, application: str = APPLICATION) -> None:
    """Replace what a running application serves; returns when Serve has taken it over, which is before it is done."""
    from ray import serve
    from ray.serve.api import RunTarget
    from ray.serve.context import _get_global_client

    from deployments.app import build

    details = _get_global_client().get_serve_details()["applications"][application]
    target = RunTarget(build(config), application, details["route_prefix"], _quiet())
    serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)


def check_keys(config: ServeConfig) -> None:
    """Raises KeyFileError, UsageError if the API keys cannot be read, or their use not be counted beside them."""
    if config.keys_file is not None:
        Keyring.of(config, Usage())
        Ledger(ledger_path(config.keys_file), time.time()).close()


def wait_for_signal() -> None:
    """Block until SIGINT or SIGTERM."""
    stop = threading.Event()
    previous = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        stop.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _workers(config: ServeConfig, options: ServerOptions, scratch: Path) -> AbstractContextManager[Path | None]:
    """What the workers of a Ray of our own are started with, where not by Python itself."""
    if options.address is not None or not forkserver.available():
        return nullcontext()
    # Ray's log monitor tells drivers what workers print. This one does not ask, and logs stay where they are.
    without = () if options.verbose else ("log_monitor.py",)
    return forkserver.started(scratch, [*forkserver.MODULES, *torch_modules(config)], without)


def torch_modules(config: ServeConfig) -> set[str]:
    """The torch engines that are served, five seconds to import; not on CUDA, which survives no fork.

    There is time for that while Ray starts. ONNX Runtime has threads as soon as it is imported.
    """
    found = set()
    for settings in config.families if config.replicas.device == "cpu" else ():
        family = ModelStore(config.store).family(settings.path)
        generates = family.manifest.task.kind is TaskKind.GENERATE
        if any(family.variant(name).runtime is Runtime.TORCH for name in served_variants(settings, family)):
            found.add("workers.torch_decoder" if generates else "workers.torch_encoder")
    return found


@contextmanager
def _ray(options: ServerOptions, needed: Needs, python: Path | None) -> Iterator[None]:
    import ray

    own = options.address is None
    try:
        with nullcontext() if python is None else forkserver.standing_in(python):
            ray.init(
                address=options.address or "local",
                # On one machine Ray's CPUs only count places: there must be one for each replica that may start.
                num_cpus=max(usable_cores(), math.ceil(needed.cpus)) if own else None,
                include_dashboard=options.dashboard if own else None,
                log_to_driver=options.verbose,
                logging_level=logging.INFO if options.verbose else logging.ERROR,
                configure_logging=True,
            )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UnavailableError(f"Ray could not be reached or started: {error}") from error
    try:
        yield
    finally:
        with nullcontext() if options.verbose else _muted():
            _stop(own=own)


def _stop(*, own: bool) -> None:
    import ray
    from ray import serve

    if own:
        serve.shutdown()
    else:
        serve.delete(APPLICATION)
    ray.shutdown()


@contextmanager
def _muted() -> Iterator[None]:
    """Ray prints the planned end of its own controller as an error, which would frighten a user who pressed Ctrl-C."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


def _deploy(config: ServeConfig, options: ServerOptions) -> None:
    """The application on Serve; of a Serve of our own, its replicas start beside its proxy."""
    from ray import serve

    if not options.verbose:
        for name in LOGGERS:
            logging.getLogger(name).setLevel(logging.WARNING)
    logs = None if options.verbose else _quiet()
    http = {"host": options.host, "port": options.port}
    try:
        if options.address is None:
            _deploy_on_own(config, options, http, logs)
            return
        from deployments.app import build

        serve.start(http_options=http, logging_config=logs)
        serve.run(build(config), name=APPLICATION, route_prefix="/", logging_config=logs)
    except (RuntimeError, TimeoutError) as error:
        raise UnavailableError(f"the service did not come up: {error}") from error


def _deploy_on_own(
    config: ServeConfig,
    options: ServerOptions,
    http: dict[str, Any],
    logs: LoggingConfig | None,
) -> None:
    from ray import serve
    from ray.serve.api import RunTarget
    from ray.serve.context import _get_global_client

    from deployments.app import build

    with ThreadPoolExecutor(1) as beside:
        proxied = beside.submit(serve.start, http_options=http, logging_config=logs)
        # It waits for the proxy as well, of which the replicas need nothing.
        while _get_global_client(raise_if_no_controller_running=False) is None and not proxied.done():
            time.sleep(LOOK_EVERY_S)
        target = RunTarget(build(config), APPLICATION, "/", logs)
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
        proxied.result()
    _await_running(options)


def _await_running(options: ServerOptions) -> None:
    """Until all replicas run and requests come through.

    Raises:
        RuntimeError: a replica did not start.
        TimeoutError: all run, and still nothing comes through.
    """
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ApplicationStatus

    client = _get_global_client()
    while True:
        # `serve.status` checks all of it by a schema, 40 ms of a core each time.
        found = client.get_serve_status(APPLICATION).app_status
        if found.status == ApplicationStatus.RUNNING:
            break
        if found.status == ApplicationStatus.DEPLOY_FAILED:
            raise RuntimeError(found.message)
        time.sleep(LOOK_EVERY_S)
    host = "127.0.0.1" if options.host == "0.0.0.0" else options.host
    for _ in range(round(REACHED_WITHIN_S / LOOK_EVERY_S)):
        if _answers(host, options.port):
            return
        time.sleep(LOOK_EVERY_S)
    raise TimeoutError(f"its port does not answer, {REACHED_WITHIN_S:g} s after its replicas started")


def _answers(host: str, port: int) -> bool:
    """Whether a router answers at an address."""
    connection = HTTPConnection(host, port, timeout=REACHED_WITHIN_S)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == HTTPStatus.OK
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def _quiet() -> LoggingConfig:
    """Of Serve's own lines; of ours, errors, slow requests and decisions, see `deployments.journal.speak`."""
    from ray.serve.schema import LoggingConfig

    return LoggingConfig(encoding="JSON", log_level="WARNING", enable_access_log=False)
