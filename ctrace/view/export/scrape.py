"""The HTTP side of ``ctrace metrics``: it serves a text made elsewhere, and nothing else.

A scraper that hangs, or sends and reads a byte at a time, holds one of a few
connections until its time is up; it never reaches the thread that captures.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from ctrace.errors import CtraceError, UsageError

CONNECTIONS = 8
TIMEOUT = 5.0
"""Seconds without a byte."""
LIFETIME = 10.0
"""Seconds in all."""


class _Handler(BaseHTTPRequestHandler):
    server: Scrapes
    timeout = TIMEOUT

    def do_GET(self) -> None:
        if self.path.split("?", 1)[0] != "/metrics":
            self.send_error(404, "only /metrics is served")
            return
        body = self.server.text
        self.send_response(200 if body else 503)
        self.send_header("Content-Type", self.server.content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: a scrape every few seconds is not news."""


class Scrapes(ThreadingHTTPServer):
    """Serves ``text`` at ``/metrics`` until closed. Raises CtraceError when it can't listen."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = CONNECTIONS
    lifetime = LIFETIME

    def __init__(self, address: tuple[str, int], content_type: str) -> None:
        self.text = b""
        self.content_type = content_type
        self._room = threading.BoundedSemaphore(CONNECTIONS)
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        try:
            super().__init__(address, _Handler)
        except OSError as error:
            raise CtraceError(
                f"cannot listen on {address[0]} port {address[1]} ({error.strerror}): "
                "choose another with --listen"
            ) from None
        self._thread = threading.Thread(target=self.serve_forever, daemon=True)
        self._thread.start()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Refuse a connection beyond the limit instead of starting a thread for it."""
        if not self._room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._room.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer one connection, then give its place back."""
        end = threading.Timer(self.lifetime, _cut, (request,))
        end.daemon = True
        end.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            end.cancel()
            self._room.release()

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
        raise UsageError(f"{text!r} is no address to listen on: give HOST:PORT like 127.0.0.1:9632")
    return host, int(port)
