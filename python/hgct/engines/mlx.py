"""MLX: Apple's GPUs, CUDA, and the CPU (with OpenBLAS in front of the wheel's reference BLAS).

`mx.vjp` wants an output's gradient at once, so a backward walks through the forward again. A tape
keeps that walk from computing: it holds what the first one found, and MLX, being lazy, evaluates
only what gradients really need.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Callable

import mlx.core as mx
import numpy as np

from .base import BLOCK, EMBEDDING, Engine, EngineError, Layer, Model, Stage

Array = mx.array


class MlxEngine(Engine):
    name = "mlx"

    def __init__(self, device: str) -> None:
        super().__init__(device)
        platform, _, index = device.partition(":")
        kinds = {"cpu": mx.cpu, "gpu": mx.gpu}
        if platform not in kinds:
            raise EngineError(f"MLX has no device {device!r}; allowed: {', '.join(kinds)}")
        try:
            mx.set_default_device(mx.Device(kinds[platform], int(index or 0)))
            mx.eval(mx.zeros(1))
            if kinds[platform] == mx.cpu:
                # The process's heap keeps what is free as well, and for all sizes at once.
                mx.set_cache_limit(0)
        except (ValueError, RuntimeError) as error:
            raise EngineError(f"MLX cannot open device {device!r}: {error}") from error

    def facts(self) -> dict[str, Any]:
        return {"framework": "mlx", "version": mx.__version__, "device": str(mx.default_device())}

    def release(self, idle: bool) -> None:
        mx.clear_cache()

    def zeros(self, shape: tuple[int, ...]) -> Array:
        return mx.zeros(shape)

    def put(self, stage: Stage, pieces: dict[str, list[tuple[int, np.ndarray]]]) -> None:
        for name, parts in pieces.items():
            new = parts[0][1]
            if new.shape != stage.parameters[name].shape:
                new = np.array(stage.parameters[name])
                for row, array in parts:
                    new[row : row + len(array)] = array
            stage.parameters[name] = mx.array(new)

    def reset(self, stage: Stage) -> None:
        stage.gradients.clear()

    def take(self, array: np.ndarray) -> Array:
        return mx.array(array)

    def host(self, tensor: Array) -> np.ndarray:
        # Gradients of a product come out transposed; memory leaves in rows.
        tensor = mx.contiguous(tensor)
        mx.eval(tensor)
        return np.array(tensor, copy=False)

    def gradient(self, stage: Stage, name: str) -> np.ndarray:
        # In place of the one that may lie in columns, not beside it.
        stage.gradients[name] = mx.contiguous(stage.gradients[name])
        return self.host(stage.gradients[name])

    def layer_forward(self, stage: Stage, layer: Layer, x: Array, labels: Array | None) -> tuple[Array, Any]:
        tape = None if stage.recompute else Tape()
        y = self._layer(stage, layer, stage.weights(layer), x, labels, tape)
        mx.eval(y, tape.values if tape else [])
        return y, (x, labels, tape)

    def layer_backward(self, stage: Stage, layer: Layer, residuals: Any, dy: Array | None) -> Array | None:
        x, labels, tape = residuals
        weights = stage.weights(layer)
        if tape is None:
            tape = Tape()
            self._layer(stage, layer, weights, x, labels, tape)
        tape.play()
        if layer.kind == EMBEDDING:
            again = lambda *weights: self._layer(stage, layer, weights, x, labels, tape)  # noqa: E731
            inputs = list(weights)
        else:
            again = lambda *inputs: self._layer(stage, layer, inputs[:-1], inputs[-1], labels, tape)  # noqa: E731
            inputs = [*weights, x]
        _, gradients = mx.vjp(again, inputs, [mx.ones(1) if dy is None else dy])
        for name, gradient in zip(layer.names, gradients):
            old = stage.gradients.get(name)
            stage.gradients[name] = gradient if old is None else old + gradient
            del old
        dx = None if layer.kind == EMBEDDING else gradients[-1]
        mx.eval(dx, [stage.gradients[name] for name in layer.names])
        return dx

    def layer_infer(self, stage: Stage, layer: Layer, x: Array, labels: Array | None) -> Array:
        y = self._layer(stage, layer, stage.weights(layer), x, labels, None)
        mx.eval(y)
        return y

    def _layer(self, stage: Stage, layer: Layer, weights: Any, x: Array, labels: Any, tape: Tape | None) -> Array:
        if layer.kind == EMBEDDING:
            return weights[0][x]
        keep = tape or compute
        if layer.kind == BLOCK:
            return block(stage.model, keep, weights, x, *self._tables(stage, x.shape[1]))
        return head(stage.model, keep, weights, x, labels)

    def _tables(self, stage: Stage, length: int) -> tuple[Array, Array, Array]:
        """Cosines and sines [s, 1, head_dim / 2]; the causal mask, repeated for a group's heads."""
        if length not in stage.tables:
            cos, sin = (mx.array(table[:, None, :]) for table in stage.model.rotation(length))
            mask = np.triu(np.full((length, length), -np.inf, np.float32), 1)
            group = stage.model.heads // stage.model.kv_heads
            stage.tables[length] = cos, sin, mx.array(np.tile(mask, (group, 1)))
        return stage.tables[length]


