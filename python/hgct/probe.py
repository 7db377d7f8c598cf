"""Says which devices a framework reaches in this environment, as one line of JSON.

Discovery runs it in a child process with a deadline, so nothing here need survive a crash:

    python -c "$(cat probe.py)" ENGINE DEVICE [MODULE ...]

DEVICE is a vendor's device string, such as `cpu` or `cuda:{index}`; MODULEs are the vendor's
plug-ins. Needs the framework and nothing else: no hgct, no NumPy.
"""

import json
import os
import sys
from importlib import import_module

# What cannot be told stays None.
UNKNOWN = {"name": None, "uuid": None, "pci": None, "memory_bytes": None}


def torch(device, modules):
    import torch as framework

    load(modules)
    kind = device.partition(":")[0]
    backend = getattr(framework, kind, None)
    count = 1
    if kind not in ("cpu", "mps"):
        if backend is None:
            raise RuntimeError(f"this build of torch knows no device {kind!r}")
        if not backend.is_available():
            raise RuntimeError(f"torch.{kind}.is_available() is false")
        count = backend.device_count()
    elif kind == "mps" and not framework.backends.mps.is_available():
        raise RuntimeError("torch.backends.mps.is_available() is false")
    rows = []
    for index in range(count):
        place = device.replace("{index}", str(index))
        one = framework.ones(2, 2, device=place)
        expect((one @ one).sum().item(), place)
        about = getattr(backend, "get_device_properties", None) if kind != "cpu" else None
        rows.append(row(index, place, about(index) if about else None))
    return framework.__version__, rows


def jax(device, modules):
    import jax as framework
    import jax.numpy as jnp

    load(modules)
    kind = device.partition(":")[0]
    try:
        # Asked by name: left open, a missing platform silently becomes the CPU.
        places = framework.devices(kind)
    except (RuntimeError, AssertionError) as error:
        raise RuntimeError(f"JAX has no platform {kind!r}: {error or type(error).__name__}") from error
    rows = []
    for index, place in enumerate(places if "{index}" in device else places[:1]):
        one = framework.device_put(jnp.ones((2, 2)), place)
        expect(float((one @ one).sum()), str(place))
        facts = {"name": place.device_kind, "memory_bytes": (place.memory_stats() or {}).get("bytes_limit")}
        rows.append({**UNKNOWN, **facts, "index": index, "device": device.replace("{index}", str(index))})
    return framework.__version__, rows


def paddle(device, modules):
    import paddle as framework

    framework.disable_signal_handler()
    load(modules)
    kind = device.partition(":")[0]
    count = 1
    if kind != "cpu":
        known = [*framework.device.get_all_device_type(), *framework.device.get_all_custom_device_type()]
        if kind not in known:
            raise RuntimeError(f"this build of Paddle knows no device {kind!r}, only {', '.join(known)}")
        available = [*framework.device.get_available_device(), *framework.device.get_available_custom_device()]
        count = sum(name.partition(":")[0] == kind for name in available)
    rows = []
    for index in range(count):
        place = device.replace("{index}", str(index))
        framework.device.set_device(place)
        one = framework.ones([2, 2])
        expect(float((one @ one).sum()), place)
        properties = framework.device.cuda.get_device_properties(index) if kind == "gpu" else None
        rows.append(row(index, place, properties))
    return framework.__version__, rows


def mlx(device, modules):
    import mlx.core as framework

    load(modules)
    kind = device.partition(":")[0]
    place = framework.Device({"cpu": framework.cpu, "gpu": framework.gpu}[kind], 0)
    if kind == "gpu" and not framework.is_available(place):
        raise RuntimeError("this build of MLX reaches no GPU")
    with framework.stream(place):
        one = framework.ones((2, 2))
        expect((one @ one).sum().item(), device)
    return framework.__version__, [{**UNKNOWN, "index": 0, "device": device}]


def load(modules):
    for module in modules:
        import_module(module)


def expect(total, place):
    """The sum over the product of two 2x2 matrices of ones."""
    if total != 8.0:
        raise RuntimeError(f"{place} adds eight ones to {total}")


def row(index, device, properties):
    """A device from whatever the framework calls its properties."""
    facts = {**UNKNOWN, "index": index, "device": device}
    if properties is not None:
        facts["name"] = getattr(properties, "name", None)
        facts["memory_bytes"] = getattr(properties, "total_memory", None)
        uuid = getattr(properties, "uuid", None)
        facts["uuid"] = str(uuid) if uuid is not None else None
        domain, bus, slot = (getattr(properties, f"pci_{part}_id", None) for part in ("domain", "bus", "device"))
        if isinstance(bus, int) and isinstance(slot, int):
            facts["pci"] = f"{domain or 0:04x}:{bus:02x}:{slot:02x}.0"
    return facts


def mapped_libraries():
    """Names of the shared libraries in this process: whose driver answered."""
    try:
        with open("/proc/self/maps") as maps:
            paths = {line.split(maxsplit=5)[5].strip() for line in maps if ".so" in line}
    except (OSError, IndexError):
        return []
    return sorted({os.path.basename(path) for path in paths})


def main(engine, device, *modules):
    # The answer is the only thing on standard output, whatever a framework prints.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # Nothing of the current folder may stand in for a package.
    sys.path = [path for path in sys.path if path]
    facts = {"python": ".".join(map(str, sys.version_info[:3]))}
    try:
        facts["version"], facts["devices"] = ENGINES[engine](device, modules)
    except BaseException as error:
        facts["error"] = f"{type(error).__name__}: {error}"
    facts["libraries"] = mapped_libraries()
    json.dump(facts, answer)
    answer.write("\n")
    answer.flush()
    # A framework's threads and exit handlers have no say any more.
    os._exit(0)


ENGINES = {"torch": torch, "jax": jax, "paddle": paddle, "mlx": mlx}

if __name__ == "__main__":
    main(*sys.argv[1:])
