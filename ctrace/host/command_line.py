"""A process's command line as it is stored: program and arguments, without secrets.

Only known forms of secrets are masked: a program may take a password where nothing marks it as one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Final

from ctrace.names import clean

MOST: Final = 256
"""Characters that are stored."""
_SPACES: Final = re.compile(r"(?![ -~])[^\S\x00-\x1f]")
"""Spaces that are not the common one, such as the no-break space: nobody sees the difference."""
READ: Final = 4096
"""Bytes that are read: masking comes before cutting, so that a cut hides no mark."""
MASK: Final = "***"

_WORD = (
    r"(?:pass(?:w(?:or[dt]|d)|phrase|code)?|pwd|secret|token|key|credential|auth|cookie|bearer|private"
    r"|signature|session|jwt|community|licen[cs]e|kennwort|contrase|wachtwoord|l[oö]senord|парол"
    r"|(?<![a-z])(?:pw|pin|otp|salt|sig|sas|psk|creds?|login|senha|clave|parola|heslo|has[lł]o)(?![a-z]))"
)
# Bounded repeats: a hostile command line costs no more than an ordinary one.
_NAMED = re.compile(rf"({_WORD}[\w.-]{{0,64}}[\"'\])]{{0,4}}[\s=:,>]{{1,8}})\S.*", re.I | re.S)
_BARE = re.compile(rf"^-{{0,2}}[\w.-]{{0,64}}{_WORD}[s:=]?$", re.I)
_BARE_OPTION = re.compile(rf"^-{{1,2}}[\w.-]{{0,64}}{_WORD}[\w.-]{{0,64}}[:=]?$", re.I)
_VERB = re.compile(r"passwd|secret|auth|login", re.I)
"""Words after which a program may take a password in any of its arguments."""
_SHORT = re.compile(r"((?:^|\s)-p)(?!\s*-)\s*\S.*", re.S)
_LATER = re.compile(r"(\s-[Pw]\s+)\S.*", re.S)
_BASIC = re.compile(r"(\bBasic\s+)[\w+/=-]{4,}")
_PIPED = re.compile(r"(\b(?:echo|printf)\s)[^|]{1,1024}(?=\|)")
_URL = re.compile(r"://\S{1,1024}@")
_LOGIN = re.compile(r"([^\s:/@=]{1,64})([:/%])(?!//)\S{1,1024}@")
_USER = re.compile(r"(?:-[a-zA-Z]{0,3}[uU]|--user|--proxy-user|--cert|--proxy-cert)=?")
_USER_IN_TEXT = re.compile(
    r"(\s(?:-[a-zA-Z]{0,3}[uU]|--user)[=\s]{0,8}[^\s:%,]{1,64}[:%,])\S.*", re.S
)
_OF_USER = re.compile(r"[:%,].*", re.S)
_LETTERS: Final = {"-p", "-P", "-w", "-ap", "-xp"}
"""Options that take a password in so many programs that their values are masked in all."""
_OF_PROGRAM: Final = (
    (re.compile(r"redis-"), "a"),
    (re.compile(r"ldap"), "wsay"),
    (re.compile(r"snmp"), "cAXk"),
    (re.compile(r"openssl|ccrypt"), "kKS"),
    (re.compile(r"curl"), "bEH"),
    (re.compile(r"(?:https?|xhs?|ab)$"), "aA"),
    (re.compile(r"ssh-keygen"), "NP"),
    (re.compile(r"sqlcmd|bcp|isql|tsql|mosquitto_|u?n?zip"), "P"),
    (re.compile(r"ipmitool"), "Pk"),
    (re.compile(r"x?freerdp|rdesktop"), "p"),
    (re.compile(r"(?:un)?rar$"), "hp"),
    (re.compile(r"nxc|netexec|crackmapexec|evil-winrm"), "pH"),
    (re.compile(r"doctl|zerotier-|k3s|rke2|frpc|frps"), "tT"),
    (re.compile(r"gitlab-runner"), "rt"),
    (re.compile(r"ss-|sslocal|ssserver|shadowsocks|l2tpd"), "k"),
)
"""Letters of options that take a password or its like, also without a space, by how the program's
name begins."""
_POSITIONAL: Final = re.compile(
    r"htpasswd|wpa_passphrase|rabbitmqctl|vault|mc|sqlplus|sqlldr|rman|(?:imp|exp)(?:dp)?|isql|net|chpasswd|mkpasswd|expect|lftp|secret-tool|pass|op|radtest|samba-tool|setkey|db2"
)
"""Programs that take a password where nothing marks it: of their arguments none is kept."""
_RUNS: Final = re.compile(
    r"[a-z]{0,4}sh|su|sudo|doas|runuser|env|nice|nohup|setsid|stdbuf|timeout|time|watch|xargs|script"
    r"|flock|chroot|unshare|nsenter|ip|systemd-run|docker|podman|nerdctl|crictl|kubectl|oc|lxc|busybox"
    r"|screen|tmux|strace|entr|parallel|tini|dumb-init"
)
"""Programs that run another one, which is among their arguments or in a line of theirs."""
_HERE: Final = re.compile(r"(<<<?-?)\s*\S.*", re.S)
_CODE: Final = re.compile(
    r"(?:python|perl|ruby|node|php|lua|expect|tclsh|osascript|pwsh|mysql|mariadb|psql|cqlsh|sqlite"
    r"|clickhouse-client|mongosh?)[\d.]*",
    re.I,
)
_GIVES_CODE: Final = re.compile(r"-[a-zA-Z]{0,4}[ceErp]|--(?:eval|print|execute|command|query|run)")
"""Options of those that are followed by code."""
_STRING = re.compile(r"(['\"`])(?:(?!\1).)+\1", re.S)
_TOKEN = re.compile(
    r"(?<![A-Za-z0-9])(?:gh[a-z]_|github_pat_|gl[a-z]{2,6}-|xox[a-z]-|sk[-_]|rk[-_]|pk[-_]|hv[a-z]\.|npm_"
    r"|pypi-|dop_v1_|AIza|ya29\.|SG\.|eyJ|A[KS]IA|bot\d{5,16}:"
    r"|hooks\.[\w.-]{1,64}/)[\w./+=-]{8,}"
)
"""Tokens that say themselves what they are."""
_LOT = re.compile(r"(?=[^\s]{0,200}\d)(?=[^\s]{0,200}[a-z])(?=[^\s]{0,200}[A-Z])")
_RUN = re.compile(
    r"[A-Za-z0-9_+=-]{20,}|(?<![A-Za-z0-9_+/=.-])[A-Za-z0-9+][A-Za-z0-9+/]{38,}={0,2}"
    r"|0x[0-9a-fA-F]{32,}"
)
"""Long enough for a key by lot; it is one where it has digits, small and capital letters."""


def masked(arguments: Sequence[str]) -> str:
    """The arguments on one line of at most :data:`MOST` characters, harmless to show.

    ``***`` stands for the value of an option or variable whose name holds a word such as
    password, secret, token, key or credential (``--token X``, ``DB_PASS=X``, ``"Cookie: X"``),
    for what follows ``-p``, ``-P`` or ``-w``, for the login in ``scheme://login@host``, for the
    password in ``user:password@host`` and ``-u user:password``, for strings in code that is
    given as an argument, for what looks like a key made by lot, and for what programs such as
    ``htpasswd`` and ``vault`` are given.
    """
    names = [one.rpartition("/")[2] for one in arguments] or [""]
    program, runs = names[0], bool(_RUNS.fullmatch(names[0]))
    names = names if runs else names[:1]
    letters = {letter for name, of in _OF_PROGRAM if any(map(name.match, names)) for letter in of}
    taking = _LETTERS | {f"-{letter}" for letter in letters}
    named = next((n for n, one in enumerate(names) if _POSITIONAL.fullmatch(one)), len(arguments))
    if named + 1 < len(arguments):
        arguments = [*arguments[: named + 1], MASK]
    kept: list[str] = []
    before = ""
    for argument in arguments:
        if before and re.fullmatch(
            r"[=:]+", argument
        ):  # ``password = X``: what was meant comes later
            kept.append(argument)
            continue
        if before and not before.startswith("-") and _VERB.fullmatch(before):
            kept.append(MASK)
            break
        if before and (before in taking or _BARE.match(before) or _BARE_OPTION.match(before)):
            kept.append(MASK)
            before = ""
            continue
        if _CODE.match(program) and (_GIVES_CODE.fullmatch(before) or " " in argument):
            kept.append(_without_keys(_STRING.sub(MASK, _argument(argument, before))))
        elif runs and re.search(r"\s", argument):
            kept.append(_without_keys(_argument(_line(argument), before)))
        elif len(argument) > 2 and argument[0] in "-/" and argument[1] in letters:
            kept.append(argument[:2] + MASK)
        else:
            kept.append(_without_keys(_argument(argument, before)))
        before = argument.strip("\"'") if len(kept) > 1 else ""
    return clean(_SPACES.sub(" ", " ".join(kept)))[:MOST]


def _without_keys(text: str) -> str:
    """Without what looks like a key by lot, wherever it stands."""
    text = _TOKEN.sub(MASK, text)
    return _RUN.sub(lambda run: MASK if _LOT.match(run[0]) else run[0], text)


def split(raw: bytes) -> list[str]:
    """The arguments in the first :data:`READ` bytes of /proc/PID/cmdline.

    Of an argument that goes on beyond them only what comes before a colon is kept: the
    ``@`` that tells a login may be what is missing.
    """
    cut = len(raw) >= READ
    arguments = raw.rstrip(b"\0").decode(errors="replace").split("\0")
    if cut and arguments:
        arguments[-1] = arguments[-1].partition(":")[0]
    return arguments


@cache
def _in_lines() -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Those programs in a line for a shell: up to such an option, up to the first argument."""
    begin = r"(?:^|[\s;|&(/'\"`])"
    options = "|".join(
        rf"(?:{name.pattern.replace('$', '(?=[ ])')})\S{{0,64}}\s(?:[^;|&]{{0,256}}\s)??-[{of}]"
        for name, of in _OF_PROGRAM
    )
    taking = re.compile(rf"({begin}(?:{options})\s*)\S.*", re.S)
    return taking, re.compile(rf"({begin}(?:{_POSITIONAL.pattern})\s+)\S.*", re.S)


def _line(text: str) -> str:
    """A line for a shell without what the programs in it are given."""
    for form in (*_in_lines(), _HERE):
        text = form.sub(rf"\g<1>{MASK}", text)
    return text


def _argument(text: str, before: str) -> str:
    user = _USER.match(text)
    if user and len(text) > user.end():
        text = text[: user.end()] + _OF_USER.sub(":" + MASK, text[user.end() :])
    elif _USER.fullmatch(before):
        text = _OF_USER.sub(":" + MASK, text)
    text = _NAMED.sub(rf"\g<1>{MASK}", text)
    text = _SHORT.sub(rf"\g<1>{MASK}", text)
    text = _LATER.sub(rf"\g<1>{MASK}", text)
    for form in (_USER_IN_TEXT, _BASIC, _PIPED):
        text = form.sub(rf"\g<1>{MASK}", text)
    if "@" in text:
        text = _LOGIN.sub(rf"\g<1>\g<2>{MASK}@", _URL.sub(f"://{MASK}@", text))
    return text
