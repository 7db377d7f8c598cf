"""What all engines share: leases, the layers of a model, and the walk over a stage.

An engine computes with a framework; everything between devices is done elsewhere. A framework
needs only the methods at the end of `Engine`, those that raise `NotImplementedError`.

Shapes: b sequences of s tokens, d hidden size, V vocabulary. Layer 0 is the embedding, layers
1..n are the decoder blocks (layer i is block i - 1), layer n + 1 is final norm, head and loss.
"""

from __future__ import annotations

import ctypes
import gc
from dataclasses import dataclass, field
from math import prod
from typing import Any, Callable, Iterable, Sequence

import numpy as np

# What crosses the boundary, in both directions: (name, dtype, shape, address, bytes, owner).
# C-contiguous host memory, valid while `owner` is held; one that comes in, only during the call.
Lease = tuple[str, str, tuple[int, ...], int, int, Any]
# Called with a layer's index and gradients once they are final.
Ready = Callable[[int, list[Lease]], None]

DTYPES = {"f32": np.dtype(np.float32), "i32": np.dtype(np.int32)}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

EMBEDDING, BLOCK, HEAD = "embedding", "block", "head"


class EngineError(RuntimeError):
    """An engine was asked for something that it cannot do; the message says what to change."""


def view(lease: Sequence[Any]) -> np.ndarray:
    """The memory behind `lease` as an array, not copied. It dies with the lease's owner."""
    name, dtype, shape, address, size = lease[:5]
    if dtype not in DTYPES:
        raise EngineError(f"{name}: dtype {dtype!r} is not yet supported; allowed: {', '.join(DTYPES)}")
    if size != prod(shape) * DTYPES[dtype].itemsize:
        raise EngineError(f"{name}: {size} bytes cannot be {dtype} of shape {tuple(shape)}")
    memory = (ctypes.c_char * size).from_address(address)
    return np.frombuffer(memory, DTYPES[dtype]).reshape(shape)


def lend(name: str, array: np.ndarray) -> Lease:
    """A lease on `array`; on a copy where it is not C-contiguous."""
    array = np.ascontiguousarray(array)
    address = array.__array_interface__["data"][0]
    return name, DTYPE_NAMES[array.dtype], array.shape, address, array.nbytes, array


