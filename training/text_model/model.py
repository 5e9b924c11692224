"""The text model as it is trained, and as transformers' Qwen3MoeForCausalLM."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from experts import Experts, Head
from torch import Tensor, nn

V, H, L, E, K, I = 8192, 256, 6, 64, 8, 128  # noqa: E741
HEADS, WIDTH = 4, 64  # of attention


def _matrix(*shape: int, std: float = 0.02) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * std)


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, 1e-6)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x.bfloat16(), weight.bfloat16())


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        sizes = (H, H, WIDTH, WIDTH)
        self.n1, self.n2, self.qn, self.kn = (nn.Parameter(torch.ones(n)) for n in sizes)
        small = 0.02 / math.sqrt(2 * L)
        self.q, self.k, self.v = (_matrix(HEADS * WIDTH, H) for _ in range(3))
        self.o = _matrix(H, HEADS * WIDTH, std=small)
        self.router, self.w13 = _matrix(E, H), _matrix(E, 2 * I, H)
        self.w2 = _matrix(E, H, I, std=small)

    def attention(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        n, t, _ = x.shape
        y = _norm(x, self.n1)
        parts = (_linear(y, w).view(n, t, HEADS, WIDTH) for w in (self.q, self.k, self.v))
        q, k, v = (part.transpose(1, 2) for part in parts)
        q = _turned(_norm(q.float(), self.qn), cos, sin).bfloat16()
        k = _turned(_norm(k.float(), self.kn), cos, sin).bfloat16()
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return _linear(mixed.transpose(1, 2).reshape(n, t, -1), self.o).float()

    def experts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The mixture [n, t, H]; the loss of an uneven load; the load [E]."""
        y = _norm(x, self.n2).view(-1, H)
        scores = F.linear(y, self.router).softmax(-1)
        weights, ids = scores.topk(K, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        load = torch.bincount(ids.view(-1), minlength=E).float() / ids.numel()
        uneven = E * (load * scores.mean(0)).sum()
        return Experts.apply(y, self.w13, self.w2, ids, weights).view_as(x), uneven, load


class Model(nn.Module):
    """forward(ids [n, t], labels [n, t]): loss in nats, mean loss of uneven loads, loads."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = _matrix(V, H)
        self.nf = nn.Parameter(torch.ones(H))
        self.blocks = nn.ModuleList(Block() for _ in range(L))
        speeds = 10000.0 ** (-torch.arange(0, WIDTH, 2) / WIDTH)
        angles = torch.outer(torch.arange(2048.0), speeds)
        self.cos, self.sin = angles.cos(), angles.sin()

    def forward(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        x = F.embedding(ids, self.emb)
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        uneven, loads = torch.zeros(()), []
        for block in self.blocks:
            x = x + block.attention(x, cos, sin)
            mixture, more, load = block.experts(x)
            x, uneven = x + mixture, uneven + more
            loads.append(load)
        loss = Head.apply(_norm(x, self.nf).view(-1, H), self.emb, labels.reshape(-1))
        return loss, uneven / L, loads


def pairs(mine: Model, theirs: Any) -> list[tuple[Tensor, Tensor]]:
    """Each weight, and the one of transformers' model that is the same."""
    found = [(mine.emb, theirs.model.embed_tokens.weight), (mine.nf, theirs.model.norm.weight)]
    for block, layer in zip(mine.blocks, theirs.model.layers, strict=True):
        a, m = layer.self_attn, layer.mlp
        found += [
            (block.n1, layer.input_layernorm.weight),
            (block.n2, layer.post_attention_layernorm.weight),
            (block.qn, a.q_norm.weight),
            (block.kn, a.k_norm.weight),
            (block.q, a.q_proj.weight),
            (block.k, a.k_proj.weight),
            (block.v, a.v_proj.weight),
            (block.o, a.o_proj.weight),
            (block.router, m.gate.weight),
            (block.w13, m.experts.gate_up_proj),
            (block.w2, m.experts.down_proj),
        ]
    return found


def exported(mine: Model) -> Any:
    """transformers' model with these weights, float32."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    config = Qwen3MoeConfig(
        vocab_size=V,
        hidden_size=H,
        intermediate_size=512,
        moe_intermediate_size=I,
        num_hidden_layers=L,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=WIDTH,
        num_experts=E,
        num_experts_per_tok=K,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        output_router_logits=False,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    theirs = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for weight, other in pairs(mine, theirs):
            other.copy_(weight)
    theirs.tie_weights()
    return theirs


def loaded(folder: Path) -> Model:
    """The trainer's model from an exported one, to go on from."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    mine = Model()
    with torch.no_grad():
        for weight, other in pairs(mine, theirs):
            weight.copy_(other)
    return mine
