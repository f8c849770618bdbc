"""Which controller has the agent, and until when. Pure: the time is passed in, in monotonic seconds.

A controller is a journal and its epoch, which grows with each sidecar that takes the journal's state folder over. The
higher epoch of the same journal takes over at once; a controller of another journal has to wait for the lease to end.
"""

from dataclasses import dataclass

LONGEST_LEASE_S = 300.0


@dataclass(frozen=True)
class ControllerId:
    """A sidecar."""

    journal_id: str
    epoch: int


class FencedError(RuntimeError):
    """Another controller has the agent; ``epoch`` is its epoch if it has the same journal, else 0."""

    def __init__(self, text: str, epoch: int = 0) -> None:
        super().__init__(text)
        self.epoch = epoch


class LeaseExpiredError(RuntimeError):
    """The controller has to acquire the lease again."""


class Lease:
    """The lease of one agent; not thread-safe."""

    def __init__(self, holder: ControllerId | None = None, until: float = 0.0) -> None:
        self.holder = holder
        self.until = until

    def acquire(self, controller: ControllerId, seconds: float, now: float) -> bool:
        """Gives or renews the lease; returns whether it was taken over from another controller. Raises FencedError."""
        self._check_not_fenced(controller, now)
        taken_over = self.holder is not None and self.holder != controller
        self.holder, self.until = controller, now + min(seconds, LONGEST_LEASE_S)
        return taken_over

    def check(self, controller: ControllerId, now: float) -> None:
        """Raises FencedError or LeaseExpiredError unless ``controller`` holds the lease."""
        self._check_not_fenced(controller, now)
        if self.holder != controller or now >= self.until:
            raise LeaseExpiredError("the lease has expired, or was never acquired")

    def release(self, controller: ControllerId) -> None:
        """Ends the lease if ``controller`` holds it."""
        if self.holder == controller:
            self.until = 0.0

    def held(self, now: float) -> bool:
        """Whether a controller holds it."""
        return self.left_s(now) > 0

    def left_s(self, now: float) -> float:
        """Seconds left; 0 if it has expired."""
        return max(self.until - now, 0.0) if self.holder is not None else 0.0

    def _check_not_fenced(self, controller: ControllerId, now: float) -> None:
        holder = self.holder
        if holder is None:
            return
        if controller.journal_id == holder.journal_id:
            if controller.epoch < holder.epoch:
                raise FencedError(
                    f"another sidecar has taken over (epoch {holder.epoch}, this one has {controller.epoch})",
                    holder.epoch,
                )
        elif self.held(now):
            left_s = self.left_s(now)
            raise FencedError(f"the sidecar of another state folder has the agent, for {left_s:.0f} s at least")
