"""Hosts on one machine: each with a network, process numbers, a name and private directories of its own. Linux, root.

A host is a set of namespaces around an init process of ours: killed, it takes every process of the host with it, as
when the power fails. All hosts sit on one bridge, which this machine is on too; a host that is cut off hears nothing
and is not told so. Processors, memory and the rest of the file system are shared. Knows no Ray.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

# Of each host's own: where Ray and its HAProxy keep sessions and sockets, and the shared memory of its object store.
PRIVATE = ("/tmp/ray", "/tmp/haproxy-serve", "/dev/shm")
FORWARDING = Path("/proc/sys/net/ipv4/ip_forward")
PR_SET_PDEATHSIG = 1
COMMANDS = ("ip", "unshare", "nsenter", "mount")


class HostError(RuntimeError):
    """A command that makes, or runs in, a host failed; the message has what it said."""


def why_not() -> str | None:
    """Why this machine can have no such hosts; None if it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces take Linux and root"
    missing = [command for command in COMMANDS if shutil.which(command) is None]
    if missing:
        return f"{', '.join(missing)} is not installed (iproute2 and util-linux have it)"
    probe = f"fettle-{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    if tried.returncode:
        return f"network namespaces are not allowed here: {tried.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", probe], check=True)
    return None


def call(*command: str) -> str:
    """Raises HostError."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise HostError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


@dataclass(slots=True, eq=False)
class Host:
    """One host of a `Network`; see the module.

    `directory` holds what is private to it; `setup` are shell commands that run in its namespaces before anything else.
    """

    name: str
    address: str
    namespace: str
    cable: str
    bridge: str
    directory: Path
    hosts_file: Path
    setup: Sequence[str] = ()
    _init: subprocess.Popen[bytes] | None = None
    _pid: int = 0

    @property
    def is_up(self) -> bool:
        return self._init is not None and self._init.poll() is None

    def boot(self) -> None:
        """Start its init process, with empty private directories."""
        if self.is_up:
            raise HostError(f"{self.name} is up")
        shutil.rmtree(self.directory, ignore_errors=True)
        mounts = [f"mount --bind {self.hosts_file} /etc/hosts"]
        for number, place in enumerate(PRIVATE):
            own = self.directory / str(number)
            own.mkdir(parents=True)
            own.chmod(0o1777)
            Path(place).mkdir(parents=True, exist_ok=True)
            mounts.append(f"mount --bind {own} {place}")
        # Shared memory must be memory.
        mounts[-1] = "mount -t tmpfs -o size=2g tmpfs /dev/shm"
        script = " && ".join(
            [f"hostname {self.name}", *mounts, *self.setup, f"exec {sys.executable} -m benchmarks.hosts"]
        )
        spaces = ["unshare", "--fork", "--pid", "--mount-proc", "--mount", "--uts", "--kill-child=SIGKILL"]
        said = self.directory / "init"
        with said.open("wb") as errors:
            self._init = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, *spaces, "sh", "-c", script],
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=Path(__file__).parents[1],
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        assert self._init.stdout is not None
        if self._init.stdout.readline() != b"up\n":
            self._init.kill()
            self._init.wait()
            self._init = None
            raise HostError(f"{self.name} did not come up: {said.read_text(errors='replace')}")
        (self._pid,) = [child.pid for child in psutil.Process(self._init.pid).children()]

    def command(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> list[str]:
        """What runs a command on this host."""
        given = [f"{name}={value}" for name, value in (environment or {}).items()]
        return [
            *("nsenter", "--target", str(self._pid), "--net", "--pid", "--mount", "--uts"),
            *("env", *given, *command),
        ]

    def run(
        self, command: Sequence[str], environment: Mapping[str, str] | None = None, timeout_s: float = 180.0
    ) -> str:
        """What it prints. Raises HostError if it fails, or takes longer."""
        # Into a file: daemons that the command leaves behind keep its output open.
        output = self.directory / "output"
        with output.open("wb") as said:
            running = subprocess.Popen(self.command(command, environment), stdout=said, stderr=subprocess.STDOUT)
            try:
                code = running.wait(timeout_s)
            except subprocess.TimeoutExpired:
                running.kill()
                running.wait()
                code = -1
        text = output.read_text(errors="replace")
        if code:
            raise HostError(f"{self.name}: {' '.join(command)} ended with {code}:\n{text[-3000:]}")
        return text

    def processes(self, title: str = "") -> list[psutil.Process]:
        """Those whose command line begins with `title`."""
        if not self.is_up:
            return []
        space = str(Path(f"/proc/{self._pid}/ns/pid").readlink())
        return [process for process in psutil.process_iter() if _is_in(process, space, title)]

    def cut(self) -> None:
        """Pull its cable out of the bridge: packets are lost both ways, and nobody is told."""
        call("ip", "link", "set", self.cable, "nomaster")

    def mend(self) -> None:
        call("ip", "link", "set", self.cable, "master", self.bridge)

    def kill(self) -> None:
        """SIGKILL for its init, and so for everything on it; the network stays."""
        if self._init is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        self._init.wait()
        self._init = None


@dataclass(slots=True)
class Network:
    """Hosts on a bridge; a context manager that takes all of it down. `subnet`: the first three numbers."""

    directory: Path
    subnet: str = "10.217.61"
    hosts: dict[str, Host] = field(default_factory=dict)
    forwarding: str | None = None

    @property
    def bridge(self) -> str:
        # An interface's name has 15 characters at most.
        return f"flt{self.subnet.rpartition('.')[2]}"

    @property
    def _behind_us(self) -> list[str]:
        return ["POSTROUTING", "-s", f"{self.subnet}.0/24", "!", "-o", self.bridge, "-j", "MASQUERADE"]

    @property
    def gateway(self) -> str:
        """This machine's own address on the bridge."""
        return f"{self.subnet}.1"

    def __enter__(self) -> Network:
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / "hosts").write_text("127.0.0.1 localhost\n")
        call("ip", "link", "add", self.bridge, "type", "bridge")
        try:
            call("ip", "address", "add", f"{self.gateway}/24", "dev", self.bridge)
            call("ip", "link", "set", self.bridge, "up")
        except HostError:
            self.__exit__()
            raise
        return self

    def connect(self) -> None:
        """Let the hosts reach what this machine reaches. Takes iptables."""
        call("iptables", "-t", "nat", "-A", *self._behind_us)
        self.forwarding = FORWARDING.read_text()
        FORWARDING.write_text("1\n")

    def __exit__(self, *_: object) -> None:
        if self.forwarding is not None:
            FORWARDING.write_text(self.forwarding)
            subprocess.run(["iptables", "-t", "nat", "-D", *self._behind_us], capture_output=True, check=False)
        for host in self.hosts.values():
            host.kill()
            # A namespace, and with it what lies there of the cable, goes a while after its last process.
            subprocess.run(["ip", "link", "delete", host.cable], capture_output=True, check=False)
            subprocess.run(["ip", "netns", "delete", host.namespace], capture_output=True, check=False)
        self.hosts.clear()
        subprocess.run(["ip", "link", "delete", self.bridge], capture_output=True, check=False)

    def add(self, name: str, setup: Sequence[str] = ()) -> Host:
        """A new host, booted."""
        number = len(self.hosts) + 2
        host = Host(
            name=name,
            address=f"{self.subnet}.{number}",
            namespace=f"{self.bridge}-{name}",
            cable=f"{self.bridge}v{number}",
            bridge=self.bridge,
            directory=self.directory / name,
            hosts_file=self.directory / "hosts",
            setup=setup,
        )
        call("ip", "netns", "add", host.namespace)
        self.hosts[name] = host
        inside = ["ip", "-n", host.namespace]
        call("ip", "link", "add", host.cable, "type", "veth", "peer", "name", "eth0", "netns", host.namespace)
        call("ip", "link", "set", host.cable, "master", self.bridge, "up")
        call(*inside, "address", "add", f"{host.address}/24", "dev", "eth0")
        call(*inside, "link", "set", "eth0", "up")
        call(*inside, "link", "set", "lo", "up")
        call(*inside, "route", "add", "default", "via", self.gateway)
        with host.hosts_file.open("a") as known:
            known.write(f"{host.address} {name}\n")
        host.boot()
        return host


def wait_for(true: object, within_s: float, what: str, every_s: float = 0.5) -> float:
    """Ask until it is true; the seconds that this took. Raises HostError when the time is over."""
    assert callable(true)
    started = time.monotonic()
    while not true():
        if time.monotonic() - started > within_s:
            raise HostError(f"{what}: not in {within_s:g} s")
        time.sleep(every_s)
    return time.monotonic() - started


def _die_with_parent() -> None:
    """Hosts do not outlive whoever made them."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _is_in(process: psutil.Process, space: str, title: str) -> bool:
    try:
        inside = str(Path(f"/proc/{process.pid}/ns/pid").readlink()) == space
        return inside and " ".join(process.cmdline()).startswith(title)
    except (psutil.Error, OSError):
        return False


def _reaped() -> Iterator[int]:
    """The numbers of the dead, as they die; 0 while there is none."""
    while True:
        try:
            yield os.waitpid(-1, 0)[0]
        except ChildProcessError:
            yield 0


def main() -> None:
    """The init process of a host: collects orphans until it is killed."""
    print("up", flush=True)
    for dead in _reaped():
        if not dead:
            time.sleep(0.2)


if __name__ == "__main__":
    main()
