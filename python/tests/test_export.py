"""Other readers load what hgct writes: `transformers` an export, PyTorch a checkpoint.

Run by any interpreter that has torch and transformers; without them the tests are skipped and say so.
"""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import subprocess
import tempfile
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

CONFIG = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    # Large enough for attention to matter.
    "initializer_range": 0.3,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CONFIGS = {
    "tied": {**CONFIG, "tie_word_embeddings": True},
    "linear": {**CONFIG, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "llama3": {**CONFIG, "rope_theta": 500.0, "rope_scaling": LLAMA3},
}


def missing(*modules: str) -> str | None:
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    if shutil.which("cargo") is None:
        absent.append("cargo")
    return f"needs {', '.join(absent)}" if absent else None


def write(folder: Path, config: dict, *arguments: str) -> None:
    """A checkpoint and its export into `folder`."""
    path = folder / "model.json"
    path.write_text(json.dumps(config))
    command = ["cargo", "run", "-q", "-p", "hgct-checkpoint", "--example", "tiny_checkpoint", "--"]
    subprocess.run([*command, str(path), str(folder), *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def logits(config: dict, weights: dict, tokens):
    """A Llama in float64, from its papers and nothing of transformers."""
    import torch

    heads, kv_heads, dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    w = {name: tensor.double() for name, tensor in weights.items()}
    batch, length = tokens.shape

    def norm(x, weight):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]) * weight

    theta = config.get("rope_theta", 10000.0)
    frequencies = [frequency(config.get("rope_scaling"), theta ** (-2 * i / dim)) for i in range(dim // 2)]
    angles = torch.outer(torch.arange(length).double(), torch.tensor(frequencies).double())
    cos, sin = angles.cos(), angles.sin()

    def rotate(x):
        a, b = x[..., : dim // 2], x[..., dim // 2 :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    x = w["model.embed_tokens.weight"][tokens]
    hidden = torch.full((length, length), -math.inf).double().triu(1)
    for layer in range(config["num_hidden_layers"]):
        p = {k.split(f"layers.{layer}.")[1]: v for k, v in w.items() if f".{layer}." in k}
        h = norm(x, p["input_layernorm.weight"])
        split = lambda name, n: (h @ p[f"self_attn.{name}.weight"].T).view(batch, length, n, dim).transpose(1, 2)
        q, k, v = rotate(split("q_proj", heads)), rotate(split("k_proj", kv_heads)), split("v_proj", kv_heads)
        k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
        mixed = (q @ k.transpose(2, 3) / math.sqrt(dim) + hidden).softmax(-1) @ v
        x = x + mixed.transpose(1, 2).reshape(batch, length, -1) @ p["self_attn.o_proj.weight"].T
        h = norm(x, p["post_attention_layernorm.weight"])
        gate = torch.nn.functional.silu(h @ p["mlp.gate_proj.weight"].T)
        x = x + (gate * (h @ p["mlp.up_proj.weight"].T)) @ p["mlp.down_proj.weight"].T
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return norm(x, w["model.norm.weight"]) @ head.T


def frequency(scaling: dict | None, plain: float) -> float:
    if scaling is None:
        return plain
    if scaling["rope_type"] == "linear":
        return plain / scaling["factor"]
    turns = scaling["original_max_position_embeddings"] * plain / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
    return (1 - smooth) * plain / scaling["factor"] + smooth * plain


class Export(unittest.TestCase):
    def setUp(self) -> None:
        reason = missing("torch", "transformers", "safetensors")
        if reason:
            self.skipTest(reason)
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))

    def test_transformers_computes_the_same_logits(self) -> None:
        import torch
        from safetensors.torch import load_file
        from transformers import AutoModelForCausalLM

        for name, config in CONFIGS.items():
            with self.subTest(name):
                folder = self.folder / name
                folder.mkdir()
                write(folder, config)
                model, loading = AutoModelForCausalLM.from_pretrained(
                    folder / "hf", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
                )
                self.assertEqual([list(v) for v in loading.values() if v], [], loading)
                tokens = torch.randint(config["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(0))
                with torch.no_grad():
                    found = model(tokens).logits.double()
                weights = load_file(folder / "hf" / "model.safetensors")
                self.assertEqual("lm_head.weight" in weights, not config.get("tie_word_embeddings", False))
                expected = logits(config, weights, tokens)
                error = ((found - expected).abs().max() / expected.abs().max()).item()
                self.assertLess(error, 1e-5)

    def test_transformers_loads_the_tokenizer(self) -> None:
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import AutoTokenizer

        words = {word: i for i, word in enumerate(["[UNK]", "four", "kinds", "of", "device"])}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        path = self.folder / "tokenizer.json"
        tokenizer.save(str(path))
        write(self.folder, CONFIG, str(path))
        loaded = AutoTokenizer.from_pretrained(self.folder / "hf")
        self.assertEqual(loaded("four kinds of device").input_ids, [1, 2, 3, 4])


class DistributedCheckpoint(unittest.TestCase):
    def setUp(self) -> None:
        reason = missing("torch", "safetensors")
        if reason:
            self.skipTest(reason)
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))

    def test_torch_loads_parameters_and_moments_from_the_shards(self) -> None:
        import torch
        import torch.distributed.checkpoint as dcp
        from safetensors import safe_open
        from safetensors.torch import load_file
        from torch.distributed.checkpoint import HuggingFaceStorageReader

        write(self.folder, CONFIGS["tied"])
        step = self.folder / "checkpoints" / "step-00000001"
        expected = load_file(self.folder / "hf" / "model.safetensors")
        state = {name: torch.full_like(tensor, math.nan) for name, tensor in expected.items()}
        state |= {f"{name}#m": torch.full_like(tensor, math.nan) for name, tensor in expected.items()}
        dcp.load(state, storage_reader=HuggingFaceStorageReader(str(step)), no_dist=True)
        for name, tensor in expected.items():
            self.assertTrue(torch.equal(state[name], tensor), name)
            self.assertFalse(state[f"{name}#m"].isnan().any(), name)
        with safe_open(step / "shard-r1.safetensors", framework="pt") as shard:
            part = shard.get_tensor("model.embed_tokens.weight#m")
            begin = 40 // 3
            self.assertTrue(torch.equal(state["model.embed_tokens.weight#m"][begin : begin + len(part)], part))


if __name__ == "__main__":
    unittest.main()
