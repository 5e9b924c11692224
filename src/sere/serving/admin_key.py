"""The key of the operator's route (see `switch`): from a file, or the environment."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sere.files import why
from sere.policy import PolicyError

VARIABLE = "SERE_ADMIN_KEY"
SETTING = "admin_key_file"
SHORTEST = 16
"""Bytes of a key: `openssl rand -hex 16` gives 32."""

_LOG = logging.getLogger("vllm.sere")


def admin_key(settings: Mapping[str, Any]) -> bytes | None:
    """The key as it stands now, or None if there is none; a file is read anew, so that a key can be
    changed without a restart.

    settings: what the user wrote behind "sere". Raises `PolicyError` for what is no key.
    """
    named, key = settings.get(SETTING), os.environ.get(VARIABLE, "").encode()
    if named is None:
        return _long_enough(key.strip(), VARIABLE) if key else None
    if key:
        raise PolicyError(f"{VARIABLE} is set and {SETTING} is given: keep one of the two")
    if not isinstance(named, str):
        raise PolicyError(f"{SETTING}={named!r}: expected the path of a file")
    try:
        key = Path(named).read_bytes()
    except (OSError, ValueError) as error:
        raise PolicyError(f"{SETTING}={named}: cannot be read ({why(error)})") from None
    return _long_enough(key.strip(), f"{SETTING}={named}")


def check_admin_key(settings: Mapping[str, Any]) -> bool:
    """Whether there is a key. What will be none is refused at start-up; that others may read its
    file is logged."""
    key, path = admin_key(settings), settings.get(SETTING)
    if path is not None and Path(path).stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
        _LOG.warning("sere: %s=%s can be read by other users: chmod 600 %s", SETTING, path, path)
    return key is not None


def opens(given: bytes, key: bytes) -> bool:
    """Whether they are the same, in a time that tells nothing about either."""
    return hmac.compare_digest(*(hashlib.sha256(text).digest() for text in (given, key)))


def _long_enough(key: bytes, where: str) -> bytes:
    if len(key) < SHORTEST:
        raise PolicyError(
            f"{where}: holds {len(key)} bytes, expected a key of {SHORTEST} or more, "
            "as `openssl rand -hex 16` makes one"
        )
    return key
