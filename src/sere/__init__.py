"""sere: similarity-based expert re-routing for Mixture-of-Experts models.

`Policy`, `Table` and `reroute` are imported on first use, so that `import sere` (and the command
line's help) need no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"
__all__ = ["Plan", "Policy", "RowClass", "Table", "__version__", "reroute"]

if TYPE_CHECKING:
    from sere.kernels import Plan, RowClass, reroute
    from sere.policy import Policy
    from sere.table import Table

_HOME = {
    "Plan": "sere.kernels",
    "Policy": "sere.policy",
    "RowClass": "sere.kernels",
    "Table": "sere.table",
    "reroute": "sere.kernels",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'sere' has no attribute {name!r}")
