"""The peer: a GPT and its training loop in plain PyTorch, as one writes them in an afternoon.

The model is nanoGPT's (fused attention, LayerNorm, GELU, learned positions, tied head), the loop is
its loop on one device. Parameters have the names that dtt gives them, so that weights can be
exchanged and the work proved equal (tests/test_benchmarks.py).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from shapes import Shape
from torch import Tensor, nn


class LayerNorm(nn.Module):
    def __init__(self, dim: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.qkv = nn.Linear(shape.dim, 3 * shape.dim, bias=shape.bias)
        self.out = nn.Linear(shape.dim, shape.dim, bias=shape.bias)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, dim // self.heads).transpose(1, 2)
            for part in self.qkv(x).split(dim, dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).contiguous().view(batch, length, dim))


class MLP(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.up = nn.Linear(shape.dim, 4 * shape.dim, bias=shape.bias)
        self.down = nn.Linear(4 * shape.dim, shape.dim, bias=shape.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(shape.dim, shape.bias)
        self.attention = Attention(shape)
        self.mlp_norm = LayerNorm(shape.dim, shape.bias)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """tokens, targets [B, T] -> (logits [B, T, V], mean loss)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed = nn.Embedding(shape.vocab, shape.dim)
        self.position_embed = nn.Embedding(shape.context, shape.dim)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = LayerNorm(shape.dim, shape.bias)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                residual = name.endswith(("out.weight", "down.weight"))
                std = 0.02 * (2 * shape.layers) ** -0.5 if residual else 0.02
                nn.init.normal_(parameter, 0.0, std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.embed(tokens) + self.position_embed(places)
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.embed.weight)
        return logits, F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))


@dataclass(frozen=True)
class Setting:
    """How the loop computes; the first is PyTorch as it comes."""

    bf16: bool = False
    compiled: bool = False
    fused: bool = False


SETTINGS = {
    "fp32": Setting(),
    "fp32, fused AdamW": Setting(fused=True),
    "bf16": Setting(bf16=True),
    "bf16, fused AdamW": Setting(bf16=True, fused=True),
    "bf16, compiled": Setting(bf16=True, compiled=True),
    "bf16, compiled, fused AdamW": Setting(bf16=True, compiled=True, fused=True),
}


def nanogpt(folder: str, shape: Shape) -> nn.Module:
    """Return the model of nanoGPT's own model.py, which lies in `folder`."""
    spec = importlib.util.spec_from_file_location("nanogpt", Path(folder) / "model.py")
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.GPTConfig(
        block_size=shape.context,
        vocab_size=shape.vocab,
        n_layer=shape.layers,
        n_head=shape.heads,
        n_embd=shape.dim,
        dropout=0.0,
        bias=shape.bias,
    )
    model: nn.Module = module.GPT(config)
    return model


def decay_groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Return AdamW's parameter groups: decay on matrices only."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def random_windows(tokens: Any, shape: Shape, device: str) -> tuple[Tensor, Tensor]:
    """Return inputs and targets at random places of a memory-mapped array, as nanoGPT does."""
    starts = torch.randint(len(tokens) - shape.context, (shape.batch,)).tolist()
    length = shape.context
    rows = [tokens[i : i + length + 1].astype(np.int64) for i in starts]
    x = torch.stack([torch.from_numpy(row[:-1]) for row in rows])
    y = torch.stack([torch.from_numpy(row[1:]) for row in rows])
    if device.startswith("cuda"):
        x, y = x.pin_memory(), y.pin_memory()
    return x.to(device, non_blocking=True), y.to(device, non_blocking=True)


def training_step(
    model: nn.Module, shape: Shape, setting: Setting, tokens: Any, device: str = "cpu"
) -> Callable[[], Tensor]:
    """Return a function that does one step of the loop and returns its loss."""
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(
        decay_groups(model, 0.1), lr=1e-3, betas=(0.9, 0.95), fused=setting.fused or None
    )
    context = (
        torch.autocast(device.split(":")[0], torch.bfloat16) if setting.bf16 else nullcontext()
    )
    forward: Callable[..., Any] = torch.compile(model) if setting.compiled else model

    def step() -> Tensor:
        x, y = random_windows(tokens, shape, device)
        with context:
            _, loss = forward(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step
