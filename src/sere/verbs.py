"""The verbs: what the command line calls. Each turns flags into calls and results into text."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from json import dumps
from typing import Any


def calibrate(
    output: str, engine: str | None, engine_arguments: Sequence[str], **flags: Any
) -> None:
    """`sere calibrate MODEL --data FILE -o TABLE [--engine vllm [-- ENGINE ARGUMENTS]]`."""
    from sere.calibration.calibrate import calibrate as run
    from sere.similarity.enough import first_with_too_little

    model = flags.pop("model")
    if engine:
        from sere.engine_runs.calibration import calibrate as run_engine

        table = run_engine(model, output, engine_arguments, **flags)
    elif engine_arguments:
        raise ValueError(f"{' '.join(engine_arguments)}: engine arguments go with --engine vllm")
    else:
        table = run(output=output, model_name=model, **flags)
    print(
        f"{output}: {len(table.layers)} layers, E={table.fingerprint.E}, "
        f"K={table.fingerprint.K}, {table.provenance['tokens']} tokens, {table.method}"
    )
    if reason := first_with_too_little(table.layers):
        print(reason, file=sys.stderr)


def inspect(
    table: str, rho: float | None, plot: str | None, compare: str | None, json: bool
) -> None:
    """`sere inspect TABLE [--plot PNG] [--compare TABLE] [--json]`."""
    from sere.calibration import inspect as inspection
    from sere.files import check_writable
    from sere.table import Table

    if plot:
        check_writable(plot, table, compare, kind="picture")
    loaded = Table.load(table)
    if compare:
        from sere.calibration import compare as comparison

        other = Table.load(compare)
        found = comparison.compare(loaded, other)
        differences = loaded.fingerprint.differences(other.fingerprint)
        if differences:
            what = ", ".join(difference.split(":")[0] for difference in differences)
            print(f"these are tables of two models, which differ in {what}", file=sys.stderr)
        pair = {"tables": [table, compare], "differences": differences}
        print(_json(pair, found) if json else comparison.as_text(found))
    else:
        if json:
            known = {"table": table, **inspection.about(loaded)}
            print(_json(known, inspection.report(loaded, rho)))
        else:
            print(inspection.as_text(loaded, rho))
            model = str(loaded.provenance.get("model", "MODEL"))
            own = {"table": str(table), **inspection.advised(loaded)}
            print(f"\n{inspection.serve_line(model, own)}")
            if loaded.policy is None:
                print("(a guess that is cautious; `sere tune` stores a policy within a budget)")
    if plot:
        inspection.plot(loaded, plot)
        print(f"written: {plot}", file=sys.stderr)


def _json(about: Mapping[str, Any], layers: Sequence[Any]) -> str:
    return dumps({**about, "layers": [asdict(layer) for layer in layers]})


def demo(output: str, **flags: Any) -> None:
    """`sere demo`: the main job, end to end."""
    from sere.demo.run import run

    run(output, **flags)


_POLICIES = ('{"S": 2}', '{"S": 1}', '{"S": 2, "tau": 0.02}', '{"S": 1, "tau": 0.1}')


def _policies_for(table: str) -> list[str]:
    """The default: without tau where a table was made without text and knows no losses."""
    from sere.table import Table

    knows = all(layer.tokens for layer in Table.load(table).layers.values())
    return [policy for policy in _POLICIES if knows or "tau" not in policy]


# Which flags each way of evaluating reads, of those that not all of them read.
_READ = {
    "sere evaluate": ("data", "samples", "prompt", "length", "stream"),
    "--engine": ("data", "samples", "length", "dtype"),
    "--tasks": (
        "task_folder",
        "backend",
        "limit",
        "fewshot",
        "chat",
        "allow_unsafe_code",
        "score_as_decode",
        "dtype",
    ),
}


def evaluate(
    policies: list[str] | None,
    batches: list[int] | None,
    model: str,
    table: str,
    output: str,
    seed: int,
    engine: bool,
    tasks: str | None,
    **flags: Any,
) -> None:
    """`sere evaluate MODEL TABLE --policy JSON ... --batch B ... [--engine | --tasks NAME,...]`."""
    if tasks and engine:
        raise ValueError(
            "--tasks and --engine are two ways to evaluate: choose one (--tasks runs on vLLM's "
            "engine unless --backend says otherwise)"
        )
    way = "--tasks" if tasks else "--engine" if engine else "sere evaluate"
    given = _given(flags)
    _check_read(way, given)
    chosen = policies or _policies_for(table)
    if way == "sere evaluate":
        from sere.evaluation.evaluate import run

        sizes = batches or [1, 8, 32]
        _check_texts(model, given)
        run(model, table, output, policies=chosen, batches=sizes, seed=seed, **given)
        return
    if batches and len(batches) > 1:
        raise ValueError(
            f"{way} runs at one batch size: give --batch once, not {len(batches)} times"
        )
    common: dict[str, Any] = {
        "policies": chosen,
        "batch": (batches or [32])[0],
        "seed": seed,
    }
    if tasks:
        from sere.engine_runs import run as decoding

        decoding.run(model, table, output, tasks=tasks.split(","), **common, **given)
    else:
        from sere.engine_runs import generation

        if "length" in given:
            given["max_tokens"] = given.pop("length")
        generation.run(model, table, output, **common, **given)


def _given(flags: dict[str, Any]) -> dict[str, Any]:
    """Without what was left out, so that what is called fills it in."""
    return {name: value for name, value in flags.items() if value is not None}


def _check_read(way: str, given: dict[str, Any]) -> None:
    ignored = [name for name in given if name not in _READ[way]]
    if ignored:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in ignored)
        readers = [other for other in _READ if set(ignored) <= set(_READ[other])]
        hint = f"; {' and '.join(readers)} would" if readers else ""
        raise ValueError(f"{way} does not read {names}{hint}: leave out what is not meant")


def _check_texts(model: str, given: dict[str, Any]) -> None:
    """Raise `ValueError` for a length of texts where there are prompts with their answers."""
    from sere import demo_model
    from sere.text.corpus import read_pairs

    cut = [f"--{name}" for name in ("prompt", "length") if name in given]
    data = given.get("data")
    if cut and (read_pairs(data) if data else model == demo_model.NAME):
        raise ValueError(
            f"{' and '.join(cut)}: for texts alone; {data or model} has prompts with answers, "
            "which are read as they are: leave out what is not meant"
        )


def tune(
    batches: list[int] | None,
    model: str,
    table: str,
    bandwidth: float | None,
    tflops: float | None,
    expert_mb: float | None,
    route_us: float | None,
    **flags: Any,
) -> None:
    """`sere tune MODEL TABLE --budget kl=0.01 [--bench FILE]`."""
    from sere.tuning.tune import run

    machine = (
        ("bandwidth", bandwidth, 1e9),
        ("flops", tflops, 1e12),
        ("expert_bytes", expert_mb, 1e6),
        ("route", route_us, 1e-6),
    )
    device = {name: value * unit for name, value, unit in machine if value is not None}
    given = _given(flags)
    _check_texts(model, given)
    sizes = batches or [2, 8, 32]  # a row that is alone keeps its experts whatever is tuned
    run(model, table, batches=sizes, device=device, **given)


def report(folder: str, output: str) -> None:
    """`sere report DIR -o PAGE`."""
    from sere.page import render

    shown, unknown = render.write(folder, output)
    for reason, names in _by_reason(unknown).items():
        others = f" and {len(names) - 3} more" if len(names) > 3 else ""
        print(f"not shown: {', '.join(names[:3])}{others}: {reason}", file=sys.stderr)
    print(f"{output}: {', '.join(f'{one.name} ({one.kind})' for one in shown)}")


def _by_reason(unknown: dict[str, str]) -> dict[str, list[str]]:
    """A folder with code in it has dozens of files that are no results."""
    found: dict[str, list[str]] = {}
    for name, reason in unknown.items():
        found.setdefault(reason, []).append(name)
    return found


def bench(
    policies: list[str] | None,
    batches: list[int] | None,
    input_len: int,
    output_len: int,
    rounds: int,
    seed: int,
    rates: list[float] | None,
    **flags: Any,
) -> None:
    """`sere bench MODEL|SHAPE [TABLE] --policy JSON ... --batch B ...`."""
    from sere.speed.bench import run
    from sere.speed.setup import Load

    load = Load(tuple(batches or (1, 8, 32)), input_len, output_len, rounds, seed)
    chosen = policies or ['{"S": 2}', '{"S": 1}']
    run(load=load, policies=chosen, rates=rates or (), **flags)


def top(url: str, interval: float, once: bool, json: bool) -> None:
    """`sere top URL [--once] [--json]`."""
    if json:
        from sere.monitoring.scrape import read, view

        print(dumps(asdict(view(read(url)))))
    else:
        from sere.monitoring import top as screen

        screen.show(url) if once else screen.follow(url, interval)


def switch(url: str, to: str | None, key_file: str | None, json: bool) -> None:
    """`sere switch URL [off|on|JSON] [--key-file FILE]`: what is on, and then is."""
    from sere.checks import nearest
    from sere.monitoring import switch as remote
    from sere.policy import settings_from_json

    named = {"off": None, "on": "start"}
    if to is not None and to not in named and to.isalpha():
        near = nearest(to, named)
        raise ValueError(
            f"{to}: expected off, on or a policy such as '{{\"S\": 2}}'"
            + (f"; did you mean {near}?" if near else "")
        )
    key = remote.key_from(key_file, url)
    if to is None:
        found = remote.states(url, key)
    else:
        found = remote.switch(url, key, named[to] if to in named else settings_from_json(to))
    if json:
        print(dumps(found))
    else:
        print("\n".join(f"engine {engine}: {_told(state)}" for engine, state in found.items()))


def _told(state: dict[str, Any]) -> str:
    from sere.checks import told

    policy = told(state["policy"] or {})
    words = dumps(policy) if policy else "stock"
    return words if state["enabled"] else f"{words}, NOTHING IS RE-ROUTED: {state.get('inert')}"


def doctor(
    model: str | None, table: str | None, bench: str | None, settings: str | None, json: bool
) -> int:
    """`sere doctor [MODEL] [TABLE]`, `sere doctor URL`: 0 if re-routing can take effect here (does
    so there), else 1."""
    from sere.doctor import as_text, examine

    checks = []
    for check in examine(model, table, bench, settings):
        checks.append(check)
        if not json:
            print(as_text(check), flush=True)
    if json:
        print(dumps([asdict(check) for check in checks]))
    return int(not all(check.passed for check in checks))
