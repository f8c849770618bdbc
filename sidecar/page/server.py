"""Serves the page on a thread of its own, so that the service never waits for it."""

import ipaddress
import re
import socket
from collections.abc import Generator
from contextlib import contextmanager

from sidecar.config.schema import ConfigError, PageConfig
from sidecar.format import Say
from sidecar.http_server import BACKLOG, HttpApplication, HttpServer
from sidecar.page.event_stream import Feed, Sources
from sidecar.page.token import path_of, token_of
from vllm_sloguard.agent.ports import port_owner

_NAME = re.compile(r"(\*\.)?[A-Za-z0-9._-]+")


@contextmanager
def served(sources: Sources, say: Say) -> Generator[None]:
    """The page, if the configuration has it. Raises OSError for a port that is taken, ConfigError for a token."""
    config = sources.config
    if not config.page.enabled:
        yield
        return
    token = token_of(config, say) if config.page.takes_orders else None
    hosts = allowed_hosts(config.page)

    def application() -> HttpApplication:
        from sidecar.page.access_control import page_access
        from sidecar.page.app import page_application, static_files, version_of

        static = static_files()
        token_file = str(path_of(config)) if token is not None else ""
        feed = Feed(sources, say, version=version_of(static), token_file=token_file)
        app = page_access(page_application(config, feed, static), token, hosts, say)
        return HttpApplication(app, feed.run, feed.end)

    page = HttpServer("page", _listener(config.page), application, say)
    say(f"page: {page.url}/")
    page.start()
    try:
        yield
    finally:
        page.stop()


def allowed_hosts(page: PageConfig) -> list[str]:
    """The names and addresses that a request's Host header may have, against DNS rebinding. Raises ConfigError."""
    hosts = ["localhost", "127.0.0.1", "[::1]", *(_literal(host) for host in page.hosts)]
    try:
        everywhere = ipaddress.ip_address(page.host).is_unspecified
    except ValueError:
        everywhere = False
    return [*hosts, *(_own_addresses() if everywhere else [_literal(page.host)])]


def _own_addresses() -> list[str]:
    import psutil

    found = [one.address for addresses in psutil.net_if_addrs().values() for one in addresses if _ip(one.family)]
    return [_literal(address.partition("%")[0]) for address in found]


def _ip(family: int) -> bool:
    return family in (socket.AF_INET, socket.AF_INET6)


def _literal(host: str) -> str:
    """As it stands in a Host header."""
    if ":" in host:
        return f"[{host.strip('[]')}]"
    if _NAME.fullmatch(host) is None:
        raise ConfigError(f"page.hosts: {host!r}: a name such as tuner.example, *.example or an address is needed")
    return host


def _listener(where: PageConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in where.host else socket.AF_INET
    try:
        return socket.create_server((where.host, where.port), family=family, backlog=BACKLOG)
    except OSError as error:
        why = str(error.strerror).partition(" (")[0]  # then it repeats the address
        raise OSError(f"page: {where.host}:{where.port}: {why}{port_owner(where.port)}") from None
