"""The part of SLO-Guard that runs inside vLLM.

vLLM imports this package in every one of its processes, so nothing here is imported until it is needed.
"""

__version__: str


def __getattr__(name: str) -> str:
    """``__version__``, from the package's metadata when it is first asked for."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = version("vllm-sloguard")
    except PackageNotFoundError:  # a checkout on PYTHONPATH, not installed
        found = "0+unknown"
    globals()["__version__"] = found
    return found
