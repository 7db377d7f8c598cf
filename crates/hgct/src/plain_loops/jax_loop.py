"""The plain loop in JAX: pure functions under `jit`; the wheel brings no optimizer, so AdamW is one too.

With one micro-batch in flight a program computes loss and gradients at once. With more, the closure
of `jax.vjp` leaves the forward program and enters the backward one.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def parameters(c: dict, part: range) -> dict:
    d, f, v, n = c["hidden_size"], c["intermediate_size"], c["vocab_size"], c["num_hidden_layers"]
    kv = d // c["num_attention_heads"] * c.get("num_key_value_heads", c["num_attention_heads"])
    keys = iter(jax.random.split(jax.random.key(0), 7 * n + 2))
    weight = lambda *shape: 0.02 * jax.random.normal(next(keys), shape)  # noqa: E731

    def block() -> dict:
        projections = {"q": (d, d), "k": (d, kv), "v": (d, kv), "o": (d, d), "gate": (d, f), "up": (d, f), "down": (f, d)}
        return {name: weight(*shape) for name, shape in projections.items()} | {"norm1": jnp.ones(d), "norm2": jnp.ones(d)}

    tree: dict[str, Any] = {"blocks": [block() for layer in part if 0 < layer <= n]}
    if 0 in part:
        tree["embedding"] = weight(v, d)
    if n + 1 in part:
        tree |= {"norm": jnp.ones(d), "head": weight(d, v)}
    return tree


def apply(heads: int, tree: dict, x: Array, labels: Array) -> Array:
    if "embedding" in tree:
        x = tree["embedding"][x]
    half = x.shape[-1] // heads // 2
    angles = jnp.outer(jnp.arange(x.shape[1]), 10000.0 ** (-jnp.arange(half) / half))
    for block in tree["blocks"]:
        x = apply_block(heads, block, x, jnp.cos(angles)[:, None, :], jnp.sin(angles)[:, None, :])
    if "head" not in tree:
        return x
    logits = rms_norm(x, tree["norm"]) @ tree["head"]
    picked = jnp.take_along_axis(logits, labels[..., None], -1)[..., 0]
    return (jax.nn.logsumexp(logits, -1) - picked).sum()


def apply_block(heads: int, p: dict, x: Array, cos: Array, sin: Array) -> Array:
    b, s, d = x.shape
    y = rms_norm(x, p["norm1"])
    q, k, v = ((y @ p[name]).reshape(b, s, -1, d // heads) for name in "qkv")
    a = jax.nn.dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
    x = x + a.reshape(b, s, d) @ p["o"]
    y = rms_norm(x, p["norm2"])
    return x + (jax.nn.silu(y @ p["gate"]) * (y @ p["up"])) @ p["down"]


def rms_norm(x: Array, weight: Array) -> Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * weight


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate((a * cos - b * sin, b * cos + a * sin), -1)


@partial(jax.jit, static_argnums=0)
def forward(heads: int, tree: dict, x: Array, labels: Array) -> tuple[Array, Any]:
    # Without a gradient of token ids.
    if "embedding" in tree:
        return jax.vjp(lambda tree: apply(heads, tree, x, labels), tree)
    return jax.vjp(lambda tree, x: apply(heads, tree, x, labels), tree, x)


@partial(jax.jit, donate_argnums=2)
def backward(vjp: Any, dy: Array, sums: dict) -> dict:
    return jax.tree.map(jnp.add, sums, vjp(dy)[0])


@partial(jax.jit, static_argnums=0, donate_argnums=5)
def at_once(heads: int, tree: dict, x: Array, labels: Array, dy: Array, sums: dict) -> dict:
    return backward(forward(heads, tree, x, labels)[1], dy, sums)


@partial(jax.jit, donate_argnums=(0, 1, 2, 3))
def adamw(tree: dict, m: dict, v: dict, sums: dict, number: Array, num_tokens: Array) -> tuple[dict, dict, dict, dict]:
    g = jax.tree.map(lambda g: g / num_tokens, sums)
    norm = jnp.sqrt(sum(jnp.sum(leaf * leaf) for leaf in jax.tree.leaves(g)))
    g = jax.tree.map(lambda g: g * jnp.minimum(1.0, 1.0 / norm), g)
    m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, g)
    v = jax.tree.map(lambda v, g: 0.95 * v + 0.05 * g * g, v, g)
    bias1, bias2 = 1 - 0.9**number, 1 - 0.95**number

    def step(p: Array, m: Array, v: Array) -> Array:
        decay = 0.1 if p.ndim > 1 else 0.0
        return p - 1e-3 * (m / bias1 / (jnp.sqrt(v / bias2) + 1e-8) + decay * p)

    return jax.tree.map(step, tree, m, v), m, v, jax.tree.map(jnp.zeros_like, g)


class Loop:
    def __init__(self, config: dict, part: range, shape: tuple[int, int], in_flight: int) -> None:
        jax.config.update("jax_default_matmul_precision", "highest")
        self.heads = config["num_attention_heads"]
        self.tree = parameters(config, part)
        self.m, self.v, self.sums = (jax.tree.map(jnp.zeros_like, self.tree) for _ in range(3))
        self.hidden = jax.random.normal(jax.random.key(1), (*shape, config["hidden_size"]))
        self.dy = jnp.ones(()) if "head" in self.tree else self.hidden
        self.number, self.in_flight = 0, in_flight

    def forward(self, inputs: np.ndarray, labels: np.ndarray) -> Any:
        x = jnp.asarray(inputs, jnp.int32) if "embedding" in self.tree else self.hidden
        labels = jnp.asarray(labels, jnp.int32)
        if self.in_flight == 1:
            return x, labels
        y, vjp = forward(self.heads, self.tree, x, labels)
        y.block_until_ready()
        return vjp

    def backward(self, live: Any) -> None:
        if self.in_flight == 1:
            self.sums = at_once(self.heads, self.tree, *live, self.dy, self.sums)
        else:
            self.sums = backward(live, self.dy, self.sums)
        jax.block_until_ready(self.sums)

    def update(self, num_tokens: int) -> None:
        self.number += 1
        state = adamw(self.tree, self.m, self.v, self.sums, float(self.number), float(num_tokens))
        self.tree, self.m, self.v, self.sums = jax.block_until_ready(state)
