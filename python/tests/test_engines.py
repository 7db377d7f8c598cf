"""Engines against each other: `python3 python/tests/test_engines.py [ENGINE …]`.

Each engine of `.hgct/environments.toml` runs one script of calls in its own environment and dumps
losses and gradients of a small model: one stage and two, recompute on and off, tied and untied
embeddings, three micro-batches in flight in first-in-first-out order, several shapes. Then the
dumps are compared with torch's. Needs no compiled core.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve()
ROOT = HERE.parents[2]
SHAPES = [(2, 16), (1, 33)]
WORST_GRADIENT = 1e-5  # of the tensor's largest
WORST_LOSS = 2e-6

# ---- In an engine's environment ------------------------------------------------------------------


def model_spec(tied: bool) -> dict:
    dim = 8
    return dict(
        vocab_size=96, hidden_size=32, intermediate_size=80, num_layers=3, num_heads=4, num_kv_heads=2,
        head_dim=dim, rms_norm_eps=1e-5, rope_theta=1e4, rope_scaling={"type": "default"},
        tie_embeddings=tied, max_position=64, attention_bias=False, mlp_bias=False,
        inv_freq=[1e4 ** (-2 * i / dim) for i in range(dim // 2)],
    )  # fmt: skip


class Driver:
    """Calls an engine as the worker does, and spoils what it lent as soon as a call is over."""

    def __init__(self, engine, tied: bool, cuts: list[int], recompute: bool) -> None:
        import numpy as np
        from hgct.engines.base import Model

        self.np, self.engine, self.spec, self.cuts = np, engine, model_spec(tied), cuts
        self.model = Model(self.spec)
        bounds = [0, *cuts, self.model.blocks + 2]
        self.ranges = list(zip(bounds, bounds[1:]))
        engine.load(
            dict(stage=i, model=self.spec, layers=list(r), recompute=recompute) for i, r in enumerate(self.ranges)
        )
        rng = np.random.default_rng(7)
        self.values = {}
        for layer in range(self.model.blocks + 2):
            for name, shape in self.model.tensors(layer).items():
                spread = rng.normal(0, 0.2, shape) + (1 if len(shape) == 1 else 0)
                self.values.setdefault(name, spread.astype(np.float32))
        for stage in range(len(self.ranges)):
            self.import_values(stage)

    def names(self, stage: int) -> list[str]:
        return list(dict.fromkeys(n for layer in range(*self.ranges[stage]) for n in self.model.tensors(layer)))

    def lent(self, call, arrays: dict, rows: dict | None = None):
        """Runs `call` on leases of copies, which are overwritten afterwards."""
        from hgct.engines.base import lend

        copies = [(name, array.copy()) for name, array in arrays]
        leases = [lend(name, copy) for name, copy in copies]
        if rows is not None:
            leases = [(*lease, row) for lease, row in zip(leases, rows)]
        result = call(leases)
        for _, copy in copies:
            copy[...] = 77
        return result

    def import_values(self, stage: int) -> None:
        """The first tensor goes in as two ranges of rows, the others whole."""
        pieces, rows = [], []
        for i, name in enumerate(self.names(stage)):
            value = self.values[name]
            for begin, end in ((5, len(value)), (0, 5)) if i == 0 else ((0, len(value)),):
                pieces.append((name, value[begin:end]))
                rows.append(begin)
        self.lent(lambda leases: self.engine.import_tensors(stage, leases), pieces, rows)

    def arrays(self, leases) -> dict:
        from hgct.engines.base import view

        return {lease[0]: view(lease).copy() for lease in leases}

    def batch(self, shape: tuple[int, int], micro_batch: int):
        rng = self.np.random.default_rng((shape[1], micro_batch))
        tokens = rng.integers(0, self.spec["vocab_size"], (shape[0], shape[1] + 1)).astype(self.np.int32)
        return tokens[:, :-1], tokens[:, 1:]

    def run(self, call: str, shape, micro_batch: int, labels: bool = True):
        """Chains `forward`, `evaluate` or `logits` over the stages; the last stage's output."""
        ids, targets = self.batch(shape, micro_batch)
        x = ("input_ids", ids)
        for stage in range(len(self.ranges)):
            inputs = [x, ("labels", targets)] if labels and stage == len(self.ranges) - 1 else [x]
            key = (stage, micro_batch) if call == "forward" else (stage,)
            out = self.arrays(self.lent(lambda leases: getattr(self.engine, call)(*key, leases), inputs))
            ((name, array),) = out.items()
            x = (name, array)
        return x[1]

    def backward(self, micro_batch: int, gradients: dict | None = None) -> None:
        """Chains `backward` down the stages; the layers' sums go to `gradients` where it is given."""
        edge, order = [], []

        def ready(layer, leases) -> None:
            order.append(layer)
            for name, value in self.arrays(leases).items():
                # The two ends of a tied embedding add up at its owner.
                gradients[name] = gradients[name] + value if name in gradients else value
            self.kept.extend((lease, self.arrays([lease])[lease[0]]) for lease in leases)

        for stage in reversed(range(len(self.ranges))):
            callback = ready if gradients is not None else None
            out = self.lent(lambda leases: self.engine.backward(stage, micro_batch, leases, callback), edge)
            edge = list(self.arrays(out).items())
        if gradients is not None:
            assert order == list(range(self.model.blocks + 1, -1, -1)), order

    def step(self, shape, recorded: dict) -> dict:
        """Three micro-batches in flight, backward in first-in-first-out order."""
        self.kept = []
        for stage in range(len(self.ranges)):
            self.engine.zero_gradients(stage)
        for micro_batch in range(3):
            recorded[f"loss {micro_batch}"] = self.run("forward", shape, micro_batch)
        gradients: dict = {}
        for micro_batch in range(3):
            self.backward(micro_batch, gradients if micro_batch == 2 else None)
        recorded.update({f"gradient {name}": value for name, value in gradients.items()})
        return recorded


