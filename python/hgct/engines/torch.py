"""PyTorch: CPU, CUDA, ROCm, and by plug-ins most other accelerators."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .base import BLOCK, EMBEDDING, Engine, EngineError, Layer, Model, Stage


class TorchEngine(Engine):
    name = "torch"

    def __init__(self, device: str) -> None:
        super().__init__(device)
        torch.set_float32_matmul_precision("highest")
        try:
            self.place = torch.zeros(1, device=device).device
        except (RuntimeError, AssertionError) as error:
            raise EngineError(f"torch cannot open device {device!r}: {error}") from error
        if self.place.type != "cpu":
            torch.use_deterministic_algorithms(True, warn_only=True)

    def facts(self) -> dict[str, Any]:
        facts = {"framework": "torch", "version": torch.__version__, "device": str(self.place)}
        if self.place.type != "cpu":
            runtime = getattr(torch, self.place.type)
            facts["memory_bytes"] = runtime.mem_get_info(self.place)[1] if hasattr(runtime, "mem_get_info") else None
        return facts

    def release(self, idle: bool) -> None:
        if self.place.type != "cpu":
            getattr(torch, self.place.type).empty_cache()

    def zeros(self, shape: tuple[int, ...]) -> Tensor:
        return torch.zeros(shape, device=self.place, requires_grad=True)

    def put(self, stage: Stage, pieces: dict[str, list[tuple[int, np.ndarray]]]) -> None:
        with torch.no_grad():
            for name, parts in pieces.items():
                for row, array in parts:
                    stage.parameters[name][row : row + len(array)].copy_(torch.from_numpy(array))

    def reset(self, stage: Stage) -> None:
        # A new sum takes new memory: the old one may still be lent.
        for parameter in stage.parameters.values():
            parameter.grad = None
        stage.gradients.clear()

    def take(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        dtype = torch.int64 if array.dtype == np.int32 else None
        return tensor.to(self.place, dtype, copy=True)

    def borrow(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.place)

    def host(self, tensor: Tensor) -> np.ndarray:
        return tensor.detach().cpu().numpy()

    def layer_forward(self, stage: Stage, layer: Layer, x: Tensor, labels: Tensor | None) -> tuple[Tensor, Any]:
        if stage.recompute:
            return self.layer_infer(stage, layer, x, labels), (x, labels, None)
        leaf, y = self._graph(stage, layer, x, labels)
        return y.detach(), (leaf, labels, y)

    def layer_backward(self, stage: Stage, layer: Layer, residuals: Any, dy: Tensor | None) -> Tensor | None:
        leaf, labels, y = residuals
        if y is None:
            leaf, y = self._graph(stage, layer, leaf, labels)
        torch.autograd.backward(y, dy)
        for name in layer.names:
            stage.gradients[name] = stage.parameters[name].grad
        return leaf.grad

    def layer_infer(self, stage: Stage, layer: Layer, x: Tensor, labels: Tensor | None) -> Tensor:
        with torch.no_grad():
            return self._layer(stage, layer, x, labels)

    def _graph(self, stage: Stage, layer: Layer, x: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        leaf = x if layer.kind == EMBEDDING else x.detach().requires_grad_()
        return leaf, self._layer(stage, layer, leaf, labels)

    def _layer(self, stage: Stage, layer: Layer, x: Tensor, labels: Tensor | None) -> Tensor:
        weights = stage.weights(layer)
        if layer.kind == EMBEDDING:
            return F.embedding(x, *weights)
        if layer.kind == BLOCK:
            return block(stage.model, weights, x, *self._tables(stage, x.shape[1]))
        return head(stage.model, weights, x, labels)

    def _tables(self, stage: Stage, length: int) -> tuple[Tensor, Tensor]:
        if length not in stage.tables:
            tables = (torch.from_numpy(table)[:, None, :].to(self.place) for table in stage.model.rotation(length))
            stage.tables[length] = tuple(tables)
        return stage.tables[length]


def block(model: Model, weights: tuple[Tensor, ...], x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """A decoder block: x [b, s, d], tables [s, 1, head_dim / 2]."""
    norm1, wq, wk, wv, wo, norm2, gate, up, down = weights
    b, s, d = x.shape
    y = F.rms_norm(x, (d,), norm1, model.eps)
    q = rotate(F.linear(y, wq).view(b, s, model.heads, model.head_dim), cos, sin)
    k = rotate(F.linear(y, wk).view(b, s, model.kv_heads, model.head_dim), cos, sin)
    v = F.linear(y, wv).view(b, s, model.kv_heads, model.head_dim)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    a = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=model.kv_heads != model.heads)
    x = x + F.linear(a.transpose(1, 2).reshape(b, s, -1), wo)
    y = F.rms_norm(x, (d,), norm2, model.eps)
    return x + F.linear(F.silu(F.linear(y, gate)) * F.linear(y, up), down)


def head(model: Model, weights: tuple[Tensor, ...], x: Tensor, labels: Tensor | None) -> Tensor:
    norm, weight = weights
    logits = F.linear(F.rms_norm(x, (model.hidden,), norm, model.eps), weight)
    if labels is None:
        return logits
    return F.cross_entropy(logits.view(-1, model.vocab), labels.view(-1), reduction="sum").view(1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [b, s, heads, head_dim]; the halves are the two coordinates."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
