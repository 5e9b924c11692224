"""A table survives the disk, or is refused with file, fault and remedy; never half of it."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import sere.table
from sere.checkpoint import Fingerprint
from sere.kernels import Plan, reroute
from sere.policy import Policy, PolicyError
from sere.table import LayerStatistics, Table, TableError

E = 8


def parts(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A saved table's tensors and its document, to be spoilt."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return load_file(path), json.loads(file.metadata()["sere"])


def rewrite(path: Path, tensors: dict[str, torch.Tensor], document: Any) -> None:
    save_file(tensors, path, metadata={"sere": json.dumps(document)})


def test_save_and_load_keep_every_field(tmp_path: Path, make_table: Callable[..., Table]) -> None:
    table = make_table(layers=(1, 3, 10), method="cosine")
    table.save(tmp_path / "t.safetensors")
    loaded = Table.load(tmp_path / "t.safetensors")
    assert loaded.fingerprint == table.fingerprint
    assert (loaded.method, loaded.provenance) == (table.method, table.provenance)
    assert list(loaded.layers) == [1, 3, 10]
    for index, layer in table.layers.items():
        for name in ("similarity", "gram", "load"):
            assert torch.equal(getattr(loaded.layers[index], name), getattr(layer, name))
        assert loaded.layers[index].tokens == layer.tokens


def test_a_loss_counts_by_the_experts_own_energy_and_a_typical_ones() -> None:
    """Eight experts, sixteen tokens, each expert chosen by two; from the definition."""
    g = torch.Generator().manual_seed(0)
    outputs = torch.randn(E, 16, 6, generator=g).double() * (
        0.5 + torch.rand(E, 1, 1, generator=g).double()
    )
    chosen = [[u, u + E] for u in range(E)]

    def substitution(loud: float) -> Any:
        scaled = outputs * torch.tensor([loud] + [1.0] * (E - 1)).double()[:, None, None]
        own = torch.stack([scaled[:, tokens] for tokens in chosen])  # [u, expert, token, H]
        layer = LayerStatistics.without_text(torch.eye(E))
        layer = dataclasses.replace(
            layer,
            tokens=16,
            load=torch.full((E,), 1 / E),
            directed=torch.einsum("uth,uvth->uv", own[range(E), range(E)], own) / 2,
            directed_energy=own.square().sum((2, 3)) / 2,
        )
        return scaled, layer.substitution(scaled=True)

    scaled, found = substitution(1.0)
    energies = [scaled[u, chosen[u]].square().sum(1).mean().item() for u in range(E)]
    typical = math.prod(energies) ** (1 / E)
    for u, v in itertools.permutations(range(E), 2):
        mine, theirs = scaled[u, chosen[u]], scaled[v, chosen[u]]
        best = min(
            ((mine - a * theirs).square().sum(1).mean().item(), a)
            for a in torch.linspace(0, 3, 3001).tolist()
        )
        assert found.error[u, v].item() == pytest.approx(
            best[0] / math.sqrt(energies[u] * typical), rel=1e-4
        )
        assert found.scale[u, v].item() == pytest.approx(best[1], abs=2e-3)
    # A thousand times the output of one expert: it matters more, the others nearly as before.
    _, louder = substitution(1000.0)
    changed = louder.error / found.error
    assert (changed[0, 1:] > 100).all() and (changed[1:, 1:] > 0.4)[~torch.eye(E - 1).bool()].all()
    assert LayerStatistics.without_text(torch.eye(E)).substitution(scaled=True).error.max() == 0


@pytest.mark.parametrize("share", [0, 0.001, 0.2, 0.5, 0.999])
def test_a_truncated_file_is_refused(tmp_path: Path, table: Table, share: float) -> None:
    path = tmp_path / "t.safetensors"
    table.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(TableError, match=r"t\.safetensors: .*truncated.*sere calibrate"):
        Table.load(path)


def test_a_missing_file_and_a_foreign_one_are_refused(tmp_path: Path, table: Table) -> None:
    with pytest.raises(TableError, match=r"t\.safetensors: no such table; make one with"):
        Table.load(tmp_path / "t.safetensors")
    with pytest.raises(TableError, match="xx: no such table"):
        Table.load("x" * 5000)  # longer than any name may be
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(TableError, match="a folder, in which there is no table; make one with"):
        Table.load(tmp_path)
    for name in ("one", "two.table"):
        table.save(tmp_path / name)
    with pytest.raises(TableError, match=r"a folder: name a table in it \(one, two.table\)$"):
        Table.load(tmp_path)
    with pytest.raises(TableError, match=r"model\.safetensors: .*not a sere table"):
        Table.load(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda document: document.clear(),
        lambda document: document.pop("tokens"),
        lambda document: document.update(tokens=[]),
        lambda document: document.update(fingerprint=3),
        lambda document: document["fingerprint"].update(surprise=1),
    ],
)
def test_a_damaged_document_is_refused(
    tmp_path: Path, table: Table, spoil: Callable[[dict[str, Any]], Any]
) -> None:
    path = tmp_path / "t.safetensors"
    table.save(path)
    tensors, document = parts(path)
    spoil(document)
    rewrite(path, tensors, document)
    with pytest.raises(TableError, match=r"t\.safetensors: (not a complete sere table|tokens=)"):
        Table.load(path)


def test_another_format_and_a_missing_layer_are_named(tmp_path: Path, table: Table) -> None:
    path = tmp_path / "t.safetensors"
    table.save(path)
    tensors, document = parts(path)
    rewrite(path, tensors, {**document, "format": 99})
    with pytest.raises(TableError, match="format 99, this version reads 2"):
        Table.load(path)
    del tensors["layers.1.gram"]
    rewrite(path, tensors, document)
    with pytest.raises(TableError, match=r"layers\.1\.gram"):
        Table.load(path)


@pytest.mark.parametrize(
    ("name", "spoil", "complaint"),
    [
        ("similarity", lambda t: t.index_fill(0, torch.tensor([2]), torch.nan), "similarity.*NaN"),
        ("gram", lambda t: t * torch.inf, "gram holds NaN or infinity"),
        ("load", lambda t: t * torch.nan, "load holds NaN"),
        ("similarity", lambda t: t[:7, :7], r"similarity is \[7, 7\], expected \[8, 8\]"),
        ("load", lambda t: t[None], r"load is \[1, 8\], expected \[8\]"),
        ("similarity", lambda t: t - 1, r"spans \[-0\.\d+, 0\], not \[0, 1\]"),
        ("similarity", lambda t: t * 1.5, r"spans \[0\.\d+, 1\.5\], not \[0, 1\]"),
    ],
)
def test_values_that_would_re_route_wrongly_are_refused(
    tmp_path: Path, table: Table, name: str, spoil: Callable[[Any], Any], complaint: str
) -> None:
    path = tmp_path / "t.safetensors"
    table.save(path)
    tensors, document = parts(path)
    tensors[f"layers.1.{name}"] = spoil(tensors[f"layers.1.{name}"]).contiguous()
    rewrite(path, tensors, document)
    with pytest.raises(TableError, match=rf"t\.safetensors: layer 1: .*{complaint}"):
        Table.load(path)


def test_identity_everywhere_is_refused_in_one_layer_it_is_not(table: Table) -> None:
    identity = dataclasses.replace(table.layers[0], similarity=torch.eye(E))
    with pytest.raises(TableError, match=r"identity.*calibrate again"):
        dataclasses.replace(table, layers={0: identity, 1: identity})
    dataclasses.replace(table, layers={0: identity, 1: table.layers[1]})


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"architecture": "MixtralForCausalLM"}, "architecture: .*Qwen3Moe.*Mixtral"),
        ({"E": 16}, "experts per layer: the table has 8, the model has 16"),
        ({"K": 4}, "experts per token: the table has 2, the model has 4"),
        ({"layers": (0, 1, 2, 5)}, r"MoE layers of the model that the table lacks: \[2, 5\]"),
        ({"router_hash": "c" * 64}, "router weights: hash aaa.* in the table, ccc.* in the model"),
        ({"experts_hash": "d" * 64}, "expert weights: hash bbb.* in the table, ddd.*"),
    ],
)
def test_the_table_of_another_model_is_refused(
    table: Table, change: dict[str, Any], complaint: str
) -> None:
    table.check_against(table.fingerprint)
    other = dataclasses.replace(table.fingerprint, **change)
    with pytest.raises(TableError, match=f"another model:\n  {complaint}") as caught:
        table.check_against(other)
    assert str(caught.value).count("\n  ") == 1  # this difference and no other
    assert "run `sere calibrate`" in str(caught.value)


def test_weights_nobody_could_read_and_layers_of_another_rank_do_not_count(table: Table) -> None:
    table.check_against(Fingerprint("Qwen3MoeForCausalLM", E, 2, (1,)))


def test_a_layer_of_which_nothing_is_known_is_never_re_routed(table: Table) -> None:
    assert table.plan(0, Policy(S=1)).neighbours.min() >= 0
    blind = LayerStatistics.without_text(torch.eye(E))
    half = dataclasses.replace(table, layers={0: blind, 1: table.layers[1]})
    assert (half.plan(0, Policy(S=1)).neighbours == -1).all()


def test_a_table_made_without_text_re_routes(make_table: Callable[..., Table]) -> None:
    assert make_table(tokens=0).plan(0, Policy(S=1)).neighbours.min() >= 0


@pytest.mark.parametrize(
    ("policy", "moves"),
    [
        (Policy(S=1, min_active=1), True),
        (Policy(S=2), False),  # S = K
        (Policy(S=1, rho=0.95), False),  # above every similarity
        (Policy(S=1, rho=0.5, min_active=1), True),
        (Policy(S=1, tau=0.5, min_active=1), True),
        (Policy(S=1, min_active=E), False),
        (Policy(S=2, layers={1: {"S": 1, "min_active": 1}}), True),
        (Policy(S=1, rho=0.95, layers={1: {"rho": 0.5, "min_active": 1}}), True),
        (Policy(S=2, batches={8: {"S": 1}}), True),
        (Policy(S=1, batches={1: {"S": 2}}), False),
        (Policy(S=1, batches={1: None}), False),
    ],
    ids=str,
)
def test_whether_a_policy_can_move_anything_is_known_before_it_serves(
    policy: Policy, moves: bool, table: Table
) -> None:
    """As the operator shows on random batches of all sizes."""
    assert table.can_move(policy) is moves
    random, moved = torch.Generator().manual_seed(0), False
    for T in (1, 2, 3, 5, 8, 13):
        own = policy.at(T)
        for index in table.layers if own else ():
            ids = torch.stack([torch.randperm(E, generator=random)[:2] for _ in range(T)])
            weights = torch.rand(T, 2, generator=random)
            moved |= not torch.equal(reroute(ids, weights, table.plan(index, own))[0], ids)
    assert moved is moves


def test_a_policy_that_needs_outputs_is_refused_where_nothing_is_known_of_them(
    make_table: Callable[..., Table],
) -> None:
    for policy in (Policy(S=1, tau=0.1), Policy(S=1, layers={1: {"fill": "error"}})):
        make_table().check_policy(policy)
        with pytest.raises(PolicyError, match="made without text"):
            make_table(tokens=0).check_policy(policy)


def test_a_plan_follows_the_override_of_its_layer(table: Table) -> None:
    policy = Policy(S=1, layers={1: {"S": 2, "rho": 0.5}})
    assert table.plan(0, policy).settings.tolist()[0] == 1
    plan = table.plan(1, policy)
    assert plan.settings.tolist()[0] == 2
    for u, row in enumerate(plan.neighbours.tolist()):
        alike = {v for v in range(E) if v != u and table.layers[1].similarity[u, v] >= 0.5}
        assert {v for v in row if v >= 0} == alike
    with pytest.raises(PolicyError, match="S=3 exceeds"):
        table.plan(0, Policy(S=3))


def test_a_failed_save_keeps_the_old_table(
    tmp_path: Path, table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.safetensors"
    table.save(path)
    old = path.read_bytes()

    def full_disk(tensors: Any, filename: Path, metadata: Any) -> None:
        Path(filename).write_bytes(b"some of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sere.table, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        table.save(path)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]


def test_a_disk_that_really_refuses_is_an_os_error_that_names_the_file(
    tmp_path: Path, table: Table
) -> None:
    """With the process's file size limited, the write itself fails inside safetensors."""
    path = tmp_path / "t.safetensors"
    table.save(path)
    old = path.read_bytes()
    script = (
        "import resource, sys; from sere.table import Table\n"
        "table = Table.load(sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))\n"
        "try: table.save(sys.argv[1])\n"
        "except OSError as error: print('refused', error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True)
    assert f"File too large: '{path}'" in done.stdout, done.stderr
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]


def test_layers_and_fingerprint_must_agree(table: Table) -> None:
    layers: dict[int, LayerStatistics] = {0: table.layers[0]}
    with pytest.raises(TableError, match=r"layers \[0\] do not match"):
        dataclasses.replace(table, layers=layers)


def test_a_plan_is_made_on_one_thread(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server waits for those of all layers, and threads that spin made it wait long."""
    used: list[int] = []
    build = Plan.build

    def built(*args: Any, **kwargs: Any) -> Plan:
        used.append(torch.get_num_threads())
        return build(*args, **kwargs)

    monkeypatch.setattr(Plan, "build", built)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        table.plan(0, Policy(S=1))
        with pytest.raises(PolicyError):
            table.plan(0, Policy(S=99))
        assert torch.get_num_threads() == 2 and used == [1, 1]
    finally:
        torch.set_num_threads(threads)