def dump(name: str, path: str) -> None:
    import numpy as np
    from hgct.engines import make_engine

    engine = make_engine(name, "cpu")
    facts = engine.describe()
    assert facts["engine"] == name and facts["dtypes"] == ["f32"] and "cpu" in facts["device"].lower(), facts
    results = {}
    for tied in (False, True):
        for cuts, recompute in (([], False), ([2], False), ([2], True), ([1, 4], False)):
            driver = Driver(engine, tied, cuts, recompute)
            for shape in SHAPES:
                recorded = driver.step(shape, {})
                if not recompute and cuts == [2]:
                    check_behaviour(driver, shape, recorded)
                key = f"tied={tied} cuts={cuts} recompute={recompute} shape={shape}"
                results.update({f"{key} {what}": value for what, value in recorded.items()})
                whole = f"tied={tied} cuts=[] recompute=False shape={shape}"
                for what, value in recorded.items():
                    error = np.abs(value - results[f"{whole} {what}"]).max() / np.abs(value).max()
                    assert error <= WORST_GRADIENT, f"{key} {what}: {error:.1e} from the uncut model"
    np.savez(path, **results)


def check_behaviour(driver: Driver, shape, recorded: dict) -> None:
    """What needs no other engine to compare with."""
    np, engine, kept = driver.np, driver.engine, driver.kept
    same = lambda a, b: all(np.array_equal(a[key], b[key]) for key in a)  # noqa: E731

    again = driver.step(shape, {})
    assert same(recorded, again), "a step repeated gives other bits"
    for lease, value in kept:
        assert np.array_equal(driver.arrays([lease])[lease[0]], value), f"lent gradient {lease[0]} changed"

    for stage in range(len(driver.ranges)):
        exported = driver.arrays(engine.export_tensors(stage, driver.names(stage)))
        assert same(exported, driver.values), "exported parameters are not the imported ones"

    loss = driver.run("evaluate", shape, 0)
    assert loss.shape == (1,) and abs(loss - recorded["loss 0"]) <= 1e-6 * abs(loss), "evaluate differs from forward"
    logits = driver.run("logits", shape, 0, labels=False).astype(np.float64)
    assert logits.shape == (*shape, driver.spec["vocab_size"])
    targets = driver.batch(shape, 0)[1]
    picked = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    wanted = (np.log(np.exp(logits).sum(-1)) - picked).sum()
    assert abs(loss[0] - wanted) <= WORST_LOSS * wanted, "logits and loss disagree"
    wanted = reference_loss(driver, *driver.batch(shape, 0))
    assert abs(loss[0] - wanted) <= WORST_LOSS * wanted, f"loss {loss[0]}, f64 reference {wanted}"

    # A dropped micro-batch never counts, and its number is free again.
    driver.kept = []
    for stage in range(len(driver.ranges)):
        engine.zero_gradients(stage)
    for micro_batch in (9, 0, 1, 2):
        driver.run("forward", shape, micro_batch)
    engine.drop(9)
    gradients: dict = {}
    for micro_batch in range(3):
        driver.backward(micro_batch, gradients if micro_batch == 2 else None)
    assert all(np.array_equal(gradients[n], recorded[f"gradient {n}"]) for n in gradients), "a dropped one counted"

    driver.run("forward", shape, 0)
    engine.abort()
    raises(lambda: driver.backward(0), "not live")
    raises(lambda: engine.forward(99, 0, []), "not loaded")
    raises(lambda: engine.export_tensors(0, ["lm_head.bias"]), "lm_head.bias")
    bad = np.full(shape, driver.spec["vocab_size"], np.int32)
    raises(lambda: driver.lent(lambda leases: engine.evaluate(0, leases), [("input_ids", bad)]), "token id")


def raises(call, words: str) -> None:
    from hgct.engines.base import EngineError

    try:
        call()
    except EngineError as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"no EngineError with {words!r}")


