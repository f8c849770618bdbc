"""All faults: those of the engine and the sidecar themselves, and those from outside."""

from client_faults import CLIENTS
from faults import MATRIX, Fault
from outside_faults import OUTSIDE

FAULTS: tuple[Fault, ...] = (*MATRIX, *OUTSIDE, *CLIENTS)
