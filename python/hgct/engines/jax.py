"""JAX: CPU, and by PJRT plug-ins TPU, NVIDIA, AMD, Intel, Apple and others.

One program is compiled for each kind of layer and shape, not one for each layer. The closure of
`jax.vjp` is a pytree, so it leaves the forward program and enters the backward one.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .base import BLOCK, EMBEDDING, HEAD, Engine, EngineError, Layer, Stage


class Geometry(NamedTuple):
    """What a program is compiled for, besides the shapes of its arguments."""

    kind: str
    heads: int
    kv_heads: int
    head_dim: int
    eps: float


class JaxEngine(Engine):
    name = "jax"

    def __init__(self, device: str) -> None:
        super().__init__(device)
        jax.config.update("jax_default_matmul_precision", "highest")
        platform, _, index = device.partition(":")
        try:
            # Asked by name, a missing platform is an error; left open, it would silently be the CPU.
            self.place = jax.devices(platform)[int(index or 0)]
        except (RuntimeError, AssertionError, IndexError, ValueError) as error:
            raise EngineError(f"JAX cannot open device {device!r}: {error}") from error
        jax.config.update("jax_default_device", self.place)

    def facts(self) -> dict[str, Any]:
        memory = (self.place.memory_stats() or {}).get("bytes_limit")
        device = f"{self.place.platform}:{self.place.id}"
        return {"framework": "jax", "version": jax.__version__, "device": device, "memory_bytes": memory}

    def release(self, idle: bool) -> None:
        if idle:
            # Compiled programs take tens of megabytes; they come back from the cache on disk.
            jax.clear_caches()

    def zeros(self, shape: tuple[int, ...]) -> Array:
        return jnp.zeros(shape, jnp.float32)

    def put(self, stage: Stage, pieces: dict[str, list[tuple[int, np.ndarray]]]) -> None:
        for name, parts in pieces.items():
            old = stage.parameters[name]
            new = aligned(old.shape, np.dtype(np.float32))
            if sum(len(array) for _, array in parts) < len(new):
                new[...] = old
            for row, array in parts:
                new[row : row + len(array)] = array
            stage.parameters[name] = jax.device_put(new, self.place)

    def reset(self, stage: Stage) -> None:
        stage.gradients = {name: jnp.zeros_like(array) for name, array in stage.parameters.items()}

    def take(self, array: np.ndarray) -> Array:
        copy = aligned(array.shape, array.dtype)
        copy[...] = array
        return jax.device_put(copy, self.place)

    def host(self, tensor: Array) -> np.ndarray:
        return np.asarray(tensor)

    def layer_forward(self, stage: Stage, layer: Layer, x: Array, labels: Array | None) -> tuple[Array, Any]:
        if stage.recompute:
            return self.layer_infer(stage, layer, x, labels), (x, labels)
        return forward(*self._call(stage, layer, x, labels))

    def layer_backward(self, stage: Stage, layer: Layer, residuals: Any, dy: Array | None) -> Array | None:
        dy = jnp.ones(1, jnp.float32) if dy is None else dy
        sums = tuple(stage.gradients[name] for name in layer.names)
        if stage.recompute:
            sums, dx = recomputed_backward(*self._call(stage, layer, *residuals), dy, sums)
        else:
            sums, dx = backward(residuals, dy, sums)
        stage.gradients.update(zip(layer.names, sums))
        if dx is None:
            jax.block_until_ready(sums)  # nothing else waits for a stage's last program
        return dx

    def layer_infer(self, stage: Stage, layer: Layer, x: Array, labels: Array | None) -> Array:
        return infer(*self._call(stage, layer, x, labels))

    def _call(self, stage: Stage, layer: Layer, x: Array, labels: Array | None) -> tuple[Any, ...]:
        """Arguments of a program: geometry, weights, what has no gradient, and what has one."""
        model, weights = stage.model, stage.weights(layer)
        geometry = Geometry(layer.kind, model.heads, model.kv_heads, model.head_dim, model.eps)
        if layer.kind == EMBEDDING:
            return geometry, weights, (x,), ()
        return geometry, weights, self._tables(stage, x.shape[1]) if layer.kind == BLOCK else (labels,), (x,)

    def _tables(self, stage: Stage, length: int) -> tuple[Array, ...]:
        if length not in stage.tables:
            stage.tables[length] = tuple(self.take(table[:, None, :]) for table in stage.model.rotation(length))
        return stage.tables[length]


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory that JAX takes over without another copy on the CPU; nobody else may write to it then."""
    size = int(np.prod(shape)) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    begin = -memory.__array_interface__["data"][0] % 64
    return memory[begin : begin + size].view(dtype).reshape(shape)


