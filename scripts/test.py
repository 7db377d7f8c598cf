#!/usr/bin/env python3
"""Sets up what is missing, then runs all tests, Rust's and Python's.

    python3 scripts/test.py [ARGUMENTS OF cargo test]      # or: make test

A test that cannot run here prints `SKIPPED` with the reason; these lines come again at the end.
With HGCT_FORBID_SKIP=1 a skip is a failure. Exit code: 0 when all passed, 1 otherwise.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import set_up

PYTHON_TESTS = set_up.ROOT / "python" / "tests"


def main() -> int:
    if sys.argv[1:2] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    try:
        set_up.set_up()
        export = export_environment()
        second_environment()
        steps = {
            "set-up": [sys.executable, PYTHON_TESTS / "test_environments.py"],
            "engines": [sys.executable, PYTHON_TESTS / "test_engines.py"],
            "export": [export or sys.executable, PYTHON_TESTS / "test_export.py", "-v"],
            **native_tests(),
            # Last, so that the lines of its runner stand at the end.
            "Rust": ["cargo", "test", "--locked", "--workspace", "--no-fail-fast", *sys.argv[1:]],
        }
        return test(steps)
    except set_up.Failure as failure:
        set_up.say("tests", f"cannot go on: {failure}")
        return 1
    except KeyboardInterrupt:
        return 130


def native_tests() -> dict[str, list]:
    """The tests of the worker without Python, where `make vulkan` was run."""
    if not set_up.NATIVE.exists():
        return {}
    call = ["cargo", "test", "--locked", *set_up.native_options(), "--no-fail-fast"]
    return {"vulkan": [*call, "--manifest-path", set_up.NATIVE_WORKSPACE / "Cargo.toml"]}


def export_environment():
    """An interpreter that has transformers beside torch's environment; none where torch is not."""
    torch = set_up.STATE / "env" / "torch"
    if not (torch / "hgct-stamp.json").exists():
        return None
    return set_up.venv("export", "export", 20, beside=torch)


def second_environment() -> None:
    """One environment on another Python, for a job that mixes versions. It stands in a table of its own,
    so that no other run takes it for one more kind."""
    python = second_python()
    if python is None:
        set_up.say("second Python", "untried: there is no other Python 3.10 or newer here that makes environments")
        return
    home = set_up.STATE / "second"
    home.mkdir(exist_ok=True)
    if not (home / "environments").exists():
        (home / "environments").symlink_to(set_up.ROOT / "environments")
    call = [sys.executable, set_up.ROOT / "scripts" / "environments.py", "--root", home, "--kinds", ""]
    call += ["--second-python", python, "--second-kind", "mlx", "--wheel", set_up.standing_wheel()]
    if set_up.run(call, lambda line: set_up.say("second Python", line)) != 0:
        set_up.say("second Python", "untried: its environment could not be installed, see above")


def second_python() -> Path | None:
    """An interpreter of another version than this one, on the path or among pyenv's."""
    names = [f"python3.{minor}" for minor in (12, 13, 11, 10)]
    found = [Path(path) for path in map(shutil.which, names) if path]
    for name in names:
        found += sorted((Path.home() / ".pyenv" / "versions").glob(f"{name.removeprefix('python')}.*/bin/{name}"))
    code = "import sys, ensurepip; print(sys.version_info[0] == 3 and sys.version_info[1])"
    for python in found:
        said = subprocess.run([python, "-c", code], capture_output=True, text=True)
        if said.returncode == 0 and int(said.stdout) not in (sys.version_info[1], *range(10)):
            return python
    return None


def test(steps: dict[str, list]) -> int:
    """Runs the steps one after another and sums up."""
    skipped, results = [], []
    for name, call in steps.items():
        begin = time.monotonic()
        print(f"\n== {name}: {' '.join(map(str, call))}", flush=True)
        code = stream(call, skipped)
        results.append((name, code, time.monotonic() - begin))
    print()
    for line in skipped:
        print(line)
    for name, code, seconds in results:
        print(f"{name:<10} {'passed' if code == 0 else f'FAILED (exit code {code})'} in {seconds:.0f} s")
    forbidden = bool(skipped) and os.environ.get("HGCT_FORBID_SKIP") == "1"
    if forbidden:
        print(f"{len(skipped)} skips, and HGCT_FORBID_SKIP=1 forbids them")
    return 1 if forbidden or any(code for _, code, _ in results) else 0


def stream(call: list, skipped: list[str]) -> int:
    """Passes a command's lines on and collects what it skipped."""
    process = subprocess.Popen(
        list(map(str, call)), cwd=set_up.ROOT, text=True, errors="replace", stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    with process.stdout as lines:
        for line in lines:
            print(line, end="", flush=True)
            # Ours say it in capitals, and may stand behind a test's name; unittest says it its own way.
            if "SKIPPED" in line:
                skipped.append(line[line.index("SKIPPED") :].strip())
            elif "... skipped '" in line:
                skipped.append(f"SKIPPED {line.strip()}")
    return process.wait()


if __name__ == "__main__":
    sys.exit(main())
