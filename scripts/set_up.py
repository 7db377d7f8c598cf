#!/usr/bin/env python3
"""Brings a clone to the point where `hgct` runs (environments, the command, the wheel), and runs it.

    python3 scripts/set_up.py                     # the set-up alone: `make set-up`
    python3 scripts/set_up.py ARGUMENTS OF hgct   # then that command, as `make quickstart` does

Independent steps run side by side, each with a line that says what it does and how long it takes
on two cores. What stands already is left alone. Needs a C compiler, Python 3.10 or newer with
`venv`, and Rust; says what to run where one of them is missing.
Exit code: that of the command; without one 0 when hgct can run, 1 when it cannot.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STATE = ROOT / ".hgct"
# Free disk that a build of the command and the wheel takes.
BUILD_BYTES = 1_500_000_000
# The same for the worker without Python.
NATIVE_BYTES = 3_000_000_000
# A line at least this often while something runs.
LINE_EVERY_SECONDS = 20
# The crates that do not go into the wheel.
NOT_IN_WHEEL = {"hgct"}
# The worker without Python, in a workspace of its own.
NATIVE_WORKSPACE = ROOT / "worker-burn"
NATIVE = STATE / "bin" / "hgct-worker-burn"

PRINTING = threading.Lock()


class Failure(Exception):
    """Why a step cannot be done, in words for the user."""


def say(step: str, text: str) -> None:
    with PRINTING:
        print(f"{step + ':':<13} {text}", flush=True)


def main() -> int:
    if sys.argv[1:2] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    begin = time.monotonic()
    try:
        hgct = set_up()
    except Failure as failure:
        say("set-up", f"cannot go on: {failure}")
        return 1
    except KeyboardInterrupt:
        return 130
    if len(sys.argv) > 1:
        say("hgct", " ".join(sys.argv[1:]))
        sys.stdout.flush()
        # In place of this process, so that Ctrl-C and the exit code are the command's own.
        variables = {**os.environ, "HGCT_SET_UP_SECONDS": f"{time.monotonic() - begin:.1f}"}
        os.execve(hgct, [str(hgct), "--dir", str(STATE), *sys.argv[1:]], variables)
    return 0


def set_up() -> Path:
    """Does all that is missing; answers with the path of the command."""
    begin = time.monotonic()
    require_tools()
    known = standing_wheel()
    with ThreadPoolExecutor(max_workers=2) as pool:
        environments = pool.submit(install_environments, known)
        built = pool.submit(build)
        wheel = built.result()
        stand = environments.result()
    if not stand:
        raise Failure("no environment stands: see the lines above for what each needs")
    if wheel != known and not install_environments(wheel, told=lambda _: None):
        raise Failure("the wheel could be installed into no environment: see `unusable` in .hgct/environments.toml")
    if NATIVE.exists():
        # Only who has it gets it anew: its first build takes minutes.
        build_native()
    say("set-up", f"done after {time.monotonic() - begin:.1f} s")
    return target_folder() / "release" / "hgct"


def require_tools() -> None:
    """Looks for what only the user can install."""
    missing = []
    if shutil.which("cargo") is None:
        missing.append("cargo (install Rust with rustup: https://rustup.rs)")
    if shutil.which(os.environ.get("CC", "cc")) is None:
        missing.append("a C compiler (on Debian: apt-get install gcc libc6-dev)")
    if sys.version_info < (3, 10):
        missing.append(f"Python 3.10 or newer ({sys.executable} is {sys.version.split()[0]})")
    elif not environments_stand() and importlib.util.find_spec("ensurepip") is None:
        missing.append("Python's venv module (on Debian: apt-get install python3-venv)")
    if missing:
        raise Failure("missing: " + "; ".join(missing))


def environments_stand() -> bool:
    return (STATE / "env" / "build" / "hgct-stamp.json").exists() and (STATE / "environments.toml").exists()


# ---- Environments --------------------------------------------------------------------------------


def install_environments(wheel: Path | None, told=lambda line: say("environments", line)) -> bool:
    """Installs what is missing, and the wheel into each; false when no environment stands."""
    call = [sys.executable, ROOT / "scripts" / "environments.py", "--root", ROOT]
    if wheel is not None:
        call += ["--wheel", wheel]
    return run(call, told) == 0


def venv(step: str, name: str, expect_seconds: int, beside: Path | None = None) -> Path:
    """The interpreter of the environment `.hgct/env/NAME`, made from `environments/NAME.txt` if it does
    not stand. It sees the packages of the environment `beside` too."""
    home = STATE / "env" / name
    requirements = ROOT / "environments" / f"{name}.txt"
    stamp_file = home / "hgct-stamp.json"
    python = home / "bin" / "python"
    wanted = json.dumps({"lock": sha256(requirements.read_bytes()), "python": sys.version.split()[0], "beside": str(beside)})
    if python.exists() and stamp_file.exists() and stamp_file.read_text() == wanted:
        return python
    say(step, f"installing {', '.join(short(requirements))} under {home} (about {expect_seconds} s)")
    made = subprocess.run([sys.executable, "-m", "venv", "--clear", home], capture_output=True, text=True)
    if made.returncode != 0:
        raise Failure(
            f"{sys.executable} cannot make a virtual environment (on Debian: apt-get install python3-venv): "
            + last_lines(made.stdout + made.stderr)
        )
    if beside is not None:
        (site_packages(home) / "beside.pth").write_text(f"{site_packages(beside)}\n")
    call = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps", "-r", requirements]
    installed = subprocess.run(list(map(str, call)), capture_output=True, text=True)
    if installed.returncode != 0:
        raise Failure(f"pip cannot install {requirements.name} (is there a network?): {last_lines(installed.stderr)}")
    stamp_file.write_text(wanted)
    return python


def site_packages(home: Path) -> Path:
    (folder,) = home.glob("lib/python3.*/site-packages")
    return folder


def short(requirements: Path) -> list[str]:
    lines = requirements.read_text().split()
    return lines if len(lines) <= 2 else [f"{len(lines)} packages of {requirements.name}"]


# ---- The command and the wheel -------------------------------------------------------------------


def build() -> Path:
    """Builds both with one set of dependencies; answers with the wheel."""
    free = shutil.disk_usage(ROOT).free
    if free < BUILD_BYTES and not (target_folder() / "release" / "hgct").exists():
        raise Failure(f"building needs {BUILD_BYTES / 1e9:.1f} GB of free disk, {free / 1e9:.1f} GB is left under {ROOT}")
    python = venv("wheel", "build", 10)
    wheel = build_wheel(python)
    build_command(python)
    return wheel


def build_command(python: Path) -> None:
    begin = time.monotonic()
    counter = Counter("command")
    # With the wheel's package in the same call and maturin's variables: otherwise cargo would choose
    # other features of common dependencies, and compile those again.
    variables = {
        **os.environ,
        "PYO3_BUILD_EXTENSION_MODULE": "1",
        "PYO3_PYTHON": str(python),
        "PYO3_ENVIRONMENT_SIGNATURE": f"cpython-{sys.version_info[0]}.{sys.version_info[1]}-64bit",
        "PYTHON_SYS_EXECUTABLE": str(python),
    }
    configurations = list((target_folder() / "maturin").glob("pyo3-config-*.txt"))
    if len(configurations) == 1:
        variables["PYO3_CONFIG_FILE"] = str(configurations[0])
    if not (target_folder() / "release" / "hgct").exists():
        say("command", "cargo build --release -p hgct (about 60 s)")
    call = ["cargo", "build", "--release", "--locked", "-p", "hgct", "-p", "hgct-py"]
    if run(call, counter.line, variables) != 0:
        raise Failure(f"`{' '.join(call)}` failed: {explain(counter.kept)}")
    if counter.compiled:
        say("command", f"{counter.compiled} crates compiled in {time.monotonic() - begin:.0f} s")


class Counter:
    """Turns cargo's line for each crate into a line now and then, and keeps all others."""

    def __init__(self, step: str) -> None:
        self.step = step
        self.compiled = 0
        self.kept: list[str] = []
        self.spoke = time.monotonic()

    def line(self, text: str) -> None:
        word, _, rest = text.strip().partition(" ")
        if word in ("Compiling", "Downloaded", "Checking"):
            self.compiled += word != "Downloaded"
            if time.monotonic() - self.spoke > LINE_EVERY_SECONDS:
                self.spoke = time.monotonic()
                say(self.step, f"{self.compiled} crates, now {rest.split(' (')[0]}")
        elif word not in ("Finished", "Downloading", "Updating", "Locking", "Blocking", ""):
            self.kept.append(text)


