"""`ray up` as docs/operations.md says it, against hosts with networks, SSH servers and disks of their own.

    pytest -m long -s tests/e2e/test_ray_up.py         (root; OpenSSH's server, rsync; five minutes)

The hosts share this machine's Python environment, each with a layer of its own above it, so that the packages are there
already and pip installs Fettle alone. Everything else is what a user does, in the order of the runbook.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from benchmarks.hosts import Host, HostError, Network, wait_for, why_not
from tests.fakes import FakeVariant, classify_task, make_fake_family, make_point, make_step
from tests.integration.service import command

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
ENVIRONMENT = Path(sys.prefix)
HOSTS = ("head", "worker1", "worker2")
UP_S = 600.0


@dataclass(frozen=True)
class Operator:
    """Whoever brings the cluster up, at a laptop on the same network: a copy of the repository, and a shell."""

    laptop: Host
    repository: Path
    hosts: tuple[Host, ...]

    @property
    def environment(self) -> dict[str, str]:
        path = f"{ENVIRONMENT / 'bin'}:{os.environ['PATH']}"
        return {"HOME": str(Path.home()), "PATH": path, "TERM": "dumb", "LANG": "C.UTF-8", "PYTHONPATH": ""}

    def run(self, command: str) -> str:
        """A line of the runbook; printed with what it says."""
        print(f"\n$ {command}", flush=True)
        said = self.laptop.run(["bash", "-c", f"cd {self.repository} && {command}"], self.environment, UP_S)
        said = re.sub(r"\x1b\[[0-9;]*m|^.*V*INFO command_runner.*\n", "", said, flags=re.M)
        print(said, flush=True)
        return said

    @contextmanager
    def tunnel(self, command: str) -> Iterator[None]:
        """A line that goes on while the block runs."""
        print(f"\n$ {command} &", flush=True)
        shell = self.laptop.command(["bash", "-c", f"cd {self.repository} && exec {command}"], self.environment)
        running = subprocess.Popen(shell, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            yield
        finally:
            running.kill()
            running.wait()


def layered(directory: Path) -> list[str]:
    """What gives a host a layer of its own above this environment, at /opt/fettle too, and above root's home."""
    commands = []
    for place in (ENVIRONMENT, Path.home()):
        upper, work = directory / place.name / "upper", directory / place.name / "work"
        upper.mkdir(parents=True)
        work.mkdir()
        commands.append(f"mount -t overlay overlay -o lowerdir={place},upperdir={upper},workdir={work} {place}")
    models = directory / "models"
    models.mkdir()
    return [*commands, f"mount --bind {ENVIRONMENT} /opt/fettle", f"mount --bind {models} /models"]


@pytest.fixture
def operator(tmp_path: Path) -> Iterator[Operator]:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    for program in ("/usr/sbin/sshd", "iptables", "rsync", "ssh", "ssh-keygen"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (openssh-server, openssh-client, rsync, iptables)")
    # Where the hosts' own directories are mounted, and where sshd wants one.
    made = [place for place in map(Path, ("/opt/fettle", "/models", "/run/sshd")) if not place.exists()]
    for place in made:
        place.mkdir()
    key = tmp_path / "id_ed25519"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    with Network(tmp_path / "hosts", subnet="10.217.63") as network:
        # pip asks for what builds the package.
        network.connect()
        for name in HOSTS:
            host = network.add(name, layered(tmp_path / "disks" / name))
            host_key = tmp_path / f"{name}.key"
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(host_key)], check=True)
            options = {"AuthorizedKeysFile": f"{key}.pub", "StrictModes": "no", "PasswordAuthentication": "no"}
            given = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
            host.run(["/usr/sbin/sshd", "-h", str(host_key), *given])
        addresses = [network.hosts[name].address for name in HOSTS]
        laptop = network.add("laptop", layered(tmp_path / "disks" / "laptop"))
        laptop.run(["sh", "-c", f"rm -rf ~/.ray && mkdir -p -m 700 ~/.ssh && cp {key} ~/.ssh/id_ed25519"])
        hosts = tuple(network.hosts[name] for name in HOSTS)
        yield Operator(laptop, repository(tmp_path / "fettle", addresses), hosts)
    for place in made:
        place.rmdir()


def repository(directory: Path, addresses: list[str]) -> Path:
    """A copy of the files that git knows, with a family in models/, after the EDITs that the runbook asks for."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if not name.startswith(("tests/", "benchmarks/")):
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, directory / name)
    variants = [FakeVariant("fp32", ms_per_call=8.0), FakeVariant("int8", ms_per_call=4.0)]
    points = [make_point("within-0.01", 0.01, make_step("int8"))]
    made = directory / "models" / "sections"
    make_fake_family(made, name="sections", task=classify_task(), variants=variants, points=points)
    file = directory / "deploy" / "cluster-local.yaml"
    text = file.read_text()
    text = text.replace("10.0.0.10 ", addresses[0] + " ").replace(
        "[10.0.0.11, 10.0.0.12]", f"[{', '.join(addresses[1:])}]"
    )
    file.write_text(text.replace("ssh_user: ubuntu", "ssh_user: root"))
    assert yaml.safe_load(file.read_text())["provider"]["worker_ips"] == addresses[1:]
    return directory


def test_a_fresh_reader_brings_it_up(operator: Operator):
    up = "deploy/cluster-local.yaml"
    operator.run("ray get-auth-token --generate > /dev/null")
    operator.run(f"ray up --yes {up}")

    def nodes() -> int:
        said = operator.run(f"ray exec {up} 'RAY_AUTH_MODE=token /opt/fettle/bin/ray status'")
        return sum(map(int, re.findall(r"^ (\d+) local\.cluster\.node", said, re.M)))

    wait_for(lambda: nodes() == len(HOSTS), 300.0, "the workers have joined", every_s=15.0)
    operator.run(f"ray exec {up} 'RAY_AUTH_MODE=token /opt/fettle/bin/serve deploy ~/fettle/deploy/serve.yaml'")

    def runs() -> bool:
        said = operator.run(f"ray exec {up} 'RAY_AUTH_MODE=token /opt/fettle/bin/serve status'")
        return re.search(r"^ +fettle:\s+status: RUNNING", said, re.M) is not None

    wait_for(runs, 240.0, "the service runs", every_s=10.0)
    assert rays(operator)
    with operator.tunnel(f"ray attach {up} -p 8000"):
        wait_for(lambda: answers(operator), 60.0, "the tunnel is there", every_s=2.0)
        body = json.dumps({"model": "sections", "input": "the quick brown fox"})
        reply = operator.run(f"curl -s localhost:8000/classify -H 'content-type: application/json' -d '{body}'")
        assert json.loads(reply)["fettle"]["point"] == "within-0.01"
    operator.run(f"ray down --yes {up}")
    # The head's at once, and those of the workers when they have missed it for a while.
    wait_for(lambda: not rays(operator), 180.0, "Ray has ended")


def answers(operator: Operator) -> bool:
    try:
        return "200" in operator.run("curl -s -o /dev/null -w '%{http_code}' localhost:8000/ready")
    except HostError:
        return False


def rays(operator: Operator) -> list[str]:
    """Processes of Ray's on the hosts."""
    titles = [command(process) for host in operator.hosts for process in host.processes()]
    return [title for title in titles if title.startswith("ray::") or "/raylet/raylet " in title]