def compute(function: Callable[..., Any], *inputs: Array, gradient: Any = None, needed: bool = True) -> Array:
    """A tape that keeps nothing."""
    return function(*inputs)[0] if gradient else function(*inputs)


class Tape:
    """Intermediate results of a layer: recorded in a first walk, given back in a second one.

    `tape(function, *inputs)` is `function(*inputs)`. With `gradient` the function gives its output
    and what else to keep; `gradient(inputs, dy, output, kept)` are then its gradients. An output that
    is not `needed` by any gradient is given back as a shape without values.
    """

    def __init__(self) -> None:
        self.values: list[tuple[Array, Any]] = []
        self.next: int | None = None

    def play(self) -> None:
        self.next = 0

    def __call__(
        self, function: Callable[..., Any], *inputs: Array, gradient: Any = None, needed: bool = True
    ) -> Array:
        if self.next is None:
            output, kept = function(*inputs) if gradient else (function(*inputs), None)
            # One zero, seen as an array of any size.
            self.values.append((output if needed else mx.broadcast_to(mx.zeros(1), output.shape), kept))
            return output
        output, kept = self.values[self.next]
        self.next += 1

        @mx.custom_function
        def known(*inputs: Array) -> Array:
            return output

        @known.vjp
        def _(inputs: Any, dy: Array, _: Array) -> Any:
            if gradient:
                return gradient(inputs, dy, output, kept)
            return mx.vjp(function, list(inputs), [dy])[1]

        return known(*inputs)


def block(
    model: Model, keep: Any, weights: Any, x: Array, cos: Array, sin: Array, mask: Array
) -> Array:
    """A decoder block: x [b, s, d]."""
    norm1, wq, wk, wv, wo, norm2, gate, up, down = weights
    b, s, d = x.shape
    x = x.reshape(-1, d)

    def heads(y: Array, weight: Array) -> Array:
        return (y @ weight.T).reshape(b, s, -1, model.head_dim)

    def query(y: Array, weight: Array) -> Array:
        """The heads of a group one below the other: [b, kv_heads, group * s, head_dim]."""
        q = rotate(heads(y, weight), cos, sin).swapaxes(1, 2)
        return q.reshape(b, model.kv_heads, -1, model.head_dim)

    def key(y: Array, weight: Array) -> Array:
        return rotate(heads(y, weight), cos, sin).swapaxes(1, 2)

    def value(y: Array, weight: Array) -> Array:
        return heads(y, weight).swapaxes(1, 2)

    def output(x: Array, a: Array, weight: Array) -> Array:
        a = a.reshape(b, model.heads, s, model.head_dim).swapaxes(1, 2)
        return x + a.reshape(b * s, -1) @ weight.T

    y = rms_norm(x, norm1, model.eps)
    q, k, v = keep(query, y, wq), keep(key, y, wk), keep(value, y, wv)
    a = keep(partial(attention, mask), q, k, v, gradient=attention_gradient)
    x = keep(output, x, a, wo)
    y = rms_norm(x, norm2, model.eps)
    activation = keep(silu, keep(linear, y, gate, needed=False), gradient=silu_gradient)
    return (x + (activation * keep(linear, y, up)) @ down.T).reshape(b, s, d)


