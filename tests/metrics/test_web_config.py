"""TLS and basic authentication, with curl's and openssl's own idea of them."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import threading
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

import pytest

from ctrace.errors import CtraceError, UsageError
from ctrace.view.export import web_config
from ctrace.view.export.scrape import CONNECTIONS, Scrapes
from ctrace.view.export.web_config import WebConfig, read_web_config

HASH = "$2b$05$CCCCCCCCCCCCCCCCCCCCC.E5YPO9kmyuRGyh0XouQYb4YMJKvyOeW"
"""Of ``U*U``: a test vector of bcrypt's own."""
TEXT = b"# EOF\n"


def config(folder: Path, text: str) -> WebConfig:
    path = folder / "web.yml"
    path.write_text(text)
    return read_web_config(str(path))


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    if not shutil.which("openssl"):
        pytest.skip("needs openssl")
    for name in ("server", "client"):
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
             "-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext",
             "subjectAltName=IP:127.0.0.1", "-keyout", f"{name}.key", "-out", f"{name}.crt"],
            cwd=tmp_path, check=True, capture_output=True,
        )  # fmt: skip
    return tmp_path


@pytest.fixture
def made() -> Iterator[list[Scrapes]]:
    servers: list[Scrapes] = []
    yield servers
    for server in servers:
        server.close()


def serve(made: list[Scrapes], how: WebConfig) -> int:
    made.append(Scrapes(("127.0.0.1", 0), "text/plain", how))
    made[-1].text = TEXT
    return int(made[-1].server_address[1])


def get(url: str, context: ssl.SSLContext | None = None, user: str = "") -> tuple[int, bytes]:
    request = urllib.request.Request(url)
    if user:
        request.add_header("Authorization", "Basic " + b64encode(user.encode()).decode())
    try:
        with urllib.request.urlopen(request, timeout=30, context=context) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


USERS = f"""
# who may scrape
basic_auth_users:
  prometheus: {HASH}
  'other one': "{HASH.replace("$2b", "$2y")}"   # htpasswd's prefix
"""


@pytest.mark.parametrize(
    ("user", "status"),
    [
        ("prometheus:U*U", 200), ("other one:U*U", 200), ("prometheus:U*V", 401),
        ("nobody:U*U", 401), ("prometheus", 401), ("prometheus:", 401), ("", 401),
        ("prometheus:U*U\0", 401), (":", 401),
    ],
)  # fmt: skip
def test_only_users_with_their_password_get_an_answer(
    tmp_path: Path, made: list[Scrapes], user: str, status: int
) -> None:
    port = serve(made, config(tmp_path, USERS))
    for path in ("/metrics", "/"):
        for _ in range(2):  # the second answer is remembered
            got, body = get(f"http://127.0.0.1:{port}{path}", user=user)
            assert got == status
            assert (TEXT in body) == (status == 200 and path == "/metrics")


