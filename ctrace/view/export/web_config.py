"""``--web.config.file``: who may scrape, and over what, as Prometheus' own exporters take it.

Of that file's format (Prometheus' exporter-toolkit) what matters here: a certificate,
clients' certificates, and users with bcrypt hashes. Anything else is refused, so nobody takes
for protected what isn't.
"""

from __future__ import annotations

import base64
import binascii
import ctypes
import hashlib
import hmac
import re
import ssl
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final, Optional

from ctrace import files
from ctrace.errors import CtraceError, UsageError

TLS: Final = frozenset(
    {"cert_file", "key_file", "client_ca_file", "client_auth_type", "min_version"}
)
VERSIONS: Final = {"TLS12": ssl.TLSVersion.TLSv1_2, "TLS13": ssl.TLSVersion.TLSv1_3}
CLIENTS: Final = {
    "NoClientCert": ssl.CERT_NONE,
    "VerifyClientCertIfGiven": ssl.CERT_OPTIONAL,
    "RequireAndVerifyClientCert": ssl.CERT_REQUIRED,
}
NOBODY: Final = "$2b$10$abcdefghijklmnopqrstuuRTlyGTGGGnBqWQVcYKQR3ZAxUNpGz0G"
"""A hash that belongs to nobody: an unknown user costs as much time as a wrong password."""
LIBRARIES: Final = ("libcrypt.so.1", "libcrypt.so.2", None)
PROBE: Final = (b"U*U", b"$2b$05$CCCCCCCCCCCCCCCCCCCCC.E5YPO9kmyuRGyh0XouQYb4YMJKvyOeW")
"""A password and its hash: glibc's own libcrypt, of old hosts, knows no bcrypt."""
REMEMBERED: Final = 100
"""Wrong answers that are kept: bcrypt is slow on purpose, and a scrape comes every few seconds."""
PATIENCE: Final = 5.0
"""Seconds that a new password waits for its turn."""
LARGEST: Final = 1 << 20
_LINE: Final = re.compile(
    r"(?P<indent> *)(?P<key>[^\s:#'\"][^:]*|'[^']*'|\"[^\"]*\") *:(?P<rest>.*)"
)


@dataclass
class WebConfig:
    """How to serve."""

    tls: Optional[ssl.SSLContext] = None
    users: Mapping[str, str] = field(default_factory=dict)
    """Name to bcrypt hash; empty: everyone may ask."""
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _right: dict[str, bytes] = field(default_factory=dict, repr=False)
    """By user: who guesses cannot push it out."""
    _wrong: dict[bytes, None] = field(default_factory=dict, repr=False)

    def allows(self, authorization: Optional[str]) -> bool:
        """Whether a request with this ``Authorization`` header is answered."""
        if not self.users:
            return True
        kind, _, rest = (authorization or "").partition(" ")
        try:
            text = base64.b64decode(rest.strip(), validate=True).decode()
        except (binascii.Error, ValueError):
            return False
        name, colon, password = text.partition(":")
        if kind.lower() != "basic" or not colon or "\0" in password:
            return False
        asked = hashlib.sha256(text.encode()).digest()
        # whoever is known does not wait behind those who guess
        return self._right.get(name) == asked or self._checked(name, password, asked)

    def _checked(self, name: str, password: str, asked: bytes) -> bool:
        """One at a time: who guesses may have one processor, and no more."""
        if not self._lock.acquire(timeout=PATIENCE):
            return False
        try:
            if asked in self._wrong:
                return False
            right = _matches(password, self.users.get(name, NOBODY)) and name in self.users
            if right:
                self._right[name] = asked
            else:
                while len(self._wrong) >= REMEMBERED:
                    del self._wrong[next(iter(self._wrong))]
                self._wrong[asked] = None
            return right
        finally:
            self._lock.release()


def read_web_config(path: str) -> WebConfig:
    """The file's meaning. Raises UsageError; CtraceError where it cannot be read."""
    try:
        text = files.content(path, LARGEST).decode()
    except OSError as error:
        raise CtraceError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"cannot read {path}: it is not text") from None
    try:
        said = _mapping(text)
        users = said.pop("basic_auth_users", {})
        tls = said.pop("tls_server_config", {})
        for name in said:
            raise ValueError(f"{name} is not supported: tls_server_config and basic_auth_users are")
        for name, hashed in users.items():
            if not re.fullmatch(r"\$2[aby]\$\d\d\$[./A-Za-z0-9]{53}", hashed):
                raise ValueError(
                    f"the password of {name} is no bcrypt hash: make one with htpasswd"
                )
        if users:
            _bcrypt()
        return WebConfig(_context(tls, Path(path).parent) if tls else None, users)
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from None


