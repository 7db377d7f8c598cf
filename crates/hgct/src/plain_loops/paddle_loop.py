"""The plain loop in Paddle: layers, autograd over all of them at once, `paddle.optimizer.AdamW`."""

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn

INITIAL = paddle.ParamAttr(initializer=nn.initializer.Normal(0.0, 0.02))


def linear(size: int, out: int) -> nn.Linear:
    return nn.Linear(size, out, weight_attr=INITIAL, bias_attr=False)


class RmsNorm(nn.Layer):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight = self.create_parameter([d], default_initializer=nn.initializer.Constant(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * paddle.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * self.weight


class Block(nn.Layer):
    def __init__(self, c: dict) -> None:
        super().__init__()
        d, f, heads = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"]
        kv = d // heads * c.get("num_key_value_heads", heads)
        self.heads, self.head_dim = heads, d // heads
        self.norm1, self.norm2 = RmsNorm(d), RmsNorm(d)
        self.q, self.k, self.v, self.o = linear(d, d), linear(d, kv), linear(d, kv), linear(d, d)
        self.gate, self.up, self.down = linear(d, f), linear(d, f), linear(f, d)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, s, d = x.shape
        y = self.norm1(x)
        q, k, v = (p(y).reshape([b, s, -1, self.head_dim]) for p in (self.q, self.k, self.v))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if k.shape[2] != self.heads:
            k, v = (t.repeat_interleave(self.heads // t.shape[2], 2) for t in (k, v))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(a.reshape([b, s, d]))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Model(nn.Layer):
    """Layers `part` of the model; gives the sum of the losses where the head is among them."""

    def __init__(self, c: dict, part: range) -> None:
        super().__init__()
        d, v, n = c["hidden_size"], c["vocab_size"], c["num_hidden_layers"]
        self.embedding = nn.Embedding(v, d, weight_attr=INITIAL) if 0 in part else None
        self.blocks = nn.LayerList([Block(c) for layer in part if 0 < layer <= n])
        self.norm, self.head = (RmsNorm(d), linear(d, v)) if n + 1 in part else (None, None)
        half = d // c["num_attention_heads"] // 2
        angles = np.outer(np.arange(c["max_position_embeddings"]), 10000.0 ** (-np.arange(half) / half))
        self.cos, self.sin = (paddle.to_tensor(t.astype(np.float32)[:, None, :]) for t in (np.cos(angles), np.sin(angles)))

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
        paddle.seed(0)
        self.model = Model(config, part)
        self.optimizer = paddle.optimizer.AdamW(
            1e-3, 0.9, 0.95, parameters=self.model.parameters(), weight_decay=0.1, grad_clip=nn.ClipGradByGlobalNorm(1.0)
        )
        self.hidden = paddle.randn([*shape, config["hidden_size"]])

    def forward(self, inputs: np.ndarray, labels: np.ndarray) -> Tensor:
        x = paddle.to_tensor(inputs)
        if self.model.embedding is None:
            x = self.hidden.clone()
            x.stop_gradient = False
        return self.model(x, paddle.to_tensor(labels))

    def backward(self, output: Tensor) -> None:
        output.backward(self.hidden if output.ndim else None)

    def update(self, _: int) -> None:
        # The sum of gradients is longer than any norm that clipping leaves: dividing it by the tokens
        # before changes nothing.
        self.optimizer.step()
        self.optimizer.clear_grad(set_to_zero=False)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return paddle.concat((a * cos - b * sin, b * cos + a * sin), -1)
