"""`sere demo`: the whole story on a laptop, in two halves.

Quality: the bundled model is calibrated, tuned and decoded by the real vLLM engine, under the
policy that we recommend and under the paper's. Speed: where memory is the limit, which that model
is too small for, so that a layer of a published model's shape is served. One table, one picture.
"""

from __future__ import annotations

from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from sere import demo_model
from sere.calibration.calibrate import calibrate
from sere.calibration.inspect import serve_line
from sere.demo import answers, speed, story
from sere.policy import Policy
from sere.results import pictures, provenance
from sere.table import Table
from sere.tuning import tune

BUDGET = "kl=0.01"
# What tuning is told of the experts' size: a large model's, as nothing is worth it on tiny ones.
_EXPERT_BYTES = 9.4e6
_TEXTS, _MOST_TUNED = 400, 512


def run(
    output: str | Path,
    *,
    prompts: int = 640,
    batch: int = 32,
    method: str = "frobenius",
    seed: int = 0,
    shape: str = speed.SHAPE,
) -> None:
    """Prints one table; writes demo.json, demo.png and what they are made of into `output`.

    shape: what speed is measured on, as `sere bench` takes it.
    """
    if prompts < (least := 4 * batch):  # what tuning wants, and would refuse after calibration
        raise ValueError(
            f"--prompts {prompts}: at least {least} for batches of {batch} (--batch), two of them "
            "to search on and two to check"
        )
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("demo.json", "tuning.json", "speed.json"):
        pictures.check_result(folder / name)
    path = folder / "demo.safetensors"
    calibrate(demo_model.NAME, path, method=method, samples=_TEXTS, seed=seed)
    table = _tuned(path, folder / "tuning.json", prompts, batch, seed)
    measured = speed.measure(speed.command(shape, folder / "speed.json", path))
    arms = answers.decode(_policies(table), path, prompts=prompts, batch=batch, seed=seed)
    result: dict[str, Any] = {
        "provenance": provenance.provenance(),
        **answers.result(arms, table, batch),
        "budget": BUDGET,
        "speed": measured,
    }
    print(story.as_text(result))
    provenance.save_json(folder / "demo.json", result)
    story.plot(result, folder / "demo.png")
    print(f"\n{_written(path)}")


def _written(path: Path) -> str:
    """What is in the table's folder, what to do next, and last the picture."""
    names = ("tuning.json", "tuning.png", "speed.json", "speed.png", "demo.json")
    there = [name for name in names if (path.parent / name).exists()]
    serve = serve_line(demo_model.NAME, {"table": str(path)})
    return (
        f"next: sere doctor demo {path}; or serve it: {serve}\n"
        f"written: {path}, {', '.join(there)}; at a glance: {path.parent}/demo.png"
    )


def _tuned(path: Path, output: Path, prompts: int, batch: int, seed: int) -> Table:
    """The table with the policy that `sere tune` chose; batches shrink as answers end, and what is
    smaller than any size that was measured gets stock routing."""
    with redirect_stdout(StringIO()):  # it is in tuning.json
        tune.run(
            demo_model.NAME,
            str(path),
            budget=BUDGET,
            batches=sorted({2, max(2, batch // 4), batch}),
            output=str(output),
            samples=min(prompts, _MOST_TUNED),
            seed=seed + 1,  # other prompts than those that are then decoded
            per_layer=False,
            device={"expert_bytes": _EXPERT_BYTES},
        )
    return Table.load(path)


def _policies(table: Table) -> list[tuple[str, Policy | None]]:
    """Stock; the paper's rule with two S, and with a threshold that half of the experts do not
    reach with their nearest neighbour: rho on a scale that fits this table; what was tuned."""
    nearest = torch.cat(
        [
            layer.similarity.clone().fill_diagonal_(-1).max(1).values
            for layer in table.layers.values()
        ]
    )
    rho = round(nearest.median().item(), 2)
    arms: list[tuple[str, Policy | None]] = [("stock", None)]
    arms += [(f"S={S}", Policy(S=S)) for S in (2, 1)]
    arms.append((f"S=1 rho={rho}", Policy(S=1, rho=rho)))
    if table.policy is not None and not table.policy.is_stock:
        arms.append(("tuned", table.policy))
    return arms
