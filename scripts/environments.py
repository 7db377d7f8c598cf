#!/usr/bin/env python3
"""Installs one Python environment for each kind of engine under `.hgct/env/`.

    python3 scripts/environments.py                     # everything that is missing
    python3 scripts/environments.py --kinds jax,mlx     # some kinds only
    python3 scripts/environments.py --wheel FILE.whl    # also the hgct wheel, into each environment
    python3 scripts/environments.py --second-python /usr/bin/python3.12   # one more MLX, on that Python

Packages and versions are those of `environments/NAME.txt`. The result is
`.hgct/environments.toml`, the table from which an agent starts workers.
Exit code: 0 when at least one environment stands, 1 when none does, 2 for a wrong call.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
# Part of every stamp: a change here makes all environments be looked at again.
LAYOUT = 1
# Download time above this is printed and need not count as the user's wait for hgct.
FREE_DOWNLOAD_SECONDS = 75

# Large blocks come from the heap and stay there: mapping fresh zero pages for
# every activation costs some frameworks more than the arithmetic on them.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "67108864",
}
COMMON = {**MALLOC, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONNOUSERSITE": "1"}
# NumPy's own BLAS is never used by a worker; one thread keeps it from allocating for all cores.
NUMPY = {"OPENBLAS_NUM_THREADS": "1"}

# The wheel of MLX for the CPU brings the reference BLAS; this sends its one
# hot function to OpenBLAS. Every argument is passed in the same place, so the
# shim needs no header of either.
BLAS_SHIM = """\
void scipy_cblas_sgemm(int, int, int, int, int, int, float, const float *, int,
                       const float *, int, float, float *, int);
