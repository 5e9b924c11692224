"""Packages that only some verbs need: the extra of pyproject.toml that brings a missing one."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires

_OF_AN_EXTRA = re.compile(r"^(?P<package>[\w-]+).*extra == ['\"](?P<extra>\w+)['\"]")


def with_remedy(error: ImportError) -> str:
    """What is missing, and what installs it where an extra does."""
    package = (error.name or "").split(".")[0].replace("_", "-")
    try:
        found = filter(None, map(_OF_AN_EXTRA.match, requires("sere") or ()))
    except PackageNotFoundError:  # a checkout that was never installed
        return str(error)
    for match in found:
        if match["package"] == package:
            return f"{error}: pip install '.[{match['extra']}]' in a clone of sere brings it"
    return str(error)
