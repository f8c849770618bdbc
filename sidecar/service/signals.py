"""What SIGINT and SIGTERM ask of a sidecar."""

import signal
import socket
import threading

from sidecar.service.mailbox import Mailbox

_ENDS = (signal.SIGINT, signal.SIGTERM)


def heard_by(requests: Mailbox) -> None:
    """From now on the first signal asks the loop to end, once it is safe; another one changes nothing.

    A thread asks: a handler runs in the midst of the main thread, which may hold the very lock that asking takes.
    """
    hears, tells = socket.socketpair()
    tells.setblocking(False)
    signal.set_wakeup_fd(tells.detach(), warn_on_full_buffer=False)
    for number in _ENDS:
        signal.signal(number, lambda _number, _frame: None)
    threading.Thread(target=_listen, args=(hears, requests), name="sloguard-signals", daemon=True).start()


def _listen(hears: socket.socket, requests: Mailbox) -> None:
    while number := hears.recv(1):
        if number[0] == signal.SIGINT:
            requests.stop_engine.set()
        if number[0] in _ENDS:
            requests.stop_sidecar.set()
