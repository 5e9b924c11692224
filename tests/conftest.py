"""What several test files share: a tiny random MoE checkpoint, its tokenizer and a valid table."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sere.checkpoint import Fingerprint
from sere.table import LayerStatistics, Table
from tests.servers import ADMIN_KEY, Server, openai_server

torch.set_num_threads(1)

E, K, HIDDEN, LAYERS = 8, 2, 32, 2


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For `pytest -n`: tests that share engines stay in one process, and the slow come first; so do
    files with engines and long files, as one process alone would end with what comes last."""
    engines = {item.path for item in items if item.get_closest_marker("engine")}
    sizes = {item.path: item.path.stat().st_size for item in items}

    def turn(item: pytest.Item) -> tuple[bool, bool, int]:
        if item.get_closest_marker("modes"):
            return False, False, 0
        return True, item.path not in engines, -sizes[item.path]

    items.sort(key=turn)
    for item in items:
        item.add_marker(pytest.mark.xdist_group(_group(item)))


def _group(item: pytest.Item) -> str:
    known: dict[str, Any] = item._fixtureinfo.name2fixturedefs  # type: ignore[attr-defined]
    if "server" in known:
        return "server"
    shares = any(found[-1].scope == "module" for found in known.values())
    return item.nodeid if item.get_closest_marker("modes") and not shares else str(item.path)


def enlarge_experts(model: nn.Module, factor: float = 30.0) -> None:
    """Make a random model's mixtures count: freshly initialised experts are too small to see."""
    for name, parameter in model.named_parameters():
        if "experts" in name:
            parameter.data.mul_(factor)


def save_tokenizer(folder: Path) -> None:
    """A character-level tokenizer with an end-of-text and a padding token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = ["<eos>", "<pad>", "\n", *map(chr, range(32, 127))]
    vocabulary = {token: i for i, token in enumerate(alphabet)}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    characters.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=characters, eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(folder)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-MoE checkpoint, E=8 and K=2, with a tokenizer. Do not write into it."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=98,
            hidden_size=HIDDEN,
            intermediate_size=32,
            moe_intermediate_size=16,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=4,  # the projections of keys and values then have E rows, as a router has
            num_experts=E,
            num_experts_per_tok=K,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            max_position_embeddings=128,
            eos_token_id=0,
            pad_token_id=1,
            bos_token_id=None,
        )
    ).float()
    enlarge_experts(model)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty texts of very different lengths, as JSON lines."""
    path = tmp_path_factory.mktemp("corpus") / "texts.jsonl"
    words = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "17", "times"]
    texts = [" ".join(words[i % 5 : i % 5 + 1 + i // 2]) for i in range(20)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="session")
def table_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of the bundled model."""
    from sere.calibration.calibrate import calibrate

    path = tmp_path_factory.mktemp("table") / "demo.safetensors"
    calibrate("demo", path, samples=64, progress=False)
    return path


@pytest.fixture(scope="session")
def mapped_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of the bundled model with linear maps beside it."""
    from sere.calibration.calibrate import calibrate

    path = tmp_path_factory.mktemp("mapped") / "demo.safetensors"
    calibrate("demo", path, samples=24, maps=4, progress=False)
    return path


@pytest.fixture
def make_table() -> Callable[..., Table]:
    """Builds a valid table; keyword arguments replace parts of it."""

    def make(
        *,
        layers: tuple[int, ...] = (0, 1),
        tokens: int = 400,
        method: str = "frobenius",
        **other: Any,
    ) -> Table:
        random = torch.Generator().manual_seed(0)
        statistics = {}
        for index in layers:
            similarity = 0.2 + 0.6 * torch.rand(E, E, generator=random)
            similarity = ((similarity + similarity.T) / 2).fill_diagonal_(1)
            known = LayerStatistics.without_text(similarity)
            gram = torch.randn(E, E, generator=random)
            load = torch.full((E,), 1 / E)
            statistics[index] = replace(known, gram=gram @ gram.T, load=load, tokens=tokens)
        fields = {"E": E, "K": K, "router_hash": "a" * 64, "experts_hash": "b" * 64, **other}
        fingerprint = Fingerprint("Qwen3MoeForCausalLM", layers=layers, **fields)
        return Table(fingerprint, statistics, method, {"tokens": tokens, "seed": 0})

    return make


@pytest.fixture
def table(make_table: Callable[..., Table]) -> Table:
    return make_table()


@pytest.fixture(scope="session")
def server(table_path: Path) -> Iterator[Server]:
    """One OpenAI server that re-routes and checks itself, shared by the tests of all files."""
    shadow = {"every": 2, "bound": 0.5}
    sere = {"table": str(table_path), "S": 3, "min_active": 1, "shadow": shadow}
    with openai_server(sere, SERE_ADMIN_KEY=ADMIN_KEY) as running:
        yield running


@pytest.fixture
def layers_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Decoder layers that were read, in turn; no other has weights meanwhile."""
    read: list[str] = []
    from sere.models.skeleton import Skeleton

    filled = Skeleton.filled

    @contextmanager
    def noted(self: Skeleton, unit: str) -> Iterator[None]:
        read.append(unit)
        with filled(self, unit):
            held = [
                name
                for name, module in self.units.items()
                if any(weight.device.type != "meta" for weight in module.parameters())
            ]
            assert held == [unit]
            yield

    monkeypatch.setattr(Skeleton, "filled", noted)
    return read