def explain(lines: list[str]) -> str:
    text = "\n".join(lines)
    if any(words in text for words in ("failed to download", "Could not resolve host", "network")):
        text += "\nthe crates must be downloaded once: is there a network?"
    if "No space left on device" in text:
        text += "\nthe disk is full"
    return text


def build_wheel(python: Path) -> Path:
    """The wheel, built anew when something that goes into it has changed."""
    standing = standing_wheel()
    if standing is not None:
        return standing
    folder = STATE / "dist"
    wanted = sources_hash()
    shutil.rmtree(folder, ignore_errors=True)
    begin = time.monotonic()
    first = not (target_folder() / "release" / "deps").exists()
    say("wheel", f"maturin build --release (about {120 if first else 25} s)")
    counter = Counter("wheel")
    call = [python, "-m", "maturin", "build", "--release", "--locked", "--interpreter", python, "--out", folder]
    if run(call, counter.line) != 0:
        raise Failure(f"maturin failed: {explain(counter.kept)}")
    (wheel,) = folder.glob("*.whl")
    (folder / "sources.sha256").write_text(wanted)
    say("wheel", f"{wheel.name} after {time.monotonic() - begin:.0f} s")
    return wheel


def standing_wheel() -> Path | None:
    """The wheel of an earlier build, if it was made from these very sources."""
    stamp_file = STATE / "dist" / "sources.sha256"
    wheels = sorted((STATE / "dist").glob("*.whl"))
    current = len(wheels) == 1 and stamp_file.exists() and stamp_file.read_text() == sources_hash()
    return wheels[0] if current else None


