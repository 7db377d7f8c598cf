"""The plain loop in PyTorch: modules, autograd over all layers at once, `torch.optim.AdamW`."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, c: dict) -> None:
        super().__init__()
        d, f, heads = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"]
        kv = d // heads * c.get("num_key_value_heads", heads)
        self.heads, self.head_dim = heads, d // heads
        self.norm1, self.norm2 = nn.RMSNorm(d, eps=1e-6), nn.RMSNorm(d, eps=1e-6)
        self.q, self.k, self.v, self.o = (nn.Linear(d, n, bias=False) for n in (d, kv, kv, d))
        self.gate, self.up = nn.Linear(d, f, bias=False), nn.Linear(d, f, bias=False)
        self.down = nn.Linear(f, d, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, s, d = x.shape
        y = self.norm1(x)
        q, k, v = (p(y).view(b, s, -1, self.head_dim).transpose(1, 2) for p in (self.q, self.k, self.v))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] != q.shape[1])
        x = x + self.o(a.transpose(1, 2).reshape(b, s, d))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Model(nn.Module):
    """Layers `part` of the model; gives the sum of the losses where the head is among them."""

    def __init__(self, c: dict, part: range) -> None:
        super().__init__()
        d, v, n = c["hidden_size"], c["vocab_size"], c["num_hidden_layers"]
        self.embedding = nn.Embedding(v, d) if 0 in part else None
        self.blocks = nn.ModuleList(Block(c) for layer in part if 0 < layer <= n)
        self.norm, self.head = (nn.RMSNorm(d, eps=1e-6), nn.Linear(d, v, bias=False)) if n + 1 in part else (None, None)
        half = d // c["num_attention_heads"] // 2
        angles = torch.outer(torch.arange(c["max_position_embeddings"]), 10000.0 ** (-torch.arange(half) / half))
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        cos, sin = self.cos[: x.shape[1]], self.sin[: x.shape[1]]
        if self.embedding is not None:
            x = self.embedding(x)
        for block in self.blocks:
            x = block(x, cos, sin)
        if self.head is None:
            return x
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), labels.flatten(), reduction="sum")


class Loop:
    def __init__(self, config: dict, part: range, shape: tuple[int, int], in_flight: int) -> None:
        torch.manual_seed(0)
        self.model = Model(config, part)
        for parameter in self.model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
        self.hidden = torch.randn(*shape, config["hidden_size"])

    def forward(self, inputs: np.ndarray, labels: np.ndarray) -> Tensor:
        whole = self.model.embedding is not None
        x = torch.from_numpy(inputs) if whole else self.hidden.clone().requires_grad_()
        return self.model(x, torch.from_numpy(labels))

    def backward(self, output: Tensor) -> None:
        output.backward(self.hidden if output.dim() else None)

    def update(self, num_tokens: int) -> None:
        for parameter in self.model.parameters():
            parameter.grad.div_(num_tokens)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
