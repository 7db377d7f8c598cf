#!/usr/bin/env python3
"""Builds the worker that needs no Python, and sees that there is a Vulkan driver for it.

    python3 scripts/vulkan.py        # or: make vulkan

From then on every command of hgct knows this host's Vulkan adapters as one more kind. The first
build takes 10 to 12 minutes on two cores. Where no driver lists an adapter, Debian's software driver
is installed (as root) or named. Exit code: 0 when an adapter can be used, 1 when none can.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time

import set_up
from set_up import Failure, last_lines, say

DRIVER = "mesa-vulkan-drivers"
PROBE_SECONDS = 120


def main() -> int:
    if sys.argv[1:] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    begin = time.monotonic()
    try:
        if shutil.which("cargo") is None:
            raise Failure("missing: cargo (install Rust with rustup: https://rustup.rs)")
        program = set_up.build_native()
        answer = probe(program)
        if not answer.get("devices"):
            say("vulkan", answer.get("error", "no adapter"))
            install_driver()
            answer = probe(program)
        usable = show(answer)
    except Failure as failure:
        say("vulkan", f"cannot go on: {failure}")
        return 1
    except KeyboardInterrupt:
        return 130
    say("vulkan", f"done after {time.monotonic() - begin:.1f} s")
    return 0 if usable else 1


def probe(program) -> dict:
    """What the worker lists."""
    try:
        result = subprocess.run([program, "--probe"], capture_output=True, text=True, timeout=PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        raise Failure(f"`{program} --probe` did not answer within {PROBE_SECONDS} s: a driver hangs") from None
    if result.returncode != 0:
        raise Failure(f"`{program} --probe` failed ({result.returncode}): {last_lines(result.stderr)}")
    return json.loads(result.stdout)


def install_driver() -> None:
    """Installs Debian's drivers, among them the software one (lavapipe)."""
    command = f"apt-get install -y --no-install-recommends {DRIVER}"
    if shutil.which("apt-get") is None:
        raise Failure("install a Vulkan driver with this system's package manager, then run this again")
    if os.geteuid() != 0:
        raise Failure(f"run as root: {command}; then run this again")
    say("driver", f"{command} (Mesa's drivers, with a software one for hosts without a GPU; about 40 s)")
    installed = subprocess.run(command.split(), capture_output=True, text=True, env=noninteractive())
    if installed.returncode != 0:
        # Lists of packages may be old or absent.
        subprocess.run(["apt-get", "update"], capture_output=True, text=True)
        installed = subprocess.run(command.split(), capture_output=True, text=True, env=noninteractive())
    if installed.returncode != 0:
        raise Failure(f"`{command}` failed (is there a network?): {last_lines(installed.stderr)}")


def noninteractive() -> dict[str, str]:
    return {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}


def show(answer: dict) -> bool:
    """A line an adapter; whether one can be used."""
    rows = answer.get("devices", [])
    if not rows:
        say("vulkan", answer.get("error", "no adapter"))
    for row in rows:
        kind = "software" if row["software"] else "card"
        say("adapter", f"{row['name']} ({kind}, {row['driver']}): {row['error'] or 'ready'}")
    return any(row["error"] is None for row in rows)


if __name__ == "__main__":
    sys.exit(main())
