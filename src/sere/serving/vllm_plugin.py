"""The plug-in's entry point: what being installed does to a process of vLLM, which is next to none.

vLLM runs `register` in every process, before it is known whether an engine asks for re-routing.
So it imports nothing of vLLM, and only listens where configs come by:

* where one is made;
* where executors and workers are given one, which in processes of their own was made elsewhere.

The first that has "sere" in `additional_config` puts in all else (`wiring`). In a process that
never meets one, every other object of vLLM stays as vLLM made it.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from sere.serving import random_weights
from sere.serving.asking import given, misspelt, unread
from sere.serving.symbols import loaded, module_of, symbol, wrap

_LOG = logging.getLogger("vllm.sere")  # below vLLM's own, so that its handlers show it


def register() -> None:
    """Entry point of `vllm.general_plugins`; safe to call again."""
    wrap(symbol("VllmConfig"), "__post_init__", _making)
    wrap(module_of("load_general_plugins"), "load_general_plugins", _loading_again)
    _listen_to_receivers()


def _listen_to_receivers() -> None:
    """Those that vLLM has loaded by now: before it makes one it loads plug-ins, maybe again."""
    for receiver in map(symbol, filter(loaded, ("Executor", "WorkerBase"))):
        wrap(receiver, "__init__", _receiving)


def _loading_again(original: Callable[[], None]) -> Callable[[], None]:
    def load_general_plugins() -> None:
        original()
        _listen_to_receivers()

    return load_general_plugins


def _making(original: Callable[..., None]) -> Callable[..., None]:
    def __post_init__(config: Any, *args: Any, **kwargs: Any) -> None:
        original(config, *args, **kwargs)
        if reason := unread(config.additional_config):
            from sere.serving.refusal import ServingError, say_plainly

            say_plainly()
            raise ServingError(reason)
        if key := misspelt(config.additional_config):
            _say_misspelt(key)
        _know_load_format(config)
        model = config.model_config
        if given(config) is None or model is None or model.is_submodel_config:
            return
        from sere.serving import wiring

        wiring.admit(config)
        _listen_to_receivers()

    return __post_init__


def _receiving(original: Callable[..., None]) -> Callable[..., None]:
    def __init__(receiver: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        _know_load_format(vllm_config)
        begin = original
        if given(vllm_config) is not None:
            from sere.serving import wiring
            from sere.serving.refusal import leaving_word

            begin = leaving_word(original)
            wiring.install()
            if loaded("WorkerBase") and isinstance(receiver, symbol("WorkerBase")):
                wiring.install_in_worker(type(receiver), vllm_config)
        begin(receiver, vllm_config, *args, **kwargs)

    return __init__


def _know_load_format(config: Any) -> None:
    """Engines with random weights ask for them whether they re-route or not."""
    if config.load_config.load_format == random_weights.LOAD_FORMAT:
        random_weights.register()


@functools.cache
def _say_misspelt(key: str) -> None:
    _LOG.warning(
        'sere: NOTHING IS RE-ROUTED: additional_config has %r and no "sere"; if that was meant, '
        'write {"sere": {"table": ...}}',
        key,
    )