void cblas_sgemm(int order, int ta, int tb, int m, int n, int k, float alpha, const float *a,
                 int lda, const float *b, int ldb, float beta, float *c, int ldc) {
  scipy_cblas_sgemm(order, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
"""


@dataclass(frozen=True)
class Kind:
    """What is known about a kind before it is installed."""

    engine: str
    module: str
    need_bytes: int  # free disk while installing: wheels and unpacked files
    expect_seconds: int  # download and install, as seen on two cores
    thread_variables: tuple[str, ...]
    variables: dict[str, str] = field(default_factory=dict)


KINDS = {
    "torch": Kind("torch", "torch", 9_000_000_000, 150, ("OMP_NUM_THREADS", "MKL_NUM_THREADS"), NUMPY),
    "jax": Kind("jax", "jax", 900_000_000, 40, ("NPROC", "PJRT_NPROC"), {**NUMPY, "JAX_PLATFORMS": "cpu"}),
    "paddle": Kind(
        "paddle", "paddle", 1_300_000_000, 40, ("OMP_NUM_THREADS", "MKL_NUM_THREADS"),
        {**NUMPY, "MKL_DEBUG_CPU_TYPE": "5"},
    ),
    "mlx": Kind("mlx", "mlx.core", 250_000_000, 20, ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")),
}


class Failure(Exception):
    """Why an environment cannot stand, in words for the user."""


@dataclass
class Environment:
    """One environment on its way from nothing to a row of the table."""

    name: str
    kind: Kind
    root: Path
    python: str  # the interpreter that makes the environment
    python_version: str

    wheel: Path | None = None  # the hgct wheel to install
    download: tuple[float, float, int] | None = None  # begin, end (monotonic seconds), bytes
    unusable: str | None = None
    stamp: dict = field(default_factory=dict)

    @property
    def home(self) -> Path:
        return self.root / ".hgct" / "env" / self.name

    @property
    def interpreter(self) -> Path:
        return self.home / "bin" / "python"

    @property
    def requirements(self) -> Path:
        return self.root / "environments" / f"{self.kind.engine}.txt"

    @property
    def stamp_file(self) -> Path:
        return self.home / "hgct-stamp.json"

    @property
    def wanted(self) -> dict:
        """What the stamp must say for the environment to be up to date."""
        return {
            "layout": LAYOUT,
            "lock_hash": hashlib.sha256(self.requirements.read_bytes()).hexdigest(),
            "engine": self.kind.engine,
            "python": self.python_version,
        }

    def read_stamp(self) -> bool:
        """Loads the stamp; true when the environment stands as wanted."""
        try:
            stamp = json.loads(self.stamp_file.read_text())
        except (OSError, ValueError):
            return False
        wanted = self.wanted
        if not self.interpreter.exists() or any(stamp.get(key) != wanted[key] for key in wanted):
            return False
        if any(not Path(path).exists() for path in stamp.get("preload", [])):
            return False
        self.stamp = stamp
        return True

    def write_stamp(self) -> None:
        replace(self.stamp_file, json.dumps(self.stamp, indent=1) + "\n")

    def variables(self) -> dict[str, str]:
        variables = {**COMMON, **self.kind.variables}
        if self.kind.engine == "jax":
            # Compiled programs outlive the process: a second start warms up in half a second.
            variables["JAX_COMPILATION_CACHE_DIR"] = str(self.root / ".hgct" / "cache" / "jax")
            variables["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        return variables

    def say(self, text: str) -> None:
        with PRINTING:
            print(f"{self.name + ':':<11} {text}", flush=True)


PRINTING = threading.Lock()


def main() -> int:
    arguments = parse_arguments()
    root = arguments.root.resolve()
    environments = wanted_environments(arguments, root)
    wheel = arguments.wheel and arguments.wheel.resolve()
    for environment in environments:
        environment.wheel = wheel
    missing = [e for e in environments if not e.read_stamp()]
    for environment in environments:
        if environment not in missing:
            environment.say(f"stands ({environment.stamp['framework_version']}, Python {environment.python_version})")
    set_aside_for_disk(root, missing)
    run_side_by_side(install, [e for e in missing if e.unusable is None])
    if wheel:
        run_side_by_side(lambda e: install_wheel(e, wheel), [e for e in environments if e.unusable is None])
    write_table(root, environments)
    print_downloads(root, environments)
    return 0 if any(e.unusable is None for e in environments) else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=REPOSITORY, help="the repository")
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"comma-separated, of: {', '.join(KINDS)}")
    parser.add_argument("--python", default=sys.executable, help="interpreter that the environments are made with")
    parser.add_argument("--wheel", type=Path, help="the hgct wheel to install into each environment")
    parser.add_argument("--second-python", metavar="PATH", help="another interpreter: adds one environment on it")
    parser.add_argument("--second-kind", default="mlx", choices=list(KINDS), help="the kind of that environment")
    arguments = parser.parse_args()
    arguments.kinds = [name for name in arguments.kinds.split(",") if name]
    for name in arguments.kinds:
        if name not in KINDS:
            parser.error(f"--kinds: {name!r} is unknown; allowed: {', '.join(KINDS)}")
    if arguments.wheel and not arguments.wheel.is_file():
        parser.error(f"--wheel: {arguments.wheel} is not a file")
    return arguments


def wanted_environments(arguments: argparse.Namespace, root: Path) -> list[Environment]:
    """The rows of the table, longest installation first."""
    version = python_version(arguments.python)
    rows = [Environment(name, KINDS[name], root, arguments.python, version) for name in arguments.kinds]
    if arguments.second_python:
        second = python_version(arguments.second_python)
        name = f"{arguments.second_kind}-py{''.join(second.split('.')[:2])}"
        rows.append(Environment(name, KINDS[arguments.second_kind], root, arguments.second_python, second))
    return sorted(rows + standing(root, {row.name for row in rows}), key=lambda row: -row.kind.expect_seconds)


def standing(root: Path, named: set[str]) -> list[Environment]:
    """Environments of earlier calls, besides `named`: they stay in the table."""
    rows = []
    for file in sorted((root / ".hgct" / "env").glob("*/hgct-stamp.json")):
        try:
            stamp = json.loads(file.read_text())
            row = Environment(file.parent.name, KINDS[stamp["engine"]], root, stamp["base"], stamp["python"])
        except (OSError, ValueError, KeyError):
            continue
        if row.name not in named and row.read_stamp():
            rows.append(row)
    return rows


def python_version(interpreter: str) -> str:
    if interpreter == sys.executable:
        return ".".join(map(str, sys.version_info[:3]))
    code = "import sys; print('.'.join(map(str, sys.version_info[:3])))"
    try:
        return subprocess.run([interpreter, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"{interpreter} does not run as a Python interpreter: {error}")


def set_aside_for_disk(root: Path, missing: list[Environment]) -> None:
    """Marks the environments for which the disk has no room; the smallest are served first."""
    place = root / ".hgct"
    place.mkdir(exist_ok=True)
    free = shutil.disk_usage(place).free
    for environment in sorted(missing, key=lambda e: e.kind.need_bytes):
        need = environment.kind.need_bytes
        if need <= free:
            free -= need
            continue
        environment.unusable = (
            f"needs {gigabytes(need)} of free disk while installing, {gigabytes(max(free, 0))} is left under "
            f"{place}: make {gigabytes(need - free)} free and run {command(environment)}"
        )
        environment.say(environment.unusable)


def install(environment: Environment) -> None:
    begin = time.monotonic()
    home, kind = environment.home, environment.kind
    if not adopt(environment):
        environment.say(f"downloading and installing under {home} (about {kind.expect_seconds} s)")
        make_venv(environment)
        wheels = environment.root / ".hgct" / "wheels" / environment.name
        shutil.rmtree(wheels, ignore_errors=True)
        try:
            download(environment, wheels)
            pip(environment, "install", "--no-index", "--no-compile", "--find-links", wheels, "-r", environment.requirements)
        finally:
            shutil.rmtree(wheels, ignore_errors=True)
    stamp = {**environment.wanted, "base": environment.python, "preload": preloads(environment)}
    stamp["framework_version"] = framework_version(environment, stamp["preload"])
    environment.stamp = stamp
    environment.write_stamp()
    environment.say(f"ready after {time.monotonic() - begin:.0f} s ({kind.module} {stamp['framework_version']})")


def adopt(environment: Environment) -> bool:
    """Whether an environment without a valid stamp already holds exactly the wanted packages."""
    if not environment.interpreter.exists():
        return False
    code = (
        "import sys, importlib.metadata as m; print('.'.join(map(str, sys.version_info[:3])));"
        "[print(d.metadata['Name'] + '==' + d.version) for d in m.distributions()]"
    )
    found = subprocess.run([environment.interpreter, "-c", code], capture_output=True, text=True)
    version, *packages = found.stdout.split() or [""]
    # pip and setuptools come with the environment itself.
    ignored = ("pip==", "setuptools==", "hgct==")
    names, wanted = (
        {package for package in map(normal, lines) if not package.startswith(ignored)}
        for lines in (packages, environment.requirements.read_text().split())
    )
    return found.returncode == 0 and version == environment.python_version and names == wanted


def make_venv(environment: Environment) -> None:
    made = subprocess.run(
        [environment.python, "-m", "venv", "--clear", environment.home], capture_output=True, text=True
    )
    if made.returncode != 0:
        raise Failure(
            f"{environment.python} cannot make a virtual environment (on Debian: apt-get install python3-venv): "
            + last_lines(made.stdout + made.stderr)
        )


def download(environment: Environment, wheels: Path) -> None:
    begin = time.monotonic()
    pip(environment, "download", "-d", wheels, "-r", environment.requirements)
    size = sum(path.stat().st_size for path in wheels.iterdir())
    environment.download = (begin, time.monotonic(), size)
    environment.say(f"downloaded {gigabytes(size)} in {time.monotonic() - begin:.0f} s, unpacking")


def pip(environment: Environment, *arguments: object) -> None:
    call = [environment.interpreter, "-m", "pip", "--disable-pip-version-check", *map(str, arguments), "--quiet"]
    result = subprocess.run(call, capture_output=True, text=True)
    if result.returncode != 0:
        raise Failure(
            f"pip {arguments[0]} failed: {last_lines(result.stderr or result.stdout)}; to see more: "
            f"{environment.interpreter} -m pip install -r {environment.requirements}"
        )


def preloads(environment: Environment) -> list[str]:
    """Libraries that must be in the process before the framework."""
    if environment.kind.engine != "mlx":
        return []
    code = "import scipy_openblas32 as b; print(b.get_lib_dir()); print(b.get_library())"
    found = subprocess.run([environment.interpreter, "-c", code], capture_output=True, text=True)
    if found.returncode != 0:
        raise Failure(f"scipy_openblas32 does not import: {last_lines(found.stderr)}")
    directory, library = found.stdout.split()
    shim = environment.home / "lib" / "libhgct_blas.so"
    call = [
        os.environ.get("CC", "cc"), "-shared", "-fPIC", "-O2", "-x", "c", "-", "-o", shim,
        "-L", directory, "-l", library.removeprefix("lib"), "-Wl,-rpath," + directory,
    ]
    try:
        built = subprocess.run(list(map(str, call)), input=BLAS_SHIM, capture_output=True, text=True)
    except OSError as error:
        raise Failure(f"no C compiler for the OpenBLAS shim ({error}): install gcc or set CC") from error
    if built.returncode != 0:
        raise Failure(f"the OpenBLAS shim does not build: {last_lines(built.stderr)}")
    return [str(shim)]


def framework_version(environment: Environment, preload: list[str]) -> str:
    """Imports the framework as a worker would; the first import also compiles its Python files."""
    variables = {**os.environ, **environment.variables(), "LD_PRELOAD": ":".join(preload)}
    code = f"import {environment.kind.module} as m; print(m.__version__)"
    result = subprocess.run([environment.interpreter, "-c", code], env=variables, capture_output=True, text=True)
    if result.returncode != 0:
        raise Failure(f"{environment.kind.module} does not import: {last_lines(result.stderr)}")
    return result.stdout.split()[-1]


def install_wheel(environment: Environment, wheel: Path) -> None:
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if environment.stamp.get("wheel_hash") == digest:
        return
    pip(environment, "install", "--no-deps", "--no-index", "--force-reinstall", wheel)
    environment.stamp["wheel_hash"] = digest
    environment.write_stamp()
    environment.say(f"installed {wheel.name}")


def run_side_by_side(work, environments: list[Environment]) -> None:
    """Runs `work` on each environment at once; a failure sets that environment aside."""

    def guarded(environment: Environment) -> None:
        try:
            work(environment)
        except (Failure, OSError) as error:
            environment.unusable = f"{error}; again: {command(environment)}"
            environment.stamp.pop("wheel_hash", None)
            environment.say(f"set aside: {environment.unusable}")

    with ThreadPoolExecutor(max_workers=len(KINDS) + 1) as pool:
        list(pool.map(guarded, environments))


def write_table(root: Path, environments: list[Environment]) -> None:
    rows = ["# Written by scripts/environments.py: from these an agent of this host starts workers.\n"]
    for e in sorted(environments, key=lambda e: list(KINDS).index(e.kind.engine)):
        row = {
            "name": e.name,
            "engine": e.kind.engine,
            "interpreter": str(e.interpreter),
            "python_version": e.python_version,
            "framework": e.kind.module.split(".")[0],
            "framework_version": e.stamp.get("framework_version", ""),
            "lock_hash": e.wanted["lock_hash"],
            "wheel_hash": e.stamp.get("wheel_hash", ""),
            "thread_variables": list(e.kind.thread_variables),
            "preload": e.stamp.get("preload", []),
            "unusable": e.unusable,
        }
        rows.append("[[environment]]")
        # A JSON string or list of strings is also one of TOML.
        rows += [f"{key} = {json.dumps(value)}" for key, value in row.items() if value is not None]
        rows.append("[environment.variables]")
        rows += [f"{key} = {json.dumps(value)}" for key, value in e.variables().items()]
        rows.append("")
    replace(root / ".hgct" / "environments.toml", "\n".join(rows))


def print_downloads(root: Path, environments: list[Environment]) -> None:
    parts = [e.download for e in environments if e.download]
    if not parts:
        return
    size = sum(part[2] for part in parts)
    seconds = max(part[1] for part in parts) - min(part[0] for part in parts)
    beyond = max(0.0, seconds - FREE_DOWNLOAD_SECONDS)
    print(f"downloads:  {gigabytes(size)} in {seconds:.0f} s ({beyond:.0f} s above {FREE_DOWNLOAD_SECONDS} s)")
    record = {"download_seconds": round(seconds, 1), "download_bytes": size}
    replace(root / ".hgct" / "install.json", json.dumps(record) + "\n")


def replace(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def command(environment: Environment) -> str:
    """What makes this environment anew, to be pasted into a shell."""
    if environment.name in KINDS:
        which = ["--kinds", environment.name]
        if environment.python != sys.executable:
            which += ["--python", environment.python]
    else:
        which = ["--kinds", "", "--second-kind", environment.kind.engine, "--second-python", environment.python]
    if environment.root != REPOSITORY:
        which += ["--root", str(environment.root)]
    if environment.wheel:
        which += ["--wheel", str(environment.wheel)]
    return shlex.join(["python3", str(REPOSITORY / "scripts" / "environments.py"), *which])


def normal(requirement: str) -> str:
    name, _, version = requirement.partition("==")
    return name.lower().replace("_", "-").replace(".", "-") + "==" + version


def last_lines(text: str, count: int = 3) -> str:
    return " | ".join(line.strip() for line in text.strip().splitlines()[-count:])


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


if __name__ == "__main__":
    sys.exit(main())
