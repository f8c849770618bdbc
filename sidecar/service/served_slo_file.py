"""Writes whether users' requests meet the SLO, for `sloguard status`."""

import time
from contextlib import suppress

from sidecar.config.schema import Config
from sidecar.observe.served_slo import SERVED_SLO, SERVED_SLO_FILE, ServedSlo
from sidecar.observe.slo_compliance import compliance_report
from sidecar.observe.telemetry import TelemetryHub
from sidecar.record.atomic_write import write_whole
from sidecar.service.mailbox import Mailbox

_OVER_S = 900.0
_EVERY_S = 30.0


class ServedSloFile:
    """The file in the state folder; it concerns the engine that is serving now."""

    def __init__(self, config: Config, hub: TelemetryHub, requests: Mailbox) -> None:
        self._config = config
        self._hub = hub
        self._requests = requests
        self._written_at = -_EVERY_S

    def update(self) -> None:
        """Writes it if it is due. A full disk is reported by the journal, and must not end supervision."""
        now = time.monotonic()
        if now - self._written_at < _EVERY_S:
            return
        self._written_at = now
        config = self._config
        report = compliance_report(
            self._hub.traffic(self._requests.engine_id),
            now,
            config.slo,
            over_s=_OVER_S,
            min_requests=config.promotion.probation.min_requests,
        )
        with suppress(OSError):
            text = SERVED_SLO.dump_json(ServedSlo(time.time(), report)).decode()
            write_whole(config.state / SERVED_SLO_FILE, text, 0o600)
