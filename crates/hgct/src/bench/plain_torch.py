"""A plain PyTorch loop of the benchmark's model: what a torch worker under hgct is compared with.

    python plain_torch.py CONFIG TOKENS SEQ_LEN MICRO_BATCH NUM_MICRO_BATCHES

Reads a line a measurement from standard input, `WARM_UP STEPS`, and answers with the seconds of each
counted step. Stock modules and stock AdamW; autograd over the whole model at once.
"""

import json
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self, c: dict) -> None:
        super().__init__()
        d, f = c["hidden_size"], c["intermediate_size"]
        self.heads = c["num_attention_heads"]
        self.norm1, self.norm2 = nn.RMSNorm(d, eps=1e-6), nn.RMSNorm(d, eps=1e-6)
        self.q, self.k, self.v, self.o = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(d, f, bias=False), nn.Linear(d, f, bias=False)
        self.down = nn.Linear(f, d, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        b, s, d = x.shape
        y = self.norm1(x)
        q, k, v = (p(y).view(b, s, self.heads, -1).transpose(1, 2) for p in (self.q, self.k, self.v))
        a = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        x = x + self.o(a.transpose(1, 2).reshape(b, s, d))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Model(nn.Module):
    def __init__(self, c: dict) -> None:
        super().__init__()
        d, v = c["hidden_size"], c["vocab_size"]
        self.embedding = nn.Embedding(v, d)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c["num_hidden_layers"]))
        self.norm, self.head = nn.RMSNorm(d, eps=1e-6), nn.Linear(d, v, bias=False)
        half = d // c["num_attention_heads"] // 2
        angles = torch.outer(torch.arange(c["max_position_embeddings"]), 10000.0 ** (-torch.arange(half) / half))
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        cos, sin = self.cos[: x.shape[1]], self.sin[: x.shape[1]]
        h = self.embedding(x)
        for block in self.blocks:
            h = block(h, cos, sin)
        logits = self.head(self.norm(h))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def main() -> None:
    config_path, tokens_path, *numbers = sys.argv[1:]
    seq_len, micro_batch, num_micro_batches = map(int, numbers)
    torch.manual_seed(0)
    model = Model(json.load(open(config_path)))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    tokens = np.fromfile(tokens_path, np.uint16, offset=64).astype(np.int64)
    num_samples = (len(tokens) - 1) // seq_len
    cursor = 0
    print("ready", flush=True)
    for line in sys.stdin:
        warm_up, steps = map(int, line.split())
        seconds = []
        for step in range(warm_up + steps):
            begun = time.monotonic()
            for _ in range(num_micro_batches):
                rows = [(cursor + i) % num_samples * seq_len for i in range(micro_batch)]
                cursor += micro_batch
                x = torch.from_numpy(np.stack([tokens[r : r + seq_len] for r in rows]))
                y = torch.from_numpy(np.stack([tokens[r + 1 : r + seq_len + 1] for r in rows]))
                model(x, y).backward()
            count = micro_batch * num_micro_batches * seq_len
            for parameter in model.parameters():
                parameter.grad.div_(count)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step >= warm_up:
                seconds.append(time.monotonic() - begun)
        print(json.dumps(seconds), flush=True)


main()
