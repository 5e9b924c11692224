"""Train the demo model: a small Qwen3-MoE that solves the tasks of ``sere.demo_model.tasks``.

    torchrun --nproc-per-node 2 training/train_demo_model.py --out build/demo_model

One process a core is faster than one process with threads: they wait for each other once a step.
Data, initial weights and order follow from ``--seed`` and the step number alone, so a killed run
goes on with ``--resume`` as if nothing had happened, on as few or as many ``--steps`` as you like.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from demo_tokenizer import build_tokenizer
from experts_kernel import register_sorted_experts
from packing import Batch, packed_batch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeForCausalLM,
    load_balancing_loss_func,
)

from sere.demo_model.tasks import FAMILIES

MAX_LENGTH = 512
PROTOTYPES = 8
SIBLING_SIMILARITY = 0.6
WARMUP_STEPS = 300
DECAY_FRACTION = 0.3
LOG_EVERY = 200


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder for the trained model")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=32, help="rows in a batch")
    parser.add_argument("--row-length", type=int, default=128, help="tokens in a row")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--balance", type=float, default=1e-3, help="load-balancing loss's weight")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=500)
    parser.add_argument("--stop-at", type=int, help="stop early, to be resumed later")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args()


def build_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeConfig:
    """Qwen3-MoE's architecture, scaled down to some megabytes."""
    return Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=32,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        moe_intermediate_size=64,
        max_position_embeddings=MAX_LENGTH,
        initializer_range=0.06,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


@torch.no_grad()
def upcycle(model: Qwen3MoeForCausalLM) -> None:
    """Start experts as noisy copies of a few prototypes, in the manner of sparse upcycling.

    Experts of models made from a dense one stay related; independent ones would share nothing.
    """
    for layer in model.model.layers:
        for weight in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
            prototypes = weight[:PROTOTYPES].repeat(len(weight) // PROTOTYPES, 1, 1)
            noise = torch.randn_like(weight) * model.config.initializer_range
            weight.copy_(
                SIBLING_SIMILARITY**0.5 * prototypes + (1 - SIBLING_SIMILARITY) ** 0.5 * noise
            )


def speed_up(model: Qwen3MoeForCausalLM) -> None:
    """Compile the parts with fixed shapes; the experts have their own kernel."""
    for layer in model.model.layers:
        layer.self_attn.compile()
        layer.input_layernorm.compile()
        layer.post_attention_layernorm.compile()


def learning_rate_factor(step: int, steps: int) -> float:
    """Warm up, hold, then decay linearly to zero at ``steps``."""
    return min(1.0, (step + 1) / WARMUP_STEPS, (steps - step) / (DECAY_FRACTION * steps))


def losses(model: Qwen3MoeForCausalLM, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """The answers' loss, the load-balancing loss, and each example's number of wrong tokens.

    An example whose every answer token is the likeliest one is one that greedy decoding solves.
    Examples that found no room in the batch count -1.
    """
    output = model.model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=batch.attention_mask,
        output_router_logits=True,
        use_cache=False,
    )
    targets = batch.is_answer.flatten().nonzero().squeeze(1)
    logits = model.lm_head(output.last_hidden_state.flatten(0, 1)[targets - 1])
    wanted = batch.input_ids.flatten()[targets]
    loss = functional.cross_entropy(logits, wanted)
    config = model.config
    balance = load_balancing_loss_func(
        output.router_logits,
        config.num_experts,
        config.num_experts_per_tok,
        batch.example_ids >= 0,
    )
    wrong = (logits.argmax(-1) != wanted).long()
    answered = batch.example_ids.flatten()[targets]
    mistakes = torch.full_like(batch.families, -1)
    mistakes[answered] = 0
    mistakes.index_add_(0, answered, wrong)
    return loss, balance, mistakes


def share_gradients(model: Qwen3MoeForCausalLM) -> None:
    """Give every process the mean of all processes' gradients."""
    gradients = [parameter.grad for parameter in model.parameters()]
    vector = parameters_to_vector(gradients) / dist.get_world_size()
    dist.all_reduce(vector)
    vector_to_parameters(vector, gradients)


class Progress:
    """Running averages between two log lines."""

    def __init__(self) -> None:
        self.losses: list[tuple[float, float]] = []
        self.solved = torch.zeros(len(FAMILIES))
        self.seen = torch.zeros(len(FAMILIES))

    def add(self, loss: Tensor, balance: Tensor, mistakes: Tensor, families: Tensor) -> None:
        """Count one batch."""
        self.losses.append((loss.item(), balance.item()))
        self.solved.index_add_(0, families, (mistakes == 0).float())
        self.seen.index_add_(0, families, (mistakes >= 0).float())

    def __str__(self) -> str:
        loss, balance = torch.tensor(self.losses).mean(0).tolist()
        solved = (100 * self.solved / self.seen).tolist()
        shares = " ".join(
            f"{family}={share:.1f}" for family, share in zip(FAMILIES, solved, strict=True)
        )
        return f"loss {loss:.4f} balance {balance:.3f} solved% {shares}"


def export(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model in bfloat16, with a tokenizer and greedy decoding settings."""
    final = Qwen3MoeForCausalLM(model.config)
    final.load_state_dict(model.state_dict())
    final.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    final.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Train."""
    arguments = parse_arguments()
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": 29511}.items():
        os.environ.setdefault(name, str(value))
    os.environ.setdefault("MASTER_ADDR", "localhost")
    dist.init_process_group("gloo")
    torch.manual_seed(arguments.seed)
    tokenizer = build_tokenizer(MAX_LENGTH)
    model = Qwen3MoeForCausalLM(build_config(tokenizer))
    upcycle(model)
    model.set_experts_implementation(register_sorted_experts())
    if arguments.compile:
        speed_up(model)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        betas=(0.9, 0.98),
        weight_decay=arguments.weight_decay,
        fused=True,
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    checkpoint = arguments.out / "checkpoint.pt"
    start, seconds_before = 0, 0.0
    if arguments.resume:
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start, seconds_before = state["step"], state["seconds"]

    progress, began = Progress(), time.monotonic()
    stop = min(arguments.steps, arguments.stop_at or arguments.steps)
    for step in tqdm(
        range(start, stop), initial=start, total=stop, mininterval=10, disable=dist.get_rank() > 0
    ):
        for group in optimizer.param_groups:
            group["lr"] = arguments.lr * learning_rate_factor(step, arguments.steps)
        batch = packed_batch(
            tokenizer,
            arguments.batch,
            arguments.row_length,
            seed=arguments.seed * 10**9 + step,
        ).share(dist.get_rank(), dist.get_world_size())
        loss, balance, mistakes = losses(model, batch)
        (loss + arguments.balance * balance).backward()
        share_gradients(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

        if dist.get_rank() > 0:
            continue
        progress.add(loss.detach(), balance.detach(), mistakes, batch.families)
        done = step + 1
        if done % LOG_EVERY == 0 or done == stop:
            tqdm.write(f"step {done} {progress}")
            progress = Progress()
        if done % arguments.save_every == 0 or done == stop:
            seconds = seconds_before + time.monotonic() - began
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": done,
                "seconds": seconds,
            }
            torch.save(state, checkpoint.with_suffix(".partial"))
            checkpoint.with_suffix(".partial").replace(checkpoint)
            export(model, tokenizer, arguments.out)


if __name__ == "__main__":
    main()
