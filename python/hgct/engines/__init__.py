"""The frameworks that hgct drives, one file each, behind the interface of `base.Engine`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Iterable

if TYPE_CHECKING:
    from .base import Engine

# Engine name -> class in the module of the same name.
ENGINES = {"torch": "TorchEngine", "jax": "JaxEngine", "paddle": "PaddleEngine", "mlx": "MlxEngine"}


def make_engine(name: str, device: str, modules: Iterable[str] = ()) -> Engine:
    """Imports the framework behind engine `name` and opens `device`, for instance `"cpu"` or `"cuda:0"`.

    `modules` are a vendor's plug-ins (`torch_npu`), imported after the framework and before the
    device is opened. Raises `ValueError` for an unknown name, `ImportError` when the framework is
    not in this environment, `EngineError` when the device is not there or is not what was asked for.
    """
    if name not in ENGINES:
        raise ValueError(f"engine {name!r} is unknown; allowed: {', '.join(ENGINES)}")
    engine = getattr(import_module(f".{name}", __name__), ENGINES[name])
    for module in modules:
        import_module(module)
    return engine(device)