class Model:
    """The architecture of a Llama-family model, as validated by the core."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.vocab: int = spec["vocab_size"]
        self.hidden: int = spec["hidden_size"]
        self.intermediate: int = spec["intermediate_size"]
        self.blocks: int = spec["num_layers"]
        self.heads: int = spec["num_heads"]
        self.kv_heads: int = spec["num_kv_heads"]
        self.head_dim: int = spec["head_dim"]
        self.eps: float = spec["rms_norm_eps"]
        self.tied: bool = spec["tie_embeddings"]
        self.inv_freq = np.asarray(spec["inv_freq"], np.float64)
        if spec.get("attention_bias") or spec.get("mlp_bias"):
            raise EngineError("biases in attention or MLP are not yet supported")

    def kind(self, layer: int) -> str:
        return EMBEDDING if layer == 0 else HEAD if layer == self.blocks + 1 else BLOCK

    def tensors(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Hugging Face names and shapes of a layer's parameters, in the order the engines use."""
        d, ff = self.hidden, self.intermediate
        embedding = {"model.embed_tokens.weight": (self.vocab, d)}
        if layer == 0:
            return embedding
        if layer == self.blocks + 1:
            return {"model.norm.weight": (d,)} | (embedding if self.tied else {"lm_head.weight": (self.vocab, d)})
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        parts = {
            "input_layernorm": (d,),
            "self_attn.q_proj": (q, d),
            "self_attn.k_proj": (kv, d),
            "self_attn.v_proj": (kv, d),
            "self_attn.o_proj": (d, q),
            "post_attention_layernorm": (d,),
            "mlp.gate_proj": (ff, d),
            "mlp.up_proj": (ff, d),
            "mlp.down_proj": (d, ff),
        }
        return {f"model.layers.{layer - 1}.{part}.weight": shape for part, shape in parts.items()}

    def rotation(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and sines of the rotary embedding, f32 [length, head_dim / 2], computed in f64."""
        angles = np.outer(np.arange(length, dtype=np.float64), self.inv_freq)
        return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


@dataclass
class Layer:
    """One layer of a stage: its parameters, and those whose gradients are final with it."""

    index: int
    kind: str
    names: tuple[str, ...]
    final: tuple[str, ...]


@dataclass
class Stage:
    """A contiguous range of layers with its parameters, gradients and live micro-batches."""

    model: Model
    layers: list[Layer]
    recompute: bool
    parameters: dict[str, Any]
    gradients: dict[str, Any] = field(default_factory=dict)
    live: dict[int, list[Any]] = field(default_factory=dict)
    tables: dict[int, Any] = field(default_factory=dict)  # rotary tables by sequence length

    @property
    def has_embedding(self) -> bool:
        return self.layers[0].kind == EMBEDDING

    @property
    def has_head(self) -> bool:
        return self.layers[-1].kind == HEAD

    def weights(self, layer: Layer) -> tuple[Any, ...]:
        return tuple(self.parameters[name] for name in layer.names)


class Engine:
    """One device, driven through one framework. Calls come from one thread, one at a time."""

    name = ""

    def __init__(self, device: str) -> None:
        self.device = device
        self.stages: dict[int, Stage] = {}

    # ---- The interface, as the worker calls it

    def describe(self) -> dict[str, Any]:
        """Capabilities, and the device that the framework really runs on."""
        return {
            "engine": self.name,
            "dtypes": ["f32"],
            "granularity": "layer",
            "split_backward": False,
            "recompute": True,
            "tensor_parallel": False,
            "deterministic": True,
            "memory_bytes": None,
        } | self.facts()

    def load(self, stages: Iterable[dict[str, Any]]) -> None:
        """Makes room for `stages`, parameters zero until imported. All before is forgotten."""
        self.stages.clear()
        gc.collect()
        specs = list(stages)
        self.release(idle=not specs)
        for spec in specs:
            self.stages[spec["stage"]] = self._allocate(Model(spec["model"]), *spec["layers"], spec["recompute"])

    def import_tensors(self, stage: int, leases: Iterable[Sequence[Any]]) -> None:
        """Copies parameters in: leases with the first row as a seventh item."""
        target = self._stage(stage)
        pieces: dict[str, list[tuple[int, np.ndarray]]] = {}
        for lease in leases:
            name, row = lease[0], lease[6]
            array, shape = view(lease), self._shape(target, name)
            if array.shape[1:] != shape[1:] or row + array.shape[0] > shape[0]:
                raise EngineError(f"{name}: rows {row}.. of shape {array.shape} do not fit into {shape}")
            pieces.setdefault(name, []).append((row, array))
        self.put(target, pieces)

    def export_tensors(self, stage: int, names: Iterable[str]) -> list[Lease]:
        """Leases on the current parameters, bit for bit."""
        source = self._stage(stage)
        for name in names:
            self._shape(source, name)
        return [lend(name, self.host(source.parameters[name])) for name in names]

    def zero_gradients(self, stage: int) -> None:
        """Begins a new sum of gradients; leases on the old one stay valid."""
        self.reset(self._stage(stage))

    def forward(self, stage: int, micro_batch: int, inputs: Sequence[Lease]) -> list[Lease]:
        """Takes `input_ids` [b, s] or `hidden` [b, s, d], and `labels` [b, s] where the head is.

        Gives `hidden`, or with the head `loss_sum` [1], the sum of the tokens' cross-entropies.
        """
        target = self._stage(stage)
        if micro_batch in target.live:
            raise EngineError(f"stage {stage}: micro-batch {micro_batch} is already live; drop it first")
        x, labels = self._edge(target, inputs, target.has_head)
        saved = []
        for layer in target.layers:
            x, residuals = self.layer_forward(target, layer, x, labels)
            saved.append(residuals)
        leases = [lend("loss_sum" if target.has_head else "hidden", self.host(x))]
        target.live[micro_batch] = saved
        return leases

    def backward(
        self, stage: int, micro_batch: int, gradients: Sequence[Lease], ready: Ready | None
    ) -> list[Lease]:
        """Adds a live micro-batch's gradients; gives that of its `hidden` input, if it had one.

        `gradients` is that of the `hidden` output, or empty where the head is: the loss then counts
        with weight 1. `ready`, given with a step's last micro-batch, hears of each layer's sums,
        highest layer first, before the earlier layers are computed.
        """
        target = self._stage(stage)
        if micro_batch not in target.live:
            raise EngineError(f"stage {stage}: micro-batch {micro_batch} is not live; forward it first")
        if len(gradients) != (0 if target.has_head else 1):
            raise EngineError(f"stage {stage}: the gradient of 'hidden' is wanted, exactly where the head is not")
        dy = self.borrow(view(gradients[0])) if gradients else None
        saved = target.live.pop(micro_batch)
        for layer in reversed(target.layers):
            dy = self.layer_backward(target, layer, saved.pop(), dy)
            if ready is not None:
                ready(layer.index, [lend(name, self.gradient(target, name)) for name in layer.final])
        return [] if target.has_embedding else [lend("hidden", self.host(dy))]

    def evaluate(self, stage: int, inputs: Sequence[Lease]) -> list[Lease]:
        """Like `forward`; nothing is kept."""
        target = self._stage(stage)
        return self._infer(target, inputs, target.has_head, "loss_sum")

    def logits(self, stage: int, inputs: Sequence[Lease]) -> list[Lease]:
        """Like `evaluate`; the stage with the head takes no labels and gives `logits` [b, s, V]."""
        return self._infer(self._stage(stage), inputs, False, "logits")

    def drop(self, micro_batch: int) -> None:
        """Forgets a live micro-batch: its gradients never count."""
        for stage in self.stages.values():
            stage.live.pop(micro_batch, None)

    def abort(self) -> None:
        """Forgets all live micro-batches."""
        for stage in self.stages.values():
            stage.live.clear()

    # ---- What a framework adds

    def facts(self) -> dict[str, Any]:
        """`framework`, `version`, `device`, and what differs from the defaults of `describe`."""
        raise NotImplementedError

    def release(self, idle: bool) -> None:
        """Gives cached memory back after the stages are gone; `idle`: none take their place."""

    def zeros(self, shape: tuple[int, ...]) -> Any:
        """A parameter of zeros on the device."""
        raise NotImplementedError

    def put(self, stage: Stage, pieces: dict[str, list[tuple[int, np.ndarray]]]) -> None:
        """Copies pieces of parameters in: for each name, first rows and arrays."""
        raise NotImplementedError

    def reset(self, stage: Stage) -> None:
        """Sets gradients to zero without touching memory that is lent."""
        raise NotImplementedError

    def take(self, array: np.ndarray) -> Any:
        """A copy of `array` on the device."""
        raise NotImplementedError

    def borrow(self, array: np.ndarray) -> Any:
        """`array` on the device, only until the end of the call: need not be a copy."""
        return self.take(array)

    def host(self, tensor: Any) -> np.ndarray:
        """The finished value of `tensor` in host memory, not copied where that is possible."""
        raise NotImplementedError

    def gradient(self, stage: Stage, name: str) -> np.ndarray:
        """The finished sum of a parameter's gradients in host memory."""
        return self.host(stage.gradients[name])

    def layer_forward(self, stage: Stage, layer: Layer, x: Any, labels: Any) -> tuple[Any, Any]:
        """A layer's output, and what its backward needs. With the head, the sum of the losses [1]."""
        raise NotImplementedError

    def layer_backward(self, stage: Stage, layer: Layer, residuals: Any, dy: Any) -> Any:
        """Adds to `stage.gradients`; gives the gradient of the layer's input. `dy` None is 1."""
        raise NotImplementedError

    def layer_infer(self, stage: Stage, layer: Layer, x: Any, labels: Any) -> Any:
        """A layer's output without a graph; the head gives logits where `labels` is None."""
        raise NotImplementedError

    # ---- Helpers

    def _allocate(self, model: Model, first: int, past_last: int, recompute: bool) -> Stage:
        layers, seen = [], set()
        for index in range(first, past_last):
            names = tuple(model.tensors(index))
            # A tied embedding with both ends here is final only at the lower end.
            final = tuple(name for name in names if name not in seen)
            seen.update(names)
            layers.append(Layer(index, model.kind(index), names, final))
        shapes = {name: shape for layer in layers for name, shape in model.tensors(layer.index).items()}
        stage = Stage(model, layers, recompute, {name: self.zeros(shape) for name, shape in shapes.items()})
        self.reset(stage)
        return stage

    def _stage(self, stage: int) -> Stage:
        if stage not in self.stages:
            raise EngineError(f"stage {stage} is not loaded; loaded: {sorted(self.stages)}")
        return self.stages[stage]

    def _shape(self, stage: Stage, name: str) -> tuple[int, ...]:
        if name not in stage.parameters:
            raise EngineError(f"tensor {name!r} is not in the layers {stage.layers[0].index}..{stage.layers[-1].index}")
        return tuple(stage.parameters[name].shape)

    def _edge(self, stage: Stage, inputs: Sequence[Lease], with_labels: bool) -> tuple[Any, Any]:
        edge = {lease[0]: view(lease) for lease in inputs}
        wanted = {"input_ids" if stage.has_embedding else "hidden"} | ({"labels"} if with_labels else set())
        if set(edge) != wanted:
            raise EngineError(f"inputs {sorted(edge)} were given, {sorted(wanted)} are wanted")
        for name in wanted - {"hidden"}:
            # Frameworks differ: some raise, some clamp without a word.
            if edge[name].size and not 0 <= edge[name].min() <= edge[name].max() < stage.model.vocab:
                raise EngineError(f"{name}: a token id is outside 0..{stage.model.vocab - 1}")
        arrays = {name: self.take(array) for name, array in edge.items()}
        return arrays.get("input_ids", arrays.get("hidden")), arrays.get("labels")

    def _infer(self, stage: Stage, inputs: Sequence[Lease], with_labels: bool, output: str) -> list[Lease]:
        x, labels = self._edge(stage, inputs, with_labels)
        for layer in stage.layers:
            x = self.layer_infer(stage, layer, x, labels)
        return [lend(output if stage.has_head else "hidden", self.host(x))]
