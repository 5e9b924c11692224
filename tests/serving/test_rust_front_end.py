"""Behind vLLM's front end in Rust: what is missing is said, what was asked for and is not there is
refused. That requests are checked there is seen in `test_tiers.py` (made elsewhere)."""

from __future__ import annotations

import inspect
from argparse import Namespace
from typing import Any

import pytest

from sere.serving.admin_key import VARIABLE
from sere.serving.rust_front_end import starting
from sere.serving.session import ServingError
from tests.servers import ADMIN_KEY

STARTED: list[Any] = []


def start(additional: Any) -> None:
    """As vLLM starts it, with an original that only takes note."""
    from vllm.v1.utils import RustFrontendProcessManager

    def original(manager: Any, *args: Any, **kwargs: Any) -> None:
        signature = inspect.signature(RustFrontendProcessManager.__init__)
        STARTED.append(signature.bind(manager, *args, **kwargs).arguments["args"])

    args = Namespace(additional_config=additional)
    others = dict.fromkeys(
        ("input_listener", "output_listener", "engine_start_index", "engine_count"), 0
    )
    begin: Any = starting(original)
    begin(None, binary_path="vllm-rs", sock=None, args=args, data_parallel_size=1, **others)


def test_what_the_front_end_in_rust_lacks_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    STARTED.clear()
    start({})
    start({"other": 1})
    assert not [record for record in caplog.records if record.name == "vllm.sere"]
    start({"sere": {"S": 1}})
    (record,) = [record for record in caplog.records if record.name == "vllm.sere"]
    assert record.levelname == "WARNING"
    for part in ("/metrics has nothing of sere", "no switch", "without VLLM_USE_RUST_FRONTEND"):
        assert part in record.getMessage()
    assert len(STARTED) == 3


def test_a_switch_that_would_not_be_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    STARTED.clear()
    monkeypatch.setenv(VARIABLE, ADMIN_KEY)
    start({})
    with pytest.raises(ServingError, match="cannot be switched behind vLLM's front end in Rust"):
        start({"sere": {"S": 1}})
    assert len(STARTED) == 1
