"""Who may ask: keys, the names under which the server is reached, and pages of other origins."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Collection, Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from mllama.server.errors import RequestError, json_shown

_OPEN = ("/", "/health", "/v1/health")
_STATIC = "/static/"
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class KeyCheck:
    """Lets pass what brings one of some keys, and the routes that need none: health and the page."""

    def __init__(self, app: ASGIApp, keys: Iterable[str]) -> None:
        self._app = app
        self._digests = [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._may_pass(scope):
            error = RequestError(401, self._reason(scope), headers={"WWW-Authenticate": "Bearer"})
            await error.response()(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _may_pass(self, scope: Scope) -> bool:
        path = scope["path"]
        if not self._digests or path in _OPEN or path.startswith(_STATIC):
            return True
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        given = _digest(key.strip())
        # Every key is looked at, whole: how long it takes says nothing of them.
        found = [hmac.compare_digest(given, digest) for digest in self._digests]
        return scheme.lower() == "bearer" and any(found)

    def _reason(self, scope: Scope) -> str:
        if "authorization" not in Headers(scope=scope):
            return "no key is given; expected the header Authorization: Bearer KEY"
        return "the key is not one of this server's; expected the header Authorization: Bearer KEY"


class HostCheck:
    """Refuses requests under a name that is not the server's, as a page sends whose own name leads here.

    Args:
        names: beside those of the machine itself.
        literals: let every IP address pass: a page that has one for its name was sent by that address.
    """

    def __init__(self, app: ASGIApp, names: Collection[str], literals: bool) -> None:
        self._app = app
        self._names = {*_LOOPBACK, *(_bare(name) for name in names)}
        self._literals = literals

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            hosts = Headers(scope=scope).getlist("host")
            if len(hosts) > 1 or not all(map(self._is_ours, hosts)):
                given = json_shown(hosts[-1]) if hosts else "none"
                error = RequestError(
                    400,
                    f"the Host {given} is not this server's; start it with --allow-host NAME, or with "
                    "--api-key",
                    code="host_not_allowed",
                )
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _is_ours(self, host: str) -> bool:
        name = _bare(host)
        if name in self._names:
            return True
        try:
            return self._literals and bool(ipaddress.ip_address(name))
        except ValueError:
            return False


def is_loopback(host: str) -> bool:
    """Whether what listens there is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _bare(host: str) -> str:
    """A Host without its port and the brackets of IPv6."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdecimal() and ":" not in name else host).rstrip(".")


def _digest(key: str) -> bytes:
    """Of one length for all keys, of which comparing would tell it."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
