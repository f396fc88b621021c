"""Where the measuring happens: processor, usable cores, memory, accelerator and library versions."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from fettle import __version__
from fettle.machine import usable_cores
from fettle.manifest import Hardware

# The names under which a distribution may be installed.
LIBRARIES = {
    "torch": ("torch",),
    "transformers": ("transformers",),
    "onnxruntime": ("onnxruntime-gpu", "onnxruntime"),
    "onnx": ("onnx",),
    "numpy": ("numpy",),
}


def describe() -> Hardware:
    return Hardware(
        processor=_processor(),
        cores=usable_cores(),
        memory_bytes=psutil.virtual_memory().total,
        accelerator=_accelerator(),
        versions={"fettle": __version__, "python": platform.python_version(), **_versions()},
    )


def busy_share() -> float:
    """Which share of this machine's processors is at work just now, from 0 to 1. Takes half a second."""
    return psutil.cpu_percent(interval=0.5) / 100


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), "") or platform.processor() or platform.machine() or "unknown"


def _accelerator() -> str | None:
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def _versions() -> dict[str, str]:
    found = {name: _first_version(names) for name, names in LIBRARIES.items()}
    return {name: number for name, number in found.items() if number is not None}


def _first_version(distributions: tuple[str, ...]) -> str | None:
    for name in distributions:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None
