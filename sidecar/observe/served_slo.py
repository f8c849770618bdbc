"""Whether users' requests to the current configuration meet the SLO, as `sloguard serve` reports it for others."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from sidecar.observe.slo_compliance import ComplianceReport

# In the state folder.
SERVED_SLO_FILE = "served_slo.json"


@dataclass(frozen=True)
class ServedSlo:
    """The compliance at ``at``, seconds since the epoch."""

    at: float
    report: ComplianceReport


SERVED_SLO: TypeAdapter[ServedSlo] = TypeAdapter(ServedSlo)


def read_served_slo(state: Path, now: float, within_s: float) -> ServedSlo | None:
    """The last report; None without one, or if it is older than ``within_s``."""
    try:
        served = SERVED_SLO.validate_json((state / SERVED_SLO_FILE).read_bytes())
    except (OSError, ValidationError):
        return None
    return served if now - served.at < within_s else None
