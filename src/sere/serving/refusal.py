"""How serving says no: at start-up, with the reason."""

from __future__ import annotations


class ServingError(RuntimeError):
    """Re-routing was asked for and cannot take effect: says why, and what to do."""
