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
        "/usr/sbin/nginx -g daemon off;",
        "nginx: worker process",
        "python3 -u server.py --port 8080 --bind 0.0.0.0:8080",
        "/usr/sbin/unbound -d",
        "curl http://host:8080/path",
        "ssh git@host",
        "java -Xmx4g -jar /srv/app.jar",
        "java -XX:MaxGCPauseMillis=20 org.elasticsearch.bootstrap.Elasticsearch",
        "postgres: app appdb 10.1.2.3(52110) idle",
        "celery -A proj worker -n w1@host",
        "redis-server *:6379",
        "containerd-shim-runc-v2 -namespace moby -id " + "0a1b2c3d" * 8,
        "iperf3 -c 10.0.0.1 -u -b 1G",
    ],
)
def test_ordinary_command_lines_stay(line: str) -> None:
    assert command_line.masked(line.split(" ")) == line


@given(
    st.sampled_from(("--password", "--db-token", "--SECRET", "-api_key", "--credentials")),
    st.text(st.characters(min_codepoint=0x4E00, max_codepoint=0x4FFF), min_size=1, max_size=300),
    st.sampled_from(("=", None)),
    st.lists(st.text(st.characters(min_codepoint=97, max_codepoint=122)), max_size=3),
)
def test_no_value_of_such_an_option_is_kept(
    option: str, value: str, between: str | None, others: list[str]
) -> None:
    given_ = [option + between + value] if between else [option, value]
    kept = command_line.masked(["app", *others, *given_, "end"])
    assert not set(value) & set(kept)


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