@partial(jax.jit, static_argnums=0)
def infer(geometry: Geometry, weights: tuple[Array, ...], fixed: tuple[Array, ...], x: tuple[Array, ...]) -> Array:
    return apply(geometry, fixed, weights, *x)


@partial(jax.jit, static_argnums=0)
def forward(geometry: Geometry, weights: Any, fixed: Any, x: Any) -> tuple[Array, Any]:
    return jax.vjp(partial(apply, geometry, fixed), weights, *x)


@partial(jax.jit, donate_argnums=2)
def backward(vjp: Any, dy: Array, sums: tuple[Array, ...]) -> tuple[tuple[Array, ...], Array | None]:
    gradients, *dx = vjp(dy)
    return jax.tree.map(jnp.add, sums, gradients), dx[0] if dx else None


@partial(jax.jit, static_argnums=0, donate_argnums=5)
def recomputed_backward(geometry: Geometry, weights: Any, fixed: Any, x: Any, dy: Array, sums: Any) -> tuple[Any, Any]:
    return backward(jax.vjp(partial(apply, geometry, fixed), weights, *x)[1], dy, sums)


def apply(geometry: Geometry, fixed: tuple[Any, ...], weights: tuple[Array, ...], *x: Array) -> Array:
    if geometry.kind == EMBEDDING:
        return weights[0][fixed[0]]
    return (head if geometry.kind == HEAD else block)(geometry, weights, *x, *fixed)


def block(g: Geometry, weights: tuple[Array, ...], x: Array, cos: Array, sin: Array) -> Array:
    """A decoder block: x [b, s, d], tables [s, 1, head_dim / 2]."""
    norm1, wq, wk, wv, wo, norm2, gate, up, down = weights
    b, s, _ = x.shape
    y = rms_norm(x, norm1, g.eps)
    q = rotate((y @ wq.T).reshape(b, s, g.heads, g.head_dim), cos, sin)
    k = rotate((y @ wk.T).reshape(b, s, g.kv_heads, g.head_dim), cos, sin)
    v = (y @ wv.T).reshape(b, s, g.kv_heads, g.head_dim)
    # The heads of a group lie one below the other: [b, kv_heads, group * s, head_dim].
    q = q.swapaxes(1, 2).reshape(b, g.kv_heads, -1, g.head_dim)
    a = attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2)).reshape(b, g.heads, s, g.head_dim)
    x = x + a.swapaxes(1, 2).reshape(b, s, -1) @ wo.T
    y = rms_norm(x, norm2, g.eps)
    return x + (jax.nn.silu(y @ gate.T) * (y @ up.T)) @ down.T


def attention(q: Array, k: Array, v: Array) -> Array:
    """Causal attention, divided by the softmax's sums at the end, where there is less to divide."""
    length = k.shape[2]
    causal = jnp.tile(jnp.tri(length, dtype=bool), (q.shape[2] // length, 1))
    scores = jnp.where(causal, (q * q.shape[-1] ** -0.5) @ k.swapaxes(-1, -2), -jnp.inf)
    e = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    return (e @ v) / e.sum(-1, keepdims=True)


def head(g: Geometry, weights: tuple[Array, ...], x: Array, labels: Array | None) -> Array:
    norm, weight = weights
    logits = rms_norm(x, norm, g.eps) @ weight.T
    if labels is None:
        return logits
    picked = jnp.take_along_axis(logits, labels[..., None], -1)[..., 0]
    return (jax.nn.logsumexp(logits, -1) - picked).sum().reshape(1)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps) * weight


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotary embedding of x [b, s, heads, head_dim]; the halves are the two coordinates."""
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate((a * cos - b * sin, b * cos + a * sin), -1)
