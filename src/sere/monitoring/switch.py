"""An operator's hand on a running server: what routing is on, and another one from now on.

By the route `/sere/policy`, which a server has that was started with a key.
"""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sere.files import why

VARIABLE = "SERE_ADMIN_KEY"
_HELLO_S = 10
_PATIENCE_S = 200  # the server itself waits for its engines, three times at most

States = dict[str, dict[str, Any]]
"""By engine its "policy" (settings, or None for stock), whether anything is "enabled", why nothing
is re-routed ("inert"), and why the shadow check fell back to stock, if it did ("fallback")."""


class SwitchError(RuntimeError):
    """The server was not asked, or refused: says why."""


def states(url: str, key: str) -> States:
    """What is on."""
    return _ask(url, key)


def switch(url: str, key: str, policy: Mapping[str, Any] | str | None) -> States:
    """Route by another policy from now on: settings, "start" for what the server began with, None
    for stock routing. Returns what is on then."""
    return _ask(url, key, {"policy": policy})


def key_from(path: str | None, url: str) -> str:
    """The key in a file, or else in the environment. Raises `SwitchError` without one, where the
    server at `url` is up and could be switched."""
    try:
        key = Path(path).read_text() if path else os.environ.get(VARIABLE, "")
    except (OSError, ValueError) as error:
        raise SwitchError(f"{path}: no key can be read from it ({why(error)})") from error
    if not key.strip():
        _check_up(_address(url))
        raise SwitchError(
            f"no key: give the server's with --key-file FILE, or in {VARIABLE} (docs/serving.md)"
        )
    return key.strip()


class _Stay(urllib.request.HTTPRedirectHandler):
    """Nobody is followed to: the key would go there."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _address(url: str) -> str:
    base = url if "://" in url else f"http://{url}"
    return base.rstrip("/").removesuffix("/v1") + "/sere/policy"


def _check_up(address: str) -> None:
    """Raise `SwitchError` where no key would help: nobody answers, or nothing is there."""
    try:
        urllib.request.build_opener(_Stay).open(address, timeout=_HELLO_S).close()
    except urllib.error.HTTPError as error:
        if error.code == 404:
            raise SwitchError(_refusal(address, error)) from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise _unreached(address, error) from error


def _unreached(address: str, error: Exception) -> SwitchError:
    said = why(getattr(error, "reason", None) or error)
    return SwitchError(f"{address} cannot be reached ({said}): is the server up?")


def _ask(url: str, key: str, body: Mapping[str, Any] | None = None) -> States:
    address = _address(url)
    data = None if body is None else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    request = urllib.request.Request(address, data, headers)
    try:
        with urllib.request.build_opener(_Stay).open(request, timeout=_PATIENCE_S) as response:
            answer = json.load(response)
        return dict(answer["engines"])
    except urllib.error.HTTPError as error:
        raise SwitchError(_refusal(address, error)) from error
    except (OSError, http.client.HTTPException) as error:
        raise _unreached(address, error) from error
    except (ValueError, KeyError, TypeError) as error:
        raise SwitchError(f"{address} gives no answer of sere's: is that vLLM's server?") from error


def _refusal(address: str, error: urllib.error.HTTPError) -> str:
    if error.code == 404:
        return (
            f"{address} is not there: the server can be switched only if it was started with "
            f'{VARIABLE}, or "admin_key_file" behind "sere", and vLLM\'s front end in Python'
        )
    try:
        return f"{address} refuses: {json.load(error)['error']}"
    except (ValueError, KeyError, TypeError):
        return f"{address} answers HTTP {error.code} ({error.reason})"
