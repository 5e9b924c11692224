"""Measure the demo model: exact match per family, and which experts each family uses.

    python training/evaluate_demo_model.py --count 3000 --json report.json

Answers are decoded greedily on held-out examples; nothing but the first line counts.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3MoeForCausalLM

from sere.demo_model.tasks import FAMILIES, Example, examples, is_correct

DEMO_MODEL = Path(__file__).parents[1] / "src" / "sere" / "demo_model"
LONGEST_ANSWER = 32
BATCH = 100


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("model", type=Path, nargs="?", default=DEMO_MODEL)
    parser.add_argument("--count", type=int, default=3000, help="examples over all families")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--json", type=Path, help="where to write the full report")
    return parser.parse_args()


@torch.inference_mode()
def complete(
    model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str]
) -> list[str]:
    """Decode greedily from left-padded prompts."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    output = model.generate(**inputs, max_new_tokens=LONGEST_ANSWER, do_sample=False)
    answers = output[:, inputs["input_ids"].shape[1] :]
    completions: list[str] = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return completions


def accuracy(
    model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, data: list[Example]
) -> dict[str, float]:
    """Exact match per family."""
    correct, seen = Counter[str](), Counter(example.family for example in data)
    # Similar lengths together: less padding, so less work.
    ordered = sorted(data, key=lambda example: len(example.prompt))
    for start in tqdm(range(0, len(ordered), BATCH), desc="decoding"):
        batch = ordered[start : start + BATCH]
        completions = complete(model, tokenizer, [example.prompt for example in batch])
        for example, completion in zip(batch, completions, strict=True):
            correct[example.family] += is_correct(example, completion)
    return {family: correct[family] / seen[family] for family in FAMILIES}


@torch.inference_mode()
def expert_load(
    model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, data: list[Example]
) -> Tensor:
    """Each expert's share of the routed tokens, by layer and family: [layer, family, expert]."""
    config = model.config
    load = torch.zeros(config.num_hidden_layers, len(FAMILIES), config.num_experts)
    for f, family in enumerate(FAMILIES):
        texts = [example.prompt + example.answer for example in data if example.family == family]
        inputs = tokenizer(texts, return_tensors="pt", padding=True)
        output = model(**inputs, output_router_logits=True, use_cache=False)
        real = inputs["attention_mask"].flatten().bool()
        for layer, logits in enumerate(output.router_logits):
            chosen = logits[real].topk(config.num_experts_per_tok).indices.flatten()
            load[layer, f] = torch.bincount(chosen, minlength=config.num_experts)
    return load / load.sum(-1, keepdim=True)


def mutual_information(load: Tensor) -> float:
    """Bits that a token's expert tells about its family, all families being equally likely."""
    surprise = load * (load / load.mean(0)).log2()
    return float(surprise.nan_to_num().sum(-1).mean())


def mean_distance(load: Tensor) -> float:
    """Mean total-variation distance between two families' expert loads."""
    pairs = list(combinations(load, 2))
    return float(sum((a - b).abs().sum() / 2 for a, b in pairs) / len(pairs))


@torch.inference_mode()
def similarities(model: Qwen3MoeForCausalLM) -> list[tuple[float, float]]:
    """Per layer, the mean cosine of an expert's weights to its nearest other and to all others."""
    result = []
    for layer in model.model.layers:
        experts = layer.mlp.experts
        weights = torch.cat([experts.gate_up_proj.flatten(1), experts.down_proj.flatten(1)], dim=1)
        unit = functional.normalize(weights.float(), dim=1)
        cosines = unit @ unit.T
        cosines.fill_diagonal_(-1)
        others = (cosines.sum() + len(unit)) / (len(unit) * (len(unit) - 1))
        result.append((float(cosines.amax(1).mean()), float(others)))
    return result


def print_report(shares: dict[str, float], load: Tensor, close: list[tuple[float, float]]) -> None:
    """Print the tables that the model card holds."""
    print("| family | exact match | busiest experts, by layer |\n| --- | --- | --- |")
    for f, (family, share) in enumerate(shares.items()):
        busiest = "; ".join(" ".join(map(str, layer[f].topk(4).indices.tolist())) for layer in load)
        print(f"| {family} | {100 * share:.1f} % | {busiest} |")
    print(f"| all | {100 * sum(shares.values()) / len(shares):.1f} % | |\n")
    print("| layer | information (bits) | distance | least, most load | nearest, mean cosine |")
    print("| --- | --- | --- | --- | --- |")
    for i, (layer, (nearest, mean)) in enumerate(zip(load, close, strict=True)):
        overall = 100 * layer.mean(0)
        print(
            f"| {i} | {mutual_information(layer):.2f} | {mean_distance(layer):.2f} "
            f"| {overall.min():.1f} %, {overall.max():.1f} % | {nearest:.2f}, {mean:.2f} |"
        )


def main() -> None:
    """Evaluate."""
    arguments = parse_arguments()
    model = Qwen3MoeForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    data = examples(arguments.count, seed=arguments.seed, split="held_out")
    began = time.monotonic()
    shares = accuracy(model, tokenizer, data)
    load = expert_load(model, tokenizer, data)
    close = similarities(model)
    print_report(shares, load, close)
    print(f"{len(data)} held-out examples, {time.monotonic() - began:.0f} s", file=sys.stderr)
    if arguments.json:
        report = {
            "examples": len(data),
            "seed": arguments.seed,
            "dtype": arguments.dtype,
            "parameters": sum(weight.numel() for weight in model.parameters()),
            "exact_match": shares,
            "mutual_information_bits": [mutual_information(layer) for layer in load],
            "mean_distance": [mean_distance(layer) for layer in load],
            "nearest_and_mean_cosine": close,
            "families": FAMILIES,
            "expert_load": load.tolist(),
        }
        arguments.json.write_text(json.dumps(report))


if __name__ == "__main__":
    main()
