"""What a benchmark prints above its figures: hardware, versions, and whether something else was running."""

from __future__ import annotations

import os
from importlib.metadata import version
from typing import Any

from optimize.hardware import describe


def describe_machine() -> dict[str, Any]:
    """Processor, usable cores, memory, versions, and the load average of the last minute before the run."""
    machine = describe().model_dump(mode="json")
    machine["versions"]["ray"] = version("ray")
    machine["load_average"] = round(os.getloadavg()[0], 2)
    return machine


def machine_lines(machine: dict[str, Any]) -> list[str]:
    """The same for people."""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    lines = [
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB, "
        f"accelerator: {machine['accelerator'] or 'none'}",
        versions,
    ]
    if machine["load_average"] > 0.5:
        lines.append(f"WARNING: the load average was {machine['load_average']} at the start; the machine is not idle")
    return lines