def test_who_is_known_is_answered_while_others_guess(
    tmp_path: Path, made: list[Scrapes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither do they hold the places, nor does anyone wait behind their passwords."""
    how = config(tmp_path, USERS)
    port = serve(made, how)
    url, over = f"http://127.0.0.1:{port}/metrics", threading.Event()
    assert get(url, user="prometheus:U*U")[0] == 200
    for guess in range(2 * web_config.REMEMBERED):
        how._wrong[b"%d" % guess] = None
    monkeypatch.setattr(web_config, "_matches", lambda *_: over.wait(60) and False)
    made[-1].asking = made[-1].lifetime = 3600.0  # nobody goes because of time
    guessing = [socket.create_connection(("127.0.0.1", port)) for _ in range(3 * CONNECTIONS)]
    try:
        for number, one in enumerate(guessing):
            user = b64encode(b"prometheus:%d" % number)
            one.sendall(b"GET /metrics HTTP/1.0\r\nAuthorization: Basic " + user + b"\r\n\r\n")
        for _ in range(3):
            assert get(url, user="prometheus:U*U") == (200, TEXT)
    finally:
        over.set()
        for one in guessing:
            one.close()


@pytest.mark.parametrize("header", ["Bearer x", "Basic", "Basic !!!", "Basic ///w", "basic Og=="])
def test_broken_headers_are_refused(tmp_path: Path, header: str) -> None:
    assert not config(tmp_path, USERS).allows(header)


def test_a_library_that_knows_no_bcrypt_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old glibc's answers NULL to bcrypt's settings: then nobody could ever log in."""
    monkeypatch.setattr(web_config, "PROBE", (b"U*U", b"$2b$05$" + b"C" * 53))
    web_config._bcrypt.cache_clear()
    try:
        with pytest.raises(UsageError, match="libcrypt with bcrypt"):
            config(tmp_path, USERS)
        monkeypatch.undo()
        monkeypatch.setattr(web_config, "LIBRARIES", ("libno.so.9", "libc.so.6"))
        with pytest.raises(UsageError, match="libcrypt with bcrypt"):
            config(tmp_path, USERS)
    finally:
        web_config._bcrypt.cache_clear()


def test_tls_for_those_who_know_the_certificate(keys: Path, made: list[Scrapes]) -> None:
    how = config(keys, "tls_server_config:\n  cert_file: server.crt\n  key_file: server.key\n")
    port = serve(made, how)
    url = f"https://127.0.0.1:{port}/metrics"
    assert get(url, ssl.create_default_context(cafile=str(keys / "server.crt"))) == (200, TEXT)
    with pytest.raises(urllib.error.URLError, match=r"certificate|CERTIFICATE"):
        get(url, ssl.create_default_context())
    old = ssl.create_default_context(cafile=str(keys / "server.crt"))
    old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    with pytest.raises((urllib.error.URLError, OSError)):
        get(url, old)
    with pytest.raises((urllib.error.URLError, OSError)):
        get(url.replace("https", "http"))  # in the clear: nothing


def test_tls_with_certificates_of_clients(keys: Path, made: list[Scrapes]) -> None:
    how = config(
        keys,
        "tls_server_config:\n  cert_file: server.crt\n  key_file: server.key\n"
        "  client_ca_file: client.crt\n  client_auth_type: RequireAndVerifyClientCert\n" + USERS,
    )
    url = f"https://127.0.0.1:{serve(made, how)}/metrics"
    known = ssl.create_default_context(cafile=str(keys / "server.crt"))
    with pytest.raises((urllib.error.URLError, OSError)):
        get(url, known, "prometheus:U*U")
    known.load_cert_chain(keys / "client.crt", keys / "client.key")
    assert get(url, known, "prometheus:U*U") == (200, TEXT)
    assert get(url, known)[0] == 401


def test_a_handshake_that_does_not_come_keeps_nobody_away(
    keys: Path, made: list[Scrapes], monkeypatch: pytest.MonkeyPatch
) -> None:
    how = config(keys, "tls_server_config:\n  cert_file: server.crt\n  key_file: server.key\n")
    port = serve(made, how)
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
    try:
        silent[0].sendall(b"\x16\x03\x01")
        known = ssl.create_default_context(cafile=str(keys / "server.crt"))
        assert get(f"https://127.0.0.1:{port}/metrics", known) == (200, TEXT)
        deadline = time.monotonic() + 60
        for one in silent:
            one.settimeout(max(0.1, deadline - time.monotonic()))
            try:
                while one.recv(4096):
                    pass
            except ConnectionResetError:
                pass
    finally:
        for one in silent:
            one.close()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("tls_server_config:\n  cert_file: x\n", "key_file"),
        ("tls_server_config:\n  cert_file: x\n  key_file: y\n", "cannot use x and y"),
        ("tls_server_config:\n  cipher_suites: z\n", "cipher_suites"),
        ("http_server_config:\n  http2: false\n", "http_server_config"),
        ("basic_auth_users:\n  me: secret\n", "bcrypt"),
        ("basic_auth_users: {me: secret}\n", "own lines"),
        ("  me: secret\n", "belongs to nothing"),
        ("basic_auth_users:\n- me\n", "line 2"),
        (f"basic_auth_users:\n  me: {HASH}\n  me: {HASH}\n", "twice"),
        ("basic_auth_users:\n  'me: x\n", "line 2"),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        config(tmp_path, text)


def test_no_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CtraceError, match=r"cannot read .*: No such file") as raised:
        read_web_config(str(tmp_path / "none"))
    assert raised.value.exit_code == 1  # as every file that is missing
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\0")
    with pytest.raises(UsageError, match="not text"):
        read_web_config(str(tmp_path / "bytes"))
