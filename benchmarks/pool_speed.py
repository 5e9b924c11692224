"""What a pool of experts brings, predicted: decode speed of the Qwen3-30B-A3B shape over stock.

    python benchmarks/pool_speed.py -o out/pool_speed.json

By the constants that `bench_h100_qwen3.json` gives; first choices fall on all experts alike, so
that n draws of one of E experts name E (1 - (1 - 1/E)^n). `python benchmarks/gpu.py` measures it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sere.files import check_writable
from sere.models.moe import moe_layers
from sere.results import provenance
from sere.speed.shapes import shape_named
from sere.step_cost.cost import from_bench

MEASURED = Path(__file__).parent / "results/bench_h100_qwen3.json"
BATCHES, POOLS = (32, 64, 128, 256), (0.5, 0.375)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", required=True)
    output = parser.parse_args().output
    check_writable(output, kind="result")
    shape = shape_named("qwen3-30b-a3b")
    assert shape is not None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape.config))
    layers, K = moe_layers(model), shape.config["num_experts_per_tok"]
    cost, E = from_bench(MEASURED, layers, K), layers[0].E

    def named(pool: int, S: int, rows: int) -> float:
        return pool + (E - pool) * (1 - (1 - S / E) ** rows)

    rows = []
    for batch in BATCHES:
        stock = cost.seconds(named(0, K, batch), batch, len(layers), routed=False)
        for share in POOLS:
            for S in (0, 1):
                active = named(round(share * E), S, batch)
                faster = stock / cost.seconds(active, batch, len(layers))
                policy = {"S": S, "pool": share}
                found = {"active": round(active, 1), "predicted_speedup": round(faster, 2)}
                rows.append({"batch": batch, "policy": policy, **found})
    result = {"provenance": provenance.provenance(), "cost": cost.source, "rows": rows}
    provenance.save_json(output, result)
    head = ["batch", "policy", "active", "predicted"]
    cells = [[str(v) for v in row.values()] for row in rows]
    print(provenance.text_table(head, cells))


if __name__ == "__main__":
    main()