def sources_hash() -> str:
    """Hash over the content of all that the wheel is made from."""
    files = [ROOT / name for name in ("Cargo.toml", "Cargo.lock", "pyproject.toml", "rust-toolchain.toml")]
    files += [ROOT / "environments" / "build.txt"]
    for crate in (ROOT / "crates").iterdir():
        if crate.name not in NOT_IN_WHEEL:
            files += crate_files(crate)
    files += (ROOT / "python" / "hgct").rglob("*.py")
    return hash_of(files)


def native_sources_hash() -> str:
    """Hash over the content of all that the worker without Python is made from."""
    files = [ROOT / "Cargo.toml", ROOT / "rust-toolchain.toml", ROOT / "scripts" / "core_identity.rs"]
    files += [NATIVE_WORKSPACE / "Cargo.lock", NATIVE_WORKSPACE / "build.rs"]
    files += crate_files(NATIVE_WORKSPACE)
    for crate in (ROOT / "crates").iterdir():
        if crate.name not in NOT_IN_WHEEL | {"hgct-py", "hgct-planner"}:
            files += crate_files(crate)
    return hash_of(files)


def crate_files(crate: Path) -> list[Path]:
    return [crate / "Cargo.toml", *(path for path in (crate / "src").rglob("*") if path.is_file())]


def hash_of(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.relative_to(ROOT)} {sha256(path.read_bytes())}\n".encode())
    return digest.hexdigest()


def build_native() -> Path:
    """Builds the worker without Python where its sources have changed; answers with its path."""
    stamp_file = NATIVE.parent / "sources.sha256"
    wanted = native_sources_hash()
    if NATIVE.exists() and stamp_file.exists() and stamp_file.read_text() == wanted:
        return NATIVE
    begin = time.monotonic()
    target = native_target()
    first = not (target / "release" / "deps").exists()
    free = shutil.disk_usage(ROOT).free
    if first and free < NATIVE_BYTES:
        raise Failure(f"building needs {NATIVE_BYTES / 1e9:.1f} GB of free disk, {free / 1e9:.1f} GB is left under {ROOT}")
    expected = "10 to 15 minutes on two cores, once" if first else "under a minute"
    say("vulkan", f"cargo build --release in {NATIVE_WORKSPACE.name} ({expected})")
    counter = Counter("vulkan")
    call = ["cargo", "build", "--locked", *native_options()]
    if run(call, counter.line, folder=NATIVE_WORKSPACE) != 0:
        raise Failure(f"`{' '.join(map(str, call))}` in {NATIVE_WORKSPACE} failed: {explain(counter.kept)}")
    NATIVE.parent.mkdir(parents=True, exist_ok=True)
    partial = NATIVE.with_suffix(".partial")
    shutil.copy2(target / "release" / NATIVE.name, partial)
    partial.replace(NATIVE)
    stamp_file.write_text(wanted)
    say("vulkan", f"{counter.compiled} crates compiled in {time.monotonic() - begin:.0f} s: {NATIVE}")
    return NATIVE


def native_target() -> Path:
    """Where the worker without Python is built: with others its hundreds of crates would be in the way."""
    return target_folder() / "vulkan"


def native_options() -> list:
    """With the same in every call nothing is compiled a second time."""
    return ["--release", "--target-dir", native_target()]


def target_folder() -> Path:
    """Where cargo builds, whatever its configuration says."""
    if not hasattr(target_folder, "known"):
        call = ["cargo", "metadata", "--no-deps", "--format-version", "1", "--offline"]
        result = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
        if result.returncode != 0:
            raise Failure(f"`{' '.join(call)}` failed: {last_lines(result.stderr)}")
        target_folder.known = Path(json.loads(result.stdout)["target_directory"])
    return target_folder.known


# ---- Processes -----------------------------------------------------------------------------------


def run(call: list, told, variables: dict | None = None, folder: Path = ROOT) -> int:
    """Runs a command in the repository; `told` hears each of its lines. Answers with the exit code."""
    process = subprocess.Popen(
        list(map(str, call)), cwd=folder, env=variables, text=True, errors="replace", stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    with process.stdout as lines:
        for line in lines:
            told(line.rstrip())
    return process.wait()


def last_lines(text: str, count: int = 3) -> str:
    return " | ".join(line.strip() for line in text.strip().splitlines()[-count:])


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
