"""The part of SLO-Guard that runs inside vLLM.

vLLM imports this package in every one of its processes, so nothing here is imported until it is needed.
"""

__version__ = "0.1.0"