def _mapping(text: str) -> dict[str, dict[str, str]]:
    """Two levels of ``key: value``, which is all of YAML that the file needs. Raises ValueError."""
    found: dict[str, dict[str, str]] = {}
    inside: Optional[dict[str, str]] = None
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#") or line.strip() == "---":
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"line {number} is not understood: {line.strip()[:40]!r}")
        key, value = _scalar(match["key"]), _scalar(match["rest"])
        if not match["indent"]:
            if value not in ("", "{}"):
                raise ValueError(f"line {number}: {key} needs its own lines below it")
            if key in found:
                raise ValueError(f"line {number}: {key} is there twice")
            inside = found[key] = {}
        elif inside is None:
            raise ValueError(f"line {number} belongs to nothing")
        elif key in inside:
            raise ValueError(f"line {number}: {key} is there twice")
        else:
            inside[key] = value
    return found


def _scalar(text: str) -> str:
    text = text.strip()
    if text[:1] in ("'", '"'):
        end = text.find(text[0], 1)
        rest = text[end + 1 :].strip()
        if end < 0 or (rest and not rest.startswith("#")):
            raise ValueError(f"a quote is not closed: {text[:40]!r}")
        return text[1:end]
    return re.split(r"\s#", " " + text)[0].strip()


def _context(tls: dict[str, str], folder: Path) -> ssl.SSLContext:
    """Raises ValueError."""
    for name in tls.keys() - TLS:
        raise ValueError(f"{name} of tls_server_config is not supported")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = _choice("min_version", tls.get("min_version", "TLS12"), VERSIONS)
    try:
        certificate, key = tls["cert_file"], tls["key_file"]
    except KeyError as error:
        raise ValueError(f"tls_server_config needs {error.args[0]}") from None
    try:
        context.load_cert_chain(folder / certificate, folder / key)
    except (OSError, ssl.SSLError) as error:
        raise ValueError(f"cannot use {certificate} and {key}: {error.strerror or error}") from None
    authority = tls.get("client_ca_file", "")
    if authority:
        try:
            context.load_verify_locations(folder / authority)
        except (OSError, ssl.SSLError) as error:
            raise ValueError(f"cannot use {authority}: {error.strerror or error}") from None
    kind = tls.get("client_auth_type", "NoClientCert")
    context.verify_mode = _choice("client_auth_type", kind, CLIENTS)
    if (context.verify_mode != ssl.CERT_NONE) != bool(authority):
        raise ValueError("client_ca_file and client_auth_type go together")
    return context


def _choice(name: str, value: str, choices: Mapping[str, Any]) -> Any:
    if value not in choices:
        raise ValueError(f"{name} {value!r} is not supported: {', '.join(choices)}")
    return choices[value]


class _CryptData(ctypes.Structure):
    """``struct crypt_data``: 32 KiB of libxcrypt, 128 KiB and 160 bytes of the old glibc."""

    _fields_ = (("room", ctypes.c_char * (1 << 18)),)


@cache
def _bcrypt() -> Any:
    """crypt_r(3). Raises ValueError where no C library here knows bcrypt.

    By its name: a search through the host's tools finds none that came with ctrace. The first
    is Debian's and the one file's, the second Fedora's; musl has it in the C library itself.
    """
    for library in LIBRARIES:
        try:
            crypt = ctypes.CDLL(library).crypt_r
        except (OSError, AttributeError):
            continue
        crypt.restype = ctypes.c_char_p
        crypt.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p)
        if crypt(*PROBE, ctypes.byref(_CryptData())) == PROBE[1]:
            return crypt
    raise ValueError(
        "basic_auth_users needs a libcrypt with bcrypt: install libcrypt1 or libxcrypt"
    )


def _matches(password: str, hashed: str) -> bool:
    """bcrypt's $2a$, $2b$ and $2y$ are one for passwords that are not broken UTF-8."""
    setting = "$2b" + hashed[3:]
    made = _bcrypt()(password.encode(), setting.encode(), ctypes.byref(_CryptData()))
    return made is not None and hmac.compare_digest(made, setting.encode())
