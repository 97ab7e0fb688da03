"""The server that Prometheus asks: where it listens, and whom it keeps waiting."""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from kit.running.scrapes import snapshot, values

from ctrace.errors import CtraceError, UsageError
from ctrace.view.export.openmetrics import CONTENT_TYPE_LATEST, Exposition
from ctrace.view.export.scrape import CONNECTIONS, Scrapes, parse_listen


@pytest.mark.parametrize("text", ["", "9632", "host:", "host:x", "host:70000", "host:-1"])
def test_a_wrong_address_is_named(text: str) -> None:
    with pytest.raises(UsageError, match="HOST:PORT"):
        parse_listen(text)


def test_listening_defaults_to_loopback() -> None:
    assert parse_listen(":9632") == ("127.0.0.1", 9632)
    assert parse_listen("[::1]:1") == ("::1", 1)


@pytest.fixture
def served() -> Iterator[Scrapes]:
    server = Scrapes(("127.0.0.1", 0), CONTENT_TYPE_LATEST)
    yield server
    server.close()


def fetch(server: Scrapes, path: str = "/metrics") -> bytes:
    port = server.server_address[1]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=60) as answer:
        body: bytes = answer.read()
    return body


def test_a_port_in_use_is_one_clear_line(served: Scrapes) -> None:
    with pytest.raises(CtraceError, match="--listen"):
        Scrapes(("127.0.0.1", served.server_address[1]), CONTENT_TYPE_LATEST)


@pytest.mark.parametrize("host", ["no..host", "a" * 70])
def test_a_host_that_is_none_is_one_clear_line(host: str) -> None:
    with pytest.raises(CtraceError, match="cannot listen on"):
        Scrapes((host, 0), CONTENT_TYPE_LATEST)


def test_no_name_is_looked_up_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full table refuses look-ups, and each takes many seconds then."""
    monkeypatch.setattr(socket, "getfqdn", lambda *_: pytest.fail("asked for a name"))
    Scrapes(("0.0.0.0", 0), CONTENT_TYPE_LATEST).close()


def test_hanging_scrapers_are_bounded_and_time_out(served: Scrapes) -> None:
    served.text = Exposition().text(snapshot(1000))
    hung = [socket.create_connection(served.server_address[:2]) for _ in range(3 * CONNECTIONS)]  # type: ignore[arg-type]
    try:
        # Some make room for those after them; the rest go when their time is up.
        for connection in hung:
            connection.settimeout(60)
            assert connection.recv(1) == b""
        assert values(fetch(served))
    finally:
        for connection in hung:
            connection.close()


def test_a_scrape_is_answered_while_all_places_are_held_by_the_silent(served: Scrapes) -> None:
    served.text = Exposition().text(snapshot())
    served.asking = served.lifetime = 3600.0  # nobody goes because of time
    address = ("127.0.0.1", served.server_address[1])
    hung = [socket.create_connection(address) for _ in range(3 * CONNECTIONS)]
    try:
        for i, connection in enumerate(hung):
            if i % 2:
                connection.send(b"GET /metr")  # half a request counts as none
        for _ in range(3):
            assert values(fetch(served))
        newest = hung[-1]
        newest.settimeout(0.0)
        with pytest.raises(BlockingIOError):  # still open: the oldest went first
            newest.recv(1)
        hung[0].settimeout(60)
        with contextlib.suppress(ConnectionResetError):
            assert hung[0].recv(1) == b""
    finally:
        for connection in hung:
            connection.close()


def test_whoever_has_asked_keeps_the_place(served: Scrapes) -> None:
    served.text = b"x" * (32 << 20)  # more than the kernel takes from us unread
    served.asking = served.lifetime = 3600.0
    address = ("127.0.0.1", served.server_address[1])
    readers = [socket.create_connection(address) for _ in range(CONNECTIONS)]
    try:
        for reader in readers:
            reader.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            reader.settimeout(60)
            assert reader.recv(1)
        with socket.create_connection(address) as late:
            late.settimeout(60)
            with contextlib.suppress(ConnectionResetError):
                assert late.recv(1) == b""
        body = b""
        while part := readers[0].recv(1 << 20):
            body += part
        assert body.endswith(served.text)
    finally:
        for reader in readers:
            reader.close()


@pytest.mark.parametrize("path", ["/metrics", "/", "/other"])
def test_head_is_get_without_the_body_and_no_version_is_told(served: Scrapes, path: str) -> None:
    served.text = Exposition().text(snapshot())
    told = []
    for method in ("GET", "HEAD"):
        client = http.client.HTTPConnection("127.0.0.1", served.server_address[1], timeout=30)
        client.request(method, path)
        answer = client.getresponse()
        body = answer.read()
        assert bool(body) == (method == "GET")
        headers = {name: value for name, value in answer.getheaders() if name != "Date"}
        assert headers["Server"] == "ctrace"
        told.append((answer.status, headers))
        client.close()
    assert told[0] == told[1]
    assert told[0][0] == (404 if path == "/other" else 200)


def test_the_first_page_leads_to_the_metrics(served: Scrapes) -> None:
    links = re.findall(rb'href="([^"]+)"', fetch(served, "/"))
    served.text = Exposition().text(snapshot())
    assert [values(fetch(served, link.decode())) for link in links] == [values(served.text)]


def test_a_scraper_that_sends_a_byte_at_a_time_is_cut_off(served: Scrapes) -> None:
    served.text = Exposition().text(snapshot(1000))
    served.lifetime = 1.0
    with socket.create_connection(("127.0.0.1", served.server_address[1])) as slow:
        slow.settimeout(0.1)
        ended = False
        for byte in b"GET /metrics HTTP/1.0\r\n" + b"X: y\r\n" * 1000:
            try:
                slow.send(bytes([byte]))
                ended = slow.recv(1) == b""
            except TimeoutError:
                continue
            except OSError:
                ended = True
            if ended:
                break
        assert ended
    assert values(fetch(served))
