"""The key of vLLM's compile cache: what changes compiled code counts, and nothing else of sere."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

from sere.serving.vllm_plugin import register
from tests.engines import OPTIONS

pytestmark = pytest.mark.engine


def configure(additional: dict[str, Any]) -> Any:
    """What an engine with this `additional_config` starts with."""
    from vllm.engine.arg_utils import EngineArgs

    register()
    return EngineArgs(**OPTIONS, additional_config=additional).create_engine_config()


@pytest.fixture
def key(table_path: Path) -> Any:
    """The compile-cache key of an engine with these settings of sere's, and of others'."""

    def key_of(sere: dict[str, Any] | None = None, /, **others: Any) -> str:
        own = {} if sere is None else {"sere": {"table": str(table_path), **sere}}
        found: str = configure({**own, **others}).compute_hash()
        return found

    return key_of


def test_policies_tables_and_tiers_share_what_was_compiled(
    key: Any, table_path: Path, tmp_path: Path
) -> None:
    elsewhere = shutil.copy(table_path, tmp_path / "elsewhere.table")
    usual = key({"S": 1})
    assert key({"S": 2, "rho": 0.5, "batches": {"8": {"S": 1}}}) == usual
    assert key({"S": 1, "table": str(elsewhere), "fingerprint": "shape"}) == usual
    assert key({"S": 1, "default": "exact", "cap": "exact", "merge": True}) == usual


def test_what_changes_compiled_code_counts(key: Any) -> None:
    keys = [key(), key({}), key({"shadow": {"every": 9}})]
    assert len(set(keys)) == len(keys)


def test_what_others_keep_there_counts(key: Any, table_path: Path) -> None:
    assert len({key({}), key({}, other=1), key({}, other=2), key(other=1), key()}) == 5
    config = configure({"sere": {"table": str(table_path)}})
    before = config.compute_hash()
    config.additional_config["gdn_prefill_backend"] = "triton"  # as vLLM itself does
    assert config.compute_hash() != before


def test_the_settings_stay_what_the_user_wrote(table_path: Path) -> None:
    """For workers, which get them pickled, for logs, and for whoever reads their own keys there."""
    written = {"sere": {"table": str(table_path), "S": 1}, "other": {"a": 1}}
    config = configure(copy.deepcopy(written))
    config.compute_hash()
    sent = pickle.loads(pickle.dumps(config))
    for holds in (config, sent, copy.copy(config)):
        assert type(holds.additional_config) is dict
        assert json.loads(json.dumps(holds.additional_config)) == written
    assert sent.compute_hash() == config.compute_hash()