def reference_loss(driver: Driver, ids, targets) -> float:
    """The same model in plain f64 NumPy, written in another way than the engines."""
    np, w, m = driver.np, {k: v.astype(driver.np.float64) for k, v in driver.values.items()}, driver.model
    b, s = ids.shape
    norm = lambda x, g: g * x / np.sqrt((x * x).mean(-1, keepdims=True) + m.eps)  # noqa: E731
    angles = np.outer(np.arange(s), m.inv_freq)
    cos, sin = (np.concatenate([f(angles)] * 2, -1)[None, None] for f in (np.cos, np.sin))

    def heads(x, weight, count):
        return (x @ weight.T).reshape(b, s, count, m.head_dim).transpose(0, 2, 1, 3)

    def rotated(x):
        half = m.head_dim // 2
        return x * cos + np.concatenate([-x[..., half:], x[..., :half]], -1) * sin

    x = w["model.embed_tokens.weight"][ids]
    for i in range(m.blocks):
        p = {k.split(f"layers.{i}.")[1].removesuffix(".weight"): v for k, v in w.items() if f"layers.{i}." in k}
        y = norm(x, p["input_layernorm"])
        q = rotated(heads(y, p["self_attn.q_proj"], m.heads))
        k = np.repeat(rotated(heads(y, p["self_attn.k_proj"], m.kv_heads)), m.heads // m.kv_heads, 1)
        v = np.repeat(heads(y, p["self_attn.v_proj"], m.kv_heads), m.heads // m.kv_heads, 1)
        scores = q @ k.transpose(0, 1, 3, 2) / np.sqrt(m.head_dim) + np.triu(np.full((s, s), -np.inf), 1)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        a = (weights / weights.sum(-1, keepdims=True)) @ v
        x = x + a.transpose(0, 2, 1, 3).reshape(b, s, -1) @ p["self_attn.o_proj"].T
        y = norm(x, p["post_attention_layernorm"])
        gate = y @ p["mlp.gate_proj"].T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ p["mlp.up_proj"].T)) @ p["mlp.down_proj"].T
    out = w["model.embed_tokens.weight" if m.tied else "lm_head.weight"]
    logits = norm(x, w["model.norm.weight"]) @ out.T
    picked = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return float((np.log(np.exp(logits).sum(-1)) - picked).sum())


def compare(reference: str, candidate: str) -> None:
    import numpy as np

    ours, theirs = np.load(reference), np.load(candidate)
    assert set(ours.files) == set(theirs.files), set(ours.files) ^ set(theirs.files)
    worst = {"loss": 0.0, "gradient": 0.0}
    for key in ours.files:
        error = np.abs(ours[key].astype(np.float64) - theirs[key]).max() / np.abs(ours[key]).max()
        what = "gradient" if " gradient " in key else "loss"
        worst[what] = max(worst[what], float(error))
        limit = WORST_GRADIENT if what == "gradient" else WORST_LOSS
        assert error <= limit, f"{key}: {error:.1e} of the largest, {limit:.0e} is allowed"
    print(f"{len(ours.files)} tensors, worst loss {worst['loss']:.1e}, worst gradient {worst['gradient']:.1e}")


# ---- The starter, in any Python ------------------------------------------------------------------


def main(chosen: list[str]) -> int:
    import tomllib

    table = ROOT / ".hgct" / "environments.toml"
    rows = [r for r in tomllib.loads(table.read_text())["environment"] if not chosen or r["name"] in chosen]
    rows.sort(key=lambda row: row["engine"] != "torch")
    passed = failed = skipped = 0
    with tempfile.TemporaryDirectory() as folder:
        dumps = {row["name"]: str(Path(folder) / f"{row['name']}.npz") for row in rows}
        with ThreadPoolExecutor(max_workers=2) as pool:
            usable = [row for row in rows if not row.get("unusable")]
            calls = {row["name"]: pool.submit(call, row, "dump", row["engine"], dumps[row["name"]]) for row in usable}
        for row in rows:
            if row.get("unusable"):
                print(f"SKIPPED {row['name']}: {row['unusable']}")
                skipped += 1
                continue
            code, output = calls[row["name"]].result()
            if code == 0 and len(dumps) > 1:
                code, output = call(row, "compare", dumps[rows[0]["name"]], dumps[row["name"]])
            print(f"{'ok' if code == 0 else 'FAILED'} {row['name']} ({row['framework_version']}): {output.strip()}")
            passed, failed = passed + (code == 0), failed + (code != 0)
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 0 if passed and not failed else 1


def call(row: dict, *arguments: str) -> tuple[int, str]:
    variables = {**os.environ, **row["variables"], **{name: "1" for name in row["thread_variables"]}}
    variables |= {"PYTHONPATH": str(ROOT / "python"), "LD_PRELOAD": ":".join(row["preload"])}
    result = subprocess.run(
        [row["interpreter"], str(HERE), *arguments], env=variables, capture_output=True, text=True, timeout=300
    )
    return result.returncode, result.stdout + (result.stderr if result.returncode else "")


if __name__ == "__main__":
    if sys.argv[1:2] == ["dump"]:
        dump(*sys.argv[2:])
    elif sys.argv[1:2] == ["compare"]:
        compare(*sys.argv[2:])
    else:
        sys.exit(main(sys.argv[1:]))
