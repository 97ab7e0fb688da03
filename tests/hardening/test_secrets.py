"""Command lines are kept without what looks like a secret."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ctrace.host import command_line, process

SECRET = "hunter2"
FORMS = (
    ["app", "--db-password=hunter2secret"],
    ["app", "--password", "hunter2"],
    ["app", "--password", "-hunter2"],
    ["app", "--token", "hunter2", "x"],
    ["app", "--secret=a b hunter2"],
    ["app", "-Dapi.key=hunter2"],
    ["app", "--apiKey=hunter2"],
    ["app", "--client_credential:hunter2"],
    ["/usr/bin/mysql", "-u", "root", "-phunter2"],
    ["sshpass", "-p", "hunter2", "ssh", "host"],
    ["redis-cli", "-a", "hunter2"],
    ["redis-cli", "config", "set", "requirepass", "hunter2"],
    ["curl", "-u", "me:hunter2", "http://host/"],
    ["curl", "-ume:hunter2", "http://host/"],
    ["curl", "--user=me:hunter2", "http://host/"],
    ["curl", "-H", "Authorization: Bearer hunter2"],
    ["curl", "-H", "Cookie: a=hunter2"],
    ["git", "clone", "https://hunter2@host/x"],
    ["psql", "postgres://me:hunter2/x@host/db"],
    ["app", "me:hunter2@tcp(host:3306)/db"],
    ["env", "PGPASSWORD=hunter2", "psql"],
    ["sh", "-c", "PGPASSWORD=hunter2 psql"],
    ["sh", "-c", "mysql -u root -phunter2"],
    ["sh", "-c", "app --password hunter2"],
    ["app", '{"password": "hunter2"}'],
    ["app --password hunter2"],
    ["app", "https://host/?token=hunter2"],
    ["app", "https://host/?X-Amz-Signature=hunter2"],
    ["mosquitto_pub", "-P", "hunter2"],
    ["/usr/bin/sqlcmd", "-Phunter2"],
    ["ldapadd", "-w", "hunter2"],
    ["ldapsearch", "-whunter2"],
    ["snmpwalk", "-v2c", "-c", "hunter2", "host"],
    ["xfreerdp", "/u:me", "/p:hunter2"],
    ["smbclient", "//host/x", "-U", "me%hunter2"],
    ["lftp", "-u", "me,hunter2", "host"],
    ["curl", "-su", "me:hunter2", "http://host/"],
    ["sh", "-c", "curl -u me:hunter2 host"],
    ["sh", "-c", "ldapsearch -x -w hunter2"],
    ["nmcli", "dev", "wifi", "connect", "x", "password", "hunter2"],
    ["app", "--login", "me:hunter2"],
    ["htpasswd", "-b", "file", "me", "hunter2"],
    ["vault", "login", "hunter2"],
    ["sqlplus", "me/hunter2@db"],
    ["python3", "-c", "connect('hunter2')"],
    ["python3.11", "-Ic", "connect('hunter2')"],
    ["php", "-r", '$p="hunter2";'],
    ["node", "--eval", "connect('hunter2')"],
    ["mysql", "-e", "ALTER USER x IDENTIFIED BY 'hunter2'"],
    ["app", "password", "=", "hunter2"],
    ["app", '"password"', ":", '"hunter2"'],
    ["app", "<password>hunter2</password>"],
    ["app", "Basic hunter2"],
    ["app", "--kennwort=hunter2"],
    ["app", "contraseña=hunter2"],
    ["openssl", "passwd", "-6", "-salt", "x", "hunter2"],
    ["kubectl", "create", "secret", "generic", "x", "--from-literal=a=hunter2"],
    ["sh", "-c", "echo hunter2 | sudo -S x"],
    ["curl", "--cert", "file:hunter2", "https://host/"],
    ["swaks", "-ap", "hunter2"],
    ["unrar", "x", "-hphunter2", "file"],
    ["tool", "ghp_hunter2hunter2hunter2"],
    ["tool", "hunter2Wjalr/XUtnFEMIK7MDENGbPxRfiCYEXAM"],
    ["curl", "https://hooks.slack.com/services/T0/B0/hunter2hunter2"],
    ["sudo", "redis-cli", "-a", "hunter2"],
    ["docker", "exec", "c", "redis-cli", "-ahunter2"],
    ["ssh", "host", "redis-cli -a hunter2 ping"],
    ["timeout", "5", "vault", "write", "a/b", "hunter2"],
    ["/bin/busybox", "sh", "-c", "mc alias set m http://h key hunter2"],
    ["bash", "-lc", "cd /x && exec /usr/bin/snmpwalk -v 2c -c hunter2 host"],
    ["sh", "-c", "unrar x -hphunter2 file"],
    ["sh", "-c", "cat <<END | app\nhunter2\nEND"],
    ["sqlite3", "file", "insert into t values('hunter2')"],
    ["ss-local", "-s", "host", "-k", "hunter2"],
    ["npm", "config", "set", "//registry.npmjs.org/:_authToken", "hunter2"],
    ["openssl", "dgst", "-hmac", "hunter2"],
    ["openssl", "enc", "-pass", "pass:hunter2"],
    ["ip", "xfrm", "state", "add", "proto", "esp", "enc", "aes", "hunter2"],
    ["tcpdump", "-E", "hunter2@10.0.0.1"],
    ["ipmitool", "-U", "me", "-P", "hunter2", "power", "status"],
    ["aws", "configure", "set", "aws_secret_access_key", "hunter2"],
    ["useradd", "-p", "hunter2", "me"],
    ["app", "hunter2="],
)


@pytest.mark.parametrize("arguments", FORMS, ids=" ".join)
def test_known_forms_are_masked(arguments: list[str]) -> None:
    kept = command_line.masked(arguments)
    assert SECRET not in kept
    assert kept.startswith(arguments[0].split()[0])
    assert command_line.MASK in kept


@pytest.mark.parametrize(
    "line",
    [
        "nginx: worker process",
        "python3 -u server.py --port 8080 --bind 0.0.0.0:8080 --to [fe80::1]:80 10.0.0.0/8",
        "/usr/sbin/unbound -d",
        "python3 -m http.server",
        "java -jar /srv/app.jar",
        "java org.elasticsearch.bootstrap.Elasticsearch",
        "gunicorn app.wsgi:application --config=conf/app.py",
        "postgres: app appdb 10.1.2.3(52110) idle",
        "redis-server *:6379",
        "haproxy -Ws -f /etc/haproxy/haproxy.cfg -p /run/haproxy.pid",
    ],
)
def test_ordinary_command_lines_stay(line: str) -> None:
    titled = ": " in line  # one argument, as daemons write it over theirs
    assert command_line.masked([line] if titled else line.split(" ")) == line


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        ("nginx -g daemon off;", "nginx -g ***"),
        ("curl http://host.example:8080/path", "curl http://host.example:8080/***"),
        ("ssh git@host", "ssh ***"),
        ("java -Xmx4g -jar /srv/app.jar", "java -X*** -jar /srv/app.jar"),
        ("celery -A proj worker -n w1@host", "celery -A *** worker -n ***"),
        ("iperf3 -c 10.0.0.1 -u -b 1G", "iperf3 -c 10.0.0.1 -u -b ***"),
        (
            "npm start --workers 4 --metrics-port=9100",
            "npm start --workers *** --metrics-port=9100",
        ),
    ],
)
def test_what_nobody_can_tell_from_a_secret_goes(line: str, kept: str) -> None:
    assert command_line.masked(line.split(" ")) == kept


@given(
    st.lists(
        st.sampled_from(
            ("mysql", "worker", "-p", "-e", "--token", "--db-url", "password", "=", "login", "--",
             "|", "/etc/app.conf", "10.0.0.1", "A_KEY=x", "-c", "echo x", "http://host/", "set")
        ),
        max_size=6,
    ),
    st.sampled_from(
        ("{}", "-p{}", "--password={}", "KEY={}", "me:{}", "me:{}@host", "http://{}@host/x",
         "http://host/{}", "http://host:{}/", "Authorization: Basic {}", "//x/:_token={}", "'{}'",
         "a b {}", "'{{\"k\": \"{}\"}}'", "10.0.0.1:{}", "10.0.0.1/{}", "/p:{}", "[{}]", "<<<{}")
    ),
    st.one_of(
        st.from_regex(r"[a-zA-Z]{3,9}[0-9][a-zA-Z0-9]{3,30}", fullmatch=True),
        st.from_regex(r"0x[0-9a-f]{8,64}", fullmatch=True),
        st.from_regex(r"[a-z]{3,9}[!$%&*?#]{1,3}[a-z]{3,9}", fullmatch=True),
        st.from_regex(r"[A-Za-z0-9]{10,30}[+][A-Za-z0-9]{10,30}={0,2}", fullmatch=True),
    ),
)  # fmt: skip
def test_no_word_that_may_be_a_secret_is_kept_anywhere(
    before: list[str], form: str, secret: str
) -> None:
    kept = command_line.masked(["app", *before, form.format(secret), "end"])
    assert secret not in kept
    assert secret not in command_line.masked(["sh", "-c", " ".join([*before, form.format(secret)])])


@example(b"\xc2\xa0a\xe2\x80\x83\xc2\x85")  # spaces, though not the common one
@given(st.binary(max_size=2 * command_line.READ))
def test_any_bytes_become_one_short_line(raw: bytes) -> None:
    kept = command_line.masked(command_line.split(raw[: command_line.READ]))
    assert len(kept) <= command_line.MOST
    assert kept.isprintable()


@pytest.mark.parametrize("length", range(0, 40, 3))
def test_a_login_cut_before_its_at_is_not_kept(length: int) -> None:
    start = b"app\0"
    url = b"db://" + b"u" * 5 + b":" + SECRET.encode() * 2000
    raw = (start + b"x" * length + b"\0" + url)[: command_line.READ]
    assert SECRET not in command_line.masked(command_line.split(raw))


@pytest.mark.kernel
def test_a_living_process() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", "print(flush=True)\ninput()", "--db-password=hunter2"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as child:  # fmt: skip
        try:
            assert child.stdout
            child.stdout.readline()
            kept = process.cmdline(child.pid)
        finally:
            child.kill()
    assert kept.startswith(sys.executable)
    assert kept.endswith("--db-password=***")
