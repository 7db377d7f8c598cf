"""PaddlePaddle: CPU, CUDA, Kunlunxin, and by plug-ins Ascend, Cambricon and others."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor

from .base import BLOCK, EMBEDDING, Engine, EngineError, Layer, Model, Stage

# Signals, SIGTERM among them, belong to the process and not to a framework.
paddle.disable_signal_handler()


class PaddleEngine(Engine):
    name = "paddle"

    def __init__(self, device: str) -> None:
        super().__init__(device)
        # A device without a number is the first one.
        self.place = device if device == "cpu" or ":" in device else f"{device}:0"
        try:
            paddle.set_device(self.place)
            found = str(paddle.zeros([1]).place)
        except (ValueError, RuntimeError, OSError) as error:
            raise EngineError(f"Paddle cannot open device {device!r}: {error}") from error
        if paddle.get_device() != self.place:
            raise EngineError(f"Paddle runs on {paddle.get_device()} ({found}) where {device!r} was asked for")

    def facts(self) -> dict[str, Any]:
        return {"framework": "paddle", "version": paddle.__version__, "device": paddle.get_device()}

    def release(self, idle: bool) -> None:
        if self.place != "cpu":
            paddle.device.empty_cache()

    def zeros(self, shape: tuple[int, ...]) -> Tensor:
        tensor = paddle.zeros(shape, "float32")
        tensor.stop_gradient = False
        return tensor

    def put(self, stage: Stage, pieces: dict[str, list[tuple[int, np.ndarray]]]) -> None:
        for name, parts in pieces.items():
            parameter, new = stage.parameters[name], parts[0][1]
            if new.shape != tuple(parameter.shape):
                new = parameter.numpy()
                for row, array in parts:
                    new[row : row + len(array)] = array
            parameter.set_value(new)

    def reset(self, stage: Stage) -> None:
        # A new sum takes new memory: the old one may still be lent.
        for parameter in stage.parameters.values():
            parameter.grad = None
        stage.gradients.clear()

    def take(self, array: np.ndarray) -> Tensor:
        return paddle.to_tensor(array)

    def host(self, tensor: Tensor) -> np.ndarray:
        return np.from_dlpack(tensor.detach()) if self.place == "cpu" else tensor.numpy()

    def layer_forward(self, stage: Stage, layer: Layer, x: Tensor, labels: Tensor | None) -> tuple[Tensor, Any]:
        if stage.recompute:
            return self.layer_infer(stage, layer, x, labels), (x, labels, None)
        leaf, y = self._graph(stage, layer, x, labels)
        return y.detach(), (leaf, labels, y)

    def layer_backward(self, stage: Stage, layer: Layer, residuals: Any, dy: Tensor | None) -> Tensor | None:
        leaf, labels, y = residuals
        if y is None:
            leaf, y = self._graph(stage, layer, leaf, labels)
        paddle.autograd.backward([y], [dy])
        for name in layer.names:
            stage.gradients[name] = stage.parameters[name].grad
        return leaf.grad

    def layer_infer(self, stage: Stage, layer: Layer, x: Tensor, labels: Tensor | None) -> Tensor:
        with paddle.no_grad():
            return self._layer(stage, layer, x, labels)

    def _graph(self, stage: Stage, layer: Layer, x: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        leaf = x.detach()
        leaf.stop_gradient = layer.kind == EMBEDDING
        return leaf, self._layer(stage, layer, leaf, labels)

    def _layer(self, stage: Stage, layer: Layer, x: Tensor, labels: Tensor | None) -> Tensor:
        weights = stage.weights(layer)
        if layer.kind == EMBEDDING:
            return F.embedding(x, *weights)
        if layer.kind == BLOCK:
            return block(stage.model, weights, x, *self._tables(stage, x.shape))
        return head(stage.model, weights, x, labels)

    def _tables(self, stage: Stage, shape: list[int]) -> tuple[Tensor, ...]:
        """Rotary tables for the queries and keys of one batch; the causal mask of a group's heads."""
        batch, length = shape[:2]
        if (batch, length) not in stage.tables:
            model = stage.model
            cos, sin = (table[:, None, :] for table in model.rotation(length))
            # Written out in full: broadcasting is several times dearer than reading them.
            tables = [np.concatenate(halves, -1) for halves in ((cos, cos), (-sin, sin))]
            full = [
                paddle.to_tensor(np.tile(table, (batch, 1, heads, 1)))
                for heads in (model.heads, model.kv_heads)
                for table in tables
            ]
            mask = np.triu(np.full((length, length), -np.inf, np.float32), 1)
            group = model.heads // model.kv_heads
            stage.tables[batch, length] = *full, paddle.to_tensor(np.tile(mask, (group, 1)))
        return stage.tables[batch, length]


def block(
    model: Model, weights: tuple[Tensor, ...], x: Tensor, cos_q: Tensor, sin_q: Tensor, cos_k: Tensor, sin_k: Tensor,
    mask: Tensor,
) -> Tensor:
    """A decoder block: x [b, s, d]."""
    norm1, wq, wk, wv, wo, norm2, gate, up, down = weights
    b, s, _ = x.shape
    y = rms_norm(x, norm1, model.eps)
    q, k, v = (linear(y, weight).reshape([b, s, -1, model.head_dim]) for weight in (wq, wk, wv))
    # The heads of a group lie one below the other: [b, kv_heads, group * s, head_dim].
    q = rotate(q, cos_q, sin_q).transpose([0, 2, 1, 3]).reshape([b, model.kv_heads, -1, model.head_dim])
    k, v = rotate(k, cos_k, sin_k).transpose([0, 2, 1, 3]), v.transpose([0, 2, 1, 3])
    scores = paddle.matmul(q * model.head_dim**-0.5, k, transpose_y=True) + mask
    a = paddle.matmul(F.softmax(scores), v).reshape([b, model.heads, s, model.head_dim])
    x = x + linear(a.transpose([0, 2, 1, 3]).reshape([b, s, -1]), wo)
    y = rms_norm(x, norm2, model.eps)
    return x + linear(F.silu(linear(y, gate)) * linear(y, up), down)


def head(model: Model, weights: tuple[Tensor, ...], x: Tensor, labels: Tensor | None) -> Tensor:
    norm, weight = weights
    logits = linear(rms_norm(x, norm, model.eps), weight)
    if labels is None:
        return logits
    losses = F.cross_entropy(logits.reshape([-1, model.vocab]), labels.reshape([-1]), reduction="sum")
    return losses.reshape([1])


def linear(x: Tensor, weight: Tensor) -> Tensor:
    return paddle.matmul(x, weight, transpose_y=True)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    # Spread by a product with ones, whose gradient is a fast product too; that of broadcasting is slow.
    rows = x.size // weight.size
    spread = paddle.matmul(paddle.ones([rows, 1]), weight.reshape([1, -1])).reshape(x.shape)
    return x * paddle.rsqrt((x * x).mean(-1, keepdim=True) + eps) * spread


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [b, s, heads, head_dim]; the sign of the first half is in `sin`."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin
