"""A plain loop of one framework: what a worker under hgct is compared with, in speed and in memory.

    python plain_loop.py FRAMEWORK CONFIG TOKENS FIRST END SEQ_LEN MICRO_BATCH NUM_MICRO_BATCHES IN_FLIGHT

Trains layers FIRST..END of the model (0: embedding, then the blocks, last the head; all of them: the
whole model) as anybody would with the framework alone: stock modules, stock AdamW, nothing exchanged.
Forwards run IN_FLIGHT micro-batches ahead of backwards at most, as in a pipeline. Where a part of
the model has no embedding its input is random, where it has no head the gradient of its output is.

Says `ready` once the framework is imported and the model is there, then reads a line a measurement
from standard input, `WARM_UP STEPS`, and answers with an object: `seconds` of each counted step, and
`peak_bytes`, the largest resident memory since the process began.
"""

import importlib
import json
import sys
import time
from collections import deque

import numpy as np


def main() -> None:
    framework, config_path, tokens_path, *numbers = sys.argv[1:]
    first, end, seq_len, micro_batch, num_micro_batches, in_flight = map(int, numbers)
    with open(config_path) as file:
        config = json.load(file)
    shape = micro_batch, seq_len
    part = range(first, end)
    loop = importlib.import_module(f"{framework}_loop").Loop(config, part, shape, in_flight)
    tokens = np.memmap(tokens_path, np.uint16, "r", offset=64)
    num_samples = (len(tokens) - 1) // seq_len
    samples = iter(range(1 << 62))

    def micro_batches():
        for _ in range(num_micro_batches):
            starts = [next(samples) % num_samples * seq_len for _ in range(micro_batch)]
            rows = np.stack([tokens[start : start + seq_len + 1] for start in starts]).astype(np.int64)
            yield rows[:, :-1], rows[:, 1:]

    print("ready", flush=True)
    for line in sys.stdin:
        warm_up, steps = map(int, line.split())
        seconds = []
        for step in range(warm_up + steps):
            begun = time.monotonic()
            live = deque()
            for inputs, labels in micro_batches():
                live.append(loop.forward(inputs, labels))
                if len(live) == in_flight:
                    loop.backward(live.popleft())
            while live:
                loop.backward(live.popleft())
            loop.update(micro_batch * num_micro_batches * seq_len)
            if step >= warm_up:
                seconds.append(time.monotonic() - begun)
        print(json.dumps({"seconds": seconds, "peak_bytes": peak_bytes()}), flush=True)


def peak_bytes() -> int:
    with open("/proc/self/status") as status:
        (line,) = (line for line in status if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