def head(model: Model, keep: Any, weights: Any, x: Array, labels: Array | None) -> Array:
    norm, weight = weights
    logits = keep(linear, rms_norm(x, norm, model.eps).reshape(-1, model.hidden), weight, needed=False)
    if labels is None:
        return logits.reshape(*x.shape[:2], -1)
    labels = labels.reshape(-1, 1)
    return keep(partial(loss_sum, labels), logits, gradient=partial(loss_gradient, labels))


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return x * mx.rsqrt(mx.mean(x * x, -1, keepdims=True) + eps) * weight


def linear(x: Array, weight: Array) -> Array:
    return x @ weight.T


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotary embedding of x [b, s, heads, head_dim]; the halves are the two coordinates."""
    a, b = mx.split(x, 2, -1)
    return mx.concatenate((a * cos - b * sin, b * cos + a * sin), -1)


# ---- Functions whose gradient wants more than their output: exponentials are dear on the CPU


# Of the logits at once.
ROWS = 256


def attention(mask: Array, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
    scores = q * q.shape[-1] ** -0.5 @ k.swapaxes(-1, -2) + mask
    e = exp(scores - mx.max(scores, -1, keepdims=True))
    p = e / mx.sum(e, -1, keepdims=True)
    return p @ v, p


def attention_gradient(inputs: tuple[Array, ...], da: Array, a: Array, p: Array) -> tuple[Array, ...]:
    q, k, v = inputs
    scale = q.shape[-1] ** -0.5
    ds = p * (da @ v.swapaxes(-1, -2) - mx.sum(da * a, -1, keepdims=True))
    return ds @ k * scale, ds.swapaxes(-1, -2) @ (q * scale), p.swapaxes(-1, -2) @ da


def silu(x: Array) -> tuple[Array, Array]:
    p = 1 / (1 + exp(-x))
    return x * p, p


def silu_gradient(inputs: tuple[Array, ...], dy: Array, y: Array, p: Array) -> tuple[Array, ...]:
    return (dy * (p + y * (1 - p)),)


def loss_sum(labels: Array, logits: Array) -> tuple[Array, list[Array]]:
    """The sum of the losses, and the probabilities of some rows after the other: logits are the largest
    arrays of all, and the steps of an exponential would be several as large."""
    losses, kept = [], []
    for first in range(0, len(logits), ROWS):
        rows = slice(first, first + ROWS)
        shifted = logits[rows] - mx.max(logits[rows], -1, keepdims=True)
        e = exp(shifted)
        total = mx.sum(e, -1, keepdims=True)
        losses.append(mx.log(total) - mx.take_along_axis(shifted, labels[rows], -1))
        kept.append(e / total)
        mx.eval(losses[-1], kept[-1])
    return mx.sum(mx.concatenate(losses)).reshape(1), kept


def loss_gradient(labels: Array, _: Any, dy: Array, __: Array, kept: list[Array]) -> tuple[Array, ...]:
    p = mx.concatenate(kept)
    return ((p - (mx.arange(p.shape[-1]) == labels)) * dy,)


def exp(x: Array) -> Array:
    """exp(x) for x <= 88, to 8e-8 of its value; at least 1e-38.

    On the CPU of MLX 0.32.4 `mx.exp` errs by 4e-6 and takes three times as long. Cephes' `expf`:
    a power of two by the bits of the exponent, a polynomial for the rest.
    """
    if mx.default_device().type != mx.cpu:
        return mx.exp(x)
    x = mx.clip(x, -87.0, 88.0)
    n = (x * 1.44269504 + 12582912.0) - 12582912.0
    r = (x - n * 0.693359375) + n * 2.12194440e-4
    y = r * 1.9875691500e-4 + 1.3981999507e-3
    for coefficient in (8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        y = y * r + coefficient
    return (y * (r * r) + r + 1) * ((n.astype(mx.int32) + 127) << 23).view(mx.float32)
