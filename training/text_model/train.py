"""Train the text model on CPU cores with bf16 matrix units.

    python training/text_model/train.py DATA OUT SECONDS [--resume | --start MODEL]

DATA: what `build_corpus.py` writes. Matrices learn by Muon, the rest by AdamW; the rate falls over
the last 30 % of the time. A state is written every quarter of an hour, and at the end the model as
transformers knows it, checked to have the same loss. `--start` goes on from an exported model.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from model import E, Model, V, exported, loaded
from tokenizers import Tokenizer
from torch import Tensor

B, T, ACCUMULATE = 16, 512, 2
SAVE_S, TELL_S = 900, 60


def muon(gradient: Tensor, steps: int = 5) -> Tensor:
    """The gradient with its singular values brought near 1 (Newton-Schulz)."""
    x = gradient.bfloat16()
    if wide := x.shape[-2] > x.shape[-1]:
        x = x.mT
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True).bfloat16() + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
    return (x.mT if wide else x).float()


@dataclass
class Training:
    model: Model
    ids: Tensor
    held: dict[str, Tensor]
    out: Path
    step: int = 0
    seen: int = 0
    log: list[list[float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        blocks = self.model.blocks
        self.matrices = [p for b in blocks for p in (b.q, b.k, b.v, b.o, b.w13, b.w2)]
        known = {id(p) for p in self.matrices}
        self.rest = [p for p in self.model.parameters() if id(p) not in known]
        groups = [
            {"params": [p for p in self.rest if p.ndim > 1], "weight_decay": 0.01},
            {"params": [p for p in self.rest if p.ndim == 1], "weight_decay": 0.0},
        ]
        self.adam = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), fused=True)
        self.momentum = [torch.zeros_like(p) for p in self.matrices]

    def run(self, limit: float) -> None:
        drawn = torch.Generator().manual_seed(1 + self.step)
        start = told = saved = time.time()
        while (used := time.time() - start) < limit:
            done = used / limit
            rate = min(1, (self.step + 1) / 60)
            rate *= 1 if done < 0.7 else max(0.02, (1 - done) / 0.3)
            loss, uneven, loads = self._learn(drawn, rate)
            if self.step <= 3 or time.time() - told > TELL_S:
                told = time.time()
                self.log.append([self.step, self.seen, round(loss, 4), round(uneven, 3), used])
                fullest = max(load.max().item() for load in loads) * E
                print(
                    f"step {self.step} loss {loss:.3f} fullest {fullest:.1f} {used:.0f} s",
                    flush=True,
                )
            if time.time() - saved > SAVE_S:
                saved = time.time()
                print("held out", self.judged(), flush=True)
                self.save()

    def _learn(self, drawn: torch.Generator, rate: float) -> tuple[float, float, list[Tensor]]:
        for _ in range(ACCUMULATE):
            at = torch.randint(len(self.ids) - T - 1, (B,), generator=drawn)
            rows = torch.stack([self.ids[i : i + T + 1] for i in at]).long()
            loss, uneven, loads = self.model(rows[:, :-1], rows[:, 1:])
            ((loss + 0.01 * uneven) / ACCUMULATE).backward()
            self.seen += B * T
        torch.nn.utils.clip_grad_norm_(self.rest, 1.0)
        for group in self.adam.param_groups:
            group["lr"] = 3e-3 * rate
        self.adam.step()
        with torch.no_grad():
            for p, b in zip(self.matrices, self.momentum, strict=True):
                b.lerp_(p.grad, 0.05)
                turn = muon(p.grad.lerp(b, 0.95))
                size = 0.2 * math.sqrt(max(p.shape[-2:]))
                p.mul_(1 - 0.05 * 4e-3 * rate).add_(turn, alpha=-4e-3 * rate * size)
        for p in self.model.parameters():
            p.grad = None
        self.step += 1
        return loss.item(), uneven.item(), loads

    @torch.no_grad()
    def judged(self) -> dict[str, float]:
        """Held-out loss in nats a token, by domain."""
        found = {}
        for kind, rows in self.held.items():
            losses = [self.model(row[None, :-1], row[None, 1:])[0].item() for row in rows]
            found[kind] = round(sum(losses) / len(losses), 4)
        return found

    def save(self) -> None:
        state = {"model": self.model.state_dict(), "opt": self.adam.state_dict()}
        state |= {"mom": self.momentum, "step": self.step, "log": self.log, "seen": self.seen}
        torch.save(state, self.out / "state.part")
        (self.out / "state.part").replace(self.out / "state.pt")

    def resume(self) -> None:
        state: dict[str, Any] = torch.load(self.out / "state.pt")
        self.model.load_state_dict(state["model"])
        self.adam.load_state_dict(state["opt"])
        self.momentum = state["mom"]
        self.step, self.log, self.seen = state["step"], state["log"], state["seen"]

    def export(self, tokenizer: Path) -> None:
        from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

        folder = self.out / "model"
        exported(self.model).to(torch.bfloat16).save_pretrained(folder)
        names = dict.fromkeys(("eos_token", "bos_token", "pad_token"), "<|end|>")
        PreTrainedTokenizerFast(tokenizer_file=str(tokenizer), **names).save_pretrained(folder)
        about = {"parameters": sum(p.numel() for p in self.model.parameters())}
        about |= {"tokens": self.seen, "steps": self.step, "held_out_loss": self.judged()}
        (folder / "training.json").write_text(json.dumps({**about, "log": self.log}, indent=1))
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        rows = self.held["prose"][:4]
        with torch.no_grad():
            logits = theirs(input_ids=rows[:, :-1]).logits.reshape(-1, V)
            loss = F.cross_entropy(logits, rows[:, 1:].reshape(-1)).item()
            mine = self.model(rows[:, :-1], rows[:, 1:])[0].item()
        print(f"loss in transformers {loss:.4f}, here {mine:.4f}")
        assert abs(loss - mine) < 0.02


def held_out(data: Path, tokenizer: Tokenizer) -> dict[str, Tensor]:
    """By domain, the first 32 held-out documents that are long enough: [32, T + 1]."""
    found = {}
    for kind in ("prose", "code"):
        lines = (data / f"held_{kind}.jsonl").read_text().splitlines()
        encoded = (tokenizer.encode(json.loads(line)["text"]).ids for line in lines)
        rows = [ids[: T + 1] for ids in encoded if len(ids) > T]
        found[kind] = torch.tensor(rows[:32])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--start", type=Path, metavar="MODEL")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    tokens = np.fromfile(arguments.data / "train.bin", dtype=np.uint16).astype(np.int32)
    held = held_out(arguments.data, Tokenizer.from_file(str(arguments.data / "tokenizer.json")))
    model = loaded(arguments.start) if arguments.start else Model()
    training = Training(model, torch.from_numpy(tokens), held, arguments.out)
    if arguments.resume:
        training.resume()
    training.run(arguments.seconds)
    print("held out at the end", training.judged(), flush=True)
    training.save()
    training.export(arguments.data / "tokenizer.json")


if __name__ == "__main__":
    main()
