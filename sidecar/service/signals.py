"""Handles SIGINT and SIGTERM: stop the sidecar, and with SIGINT its engine too."""

import signal
import socket
import threading

from sidecar.service.mailbox import Mailbox

_ENDS = (signal.SIGINT, signal.SIGTERM)


def stop_on(requests: Mailbox) -> None:
    """Makes signals request a graceful shutdown; repeated ones change nothing.

    A thread sets the events: a handler interrupts the main thread, which may hold the lock that setting one takes.
    """
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    signal.set_wakeup_fd(sender.detach(), warn_on_full_buffer=False)
    for number in _ENDS:
        signal.signal(number, lambda _number, _frame: None)
    threading.Thread(target=_listen, args=(receiver, requests), name="sloguard-signals", daemon=True).start()


def _listen(receiver: socket.socket, requests: Mailbox) -> None:
    while number := receiver.recv(1):
        if number[0] == signal.SIGINT:
            requests.stop_engine.set()
        if number[0] in _ENDS:
            requests.stop_sidecar.set()
