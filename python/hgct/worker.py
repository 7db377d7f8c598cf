"""`python -m hgct.worker`: the process that drives one device.

An agent starts it with its orders on standard input; it is not meant to be typed.
"""

# First of all: a thread of the core watches the agent's pipe and takes the standard streams away
# before a framework can write to them or install signal handlers.
from hgct import _core


def make_engine(name: str, device: str, modules: tuple[str, ...] = ()) -> object:
    """Opens `device` with engine `name`. Only now is the framework imported."""
    from hgct.engines import make_engine

    return make_engine(name, device, modules)


if __name__ == "__main__":
    _core.run(make_engine)
