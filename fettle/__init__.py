"""Fettle: measured, certified variants of a transformer, served on Ray behind one router."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fettle.local import load

__all__ = ["__version__", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # `import fettle` alone must stay light: the command's --help and every worker do it.
    if name == "load":
        from fettle.local import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
