"""The plain loop in MLX: modules, `nn.value_and_grad` over all layers at once, `mlx.optimizers.AdamW`.

A micro-batch in flight is one whose output was evaluated and whose gradients were not: being lazy,
MLX keeps what they need of the forward.
"""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
from mlx.utils import tree_map

Array = mx.array


class Block(nn.Module):
    def __init__(self, c: dict) -> None:
        super().__init__()
        d, f, heads = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"]
        self.head_dim = d // heads
        kv = self.head_dim * c.get("num_key_value_heads", heads)
        self.norm1, self.norm2 = nn.RMSNorm(d, eps=1e-6), nn.RMSNorm(d, eps=1e-6)
        self.q, self.k, self.v, self.o = (nn.Linear(d, n, bias=False) for n in (d, kv, kv, d))
        self.gate, self.up, self.down = nn.Linear(d, f, bias=False), nn.Linear(d, f, bias=False), nn.Linear(f, d, bias=False)
        self.rope = nn.RoPE(self.head_dim)

    def __call__(self, x: Array) -> Array:
        b, s, d = x.shape
        y = self.norm1(x)
        q, k, v = (p(y).reshape(b, s, -1, self.head_dim).swapaxes(1, 2) for p in (self.q, self.k, self.v))
        q, k = self.rope(q), self.rope(k)
        a = mx.fast.scaled_dot_product_attention(q, k, v, scale=self.head_dim**-0.5, mask="causal")
        x = x + self.o(a.swapaxes(1, 2).reshape(b, s, d))
        y = self.norm2(x)
        return x + self.down(nn.silu(self.gate(y)) * self.up(y))


class Model(nn.Module):
    """Layers `part` of the model; gives the sum of the losses where the head is among them."""

    def __init__(self, c: dict, part: range) -> None:
        super().__init__()
        d, v, n = c["hidden_size"], c["vocab_size"], c["num_hidden_layers"]
        if 0 in part:
            self.embedding = nn.Embedding(v, d)
        self.blocks = [Block(c) for layer in part if 0 < layer <= n]
        if n + 1 in part:
            self.norm, self.head = nn.RMSNorm(d, eps=1e-6), nn.Linear(d, v, bias=False)

    def __call__(self, x: Array, labels: Array) -> Array:
        if "embedding" in self:
            x = self.embedding(x)
        for block in self.blocks:
            x = block(x)
        return nn.losses.cross_entropy(self.head(self.norm(x)), labels, reduction="sum") if "head" in self else x


class Loop:
    def __init__(self, config: dict, part: range, shape: tuple[int, int], in_flight: int) -> None:
        mx.random.seed(0)
        self.model = Model(config, part)
        self.model.apply(lambda p: 0.02 * mx.random.normal(p.shape) if p.ndim > 1 else p)
        self.optimizer = optimizers.AdamW(1e-3, betas=[0.9, 0.95], weight_decay=0.1)
        self.hidden = mx.random.normal((*shape, config["hidden_size"]))
        mx.eval(self.model.parameters(), self.hidden)
        self.sums = None

        def loss(model: Model, x: Array, labels: Array) -> Array:
            y = model(x, labels)
            return y if y.ndim == 0 else (y * self.hidden).sum()

        self.value_and_grad = nn.value_and_grad(self.model, loss)

    def forward(self, inputs: np.ndarray, labels: np.ndarray) -> dict:
        x = mx.array(inputs) if "embedding" in self.model else self.hidden
        loss, gradients = self.value_and_grad(self.model, x, mx.array(labels))
        mx.eval(loss)
        return gradients

    def backward(self, gradients: dict) -> None:
        if self.sums is not None:
            gradients = tree_map(mx.add, self.sums, gradients)
        self.sums = gradients
        mx.eval(self.sums)

    def update(self, num_tokens: int) -> None:
        gradients = tree_map(lambda g: g / num_tokens, self.sums)
        self.sums = None
        gradients, _ = optimizers.clip_grad_norm(gradients, 1.0)
        self.optimizer.update(self.model, gradients)
        mx.eval(self.model.parameters(), self.optimizer.state)
