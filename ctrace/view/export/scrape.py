"""The HTTP side of ``ctrace metrics``: it serves a text made elsewhere, and nothing else.

There are a few places. A connection that has not asked yet, or with a wrong password, has
one for two seconds, and makes room for a new one when all are taken. One that reads its answer
slowly is cut off too. None of them ever reaches the thread that captures.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any, Optional

from ctrace.errors import CtraceError, UsageError
from ctrace.view.export.web_config import WebConfig

CONNECTIONS = 8
ASKING = 2.0
"""Seconds from the connection to the end of its request."""
LIFETIME = 10.0
"""Seconds in all."""
GRACE = 0.1
"""Seconds that a connection has to send its request before it must make room for a new one."""
_WAITING = 128
"""Connections that wait in the kernel for their turn."""

_PAGE = b"""<!doctype html><html lang="en"><title>ctrace</title>
<p>ctrace serves its metrics at <a href="/metrics">/metrics</a>.</p></html>
"""


class _Handler(BaseHTTPRequestHandler):
    server: Scrapes
    timeout = LIFETIME

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, body: bool) -> None:
        # who guesses passwords has no right to a place, and makes room as the silent do
        if not self.server.config.allows(self.headers.get("Authorization")):
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Basic realm="ctrace"')
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.server.asked(self.connection)
        path = self.path.split("?", 1)[0]
        if path == "/metrics":
            text, kind = self.server.text, self.server.content_type
        elif path == "/":
            text, kind = _PAGE, "text/html; charset=utf-8"
        else:
            self.send_error(404, "only /metrics is served")
            return
        self.send_response(200 if text else 503)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if body:
            self.wfile.write(text)

    def version_string(self) -> str:
        """No version: a stranger need not know it."""
        return "ctrace"

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: a scrape every few seconds is not news."""


class Scrapes(ThreadingHTTPServer):
    """Serves ``text`` at ``/metrics`` until closed. Raises CtraceError when it can't listen."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = _WAITING
    asking = ASKING
    lifetime = LIFETIME

    def __init__(
        self, address: tuple[str, int], content_type: str, config: Optional[WebConfig] = None
    ) -> None:
        self.text = b""
        self.config = config or WebConfig()
        self.content_type = content_type
        self._lock = threading.Lock()
        self._since: dict[socket.socket, float] = {}
        """Open connections, oldest first: monotonic seconds of their begin."""
        self._silent: dict[socket.socket, float] = {}
        """Those of them that have not asked yet."""
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        try:
            super().__init__(address, _Handler)
        except (OSError, UnicodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is no host's name"
            raise CtraceError(
                f"cannot listen on {address[0]} port {address[1]} ({why}): "
                "choose another with --listen"
            ) from None
        self._thread = threading.Thread(target=self.serve_forever, daemon=True)
        self._thread.start()

    def server_bind(self) -> None:
        """Without HTTPServer's look-up of the host's own name: DNS may be what is refused."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def get_request(self) -> tuple[socket.socket, Any]:
        """A new connection. Its TLS handshake comes with its first byte, in its own thread."""
        request, address = super().get_request()
        if self.config.tls is None:
            return request, address
        try:
            wrapped = self.config.tls.wrap_socket(
                request, server_side=True, do_handshake_on_connect=False
            )
        except BaseException:
            request.close()
            raise
        return wrapped, address

    def asked(self, request: socket.socket) -> None:
        """This connection has sent its whole request: it keeps its place."""
        with self._lock:
            self._silent.pop(request, None)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection, if need be in the place of the one that is silent longest."""
        if not self._admit(request):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._forget(request)
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer one connection, then give its place back."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._forget(request)

    def service_actions(self) -> None:
        """Close connections that have run out of time; called twice a second, and after each
        connection."""
        now = time.monotonic()
        with self._lock:
            late = [one for one, since in self._silent.items() if now - since > self.asking]
            late += [one for one, since in self._since.items() if now - since > self.lifetime]
        for one in late:
            _cut(one)

    def _admit(self, request: socket.socket) -> bool:
        """Take a place; False when all are held by connections that asked."""
        while True:
            with self._lock:
                now = time.monotonic()
                left: Optional[float] = 0.0
                if len(self._since) >= CONNECTIONS:
                    oldest = next(iter(self._silent), None)
                    left = None if oldest is None else self._silent[oldest] + GRACE - now
                    if oldest is not None and left is not None and left <= 0:
                        del self._silent[oldest], self._since[oldest]
                        _cut(oldest)
                if left is None:
                    return False
                if left <= 0:
                    self._since[request] = self._silent[request] = now
                    return True
            # Whoever connects faster than this waits in the kernel.
            time.sleep(min(left, 0.01))

    def _forget(self, request: socket.socket) -> None:
        with self._lock:
            self._since.pop(request, None)
            self._silent.pop(request, None)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A scraper that went away is its own business."""

    def close(self) -> None:
        """Stop listening."""
        self.shutdown()
        self.server_close()


def _cut(request: socket.socket) -> None:
    """End a connection under the hands of the thread that serves it."""
    with contextlib.suppress(OSError):
        request.shutdown(socket.SHUT_RDWR)


def parse_listen(text: str) -> tuple[str, int]:
    """``HOST:PORT``, ``[v6]:PORT`` or ``:PORT`` (loopback). Raises UsageError."""
    host, colon, port = text.rpartition(":")
    host = host.strip("[]") or "127.0.0.1"
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise UsageError(
            f"{text!r} is not an address to listen on: give HOST:PORT like 127.0.0.1:9632"
        )
    return host, int(port)
