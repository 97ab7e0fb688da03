"""What Prometheus gets, checked with Prometheus itself."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from kit.command import command, said
from kit.synthetic import incident, write
from kit.traffic import tcp_connections, tcp_server, udp_flows
from prometheus_client.openmetrics.parser import text_string_to_metric_families

import ctrace
from ctrace.batch import HookInfo, SelfCost
from ctrace.change.condition import HOLDS, OFF, Condition
from ctrace.errors import CtraceError, UsageError
from ctrace.lab import Lab
from ctrace.model import Model
from ctrace.model.snapshot import Cause, Counted, Culprit, Snapshot, Table, Victim
from ctrace.view.export.backfill import to_openmetrics
from ctrace.view.export.openmetrics import CONTENT_TYPE_LATEST, Exposition
from ctrace.view.export.scrape import CONNECTIONS, Scrapes, parse_listen

SHARE = Path(__file__).parents[2] / "ctrace" / "share" / "prometheus"


def snapshot(culprits: int = 3) -> Snapshot:
    return Snapshot(
        ts=0,
        host="h",
        interval_s=1.0,
        uptime_s=60.0,
        hooks=HookInfo("netfilter"),
        group="service",
        sort="held",
        lost=7,
        unseen=3,
        tables=(
            Table(
                netns=1,
                name="init",
                count=900,
                max=1000,
                buckets=512,
                totals=Counted(insert=100, destroy=50, drop=4, early_drop=10, expired=30),
                seconds_to_full=12.5,
            ),
        ),
        culprits=tuple(
            Culprit(key=f"tcp/{port}", proto="tcp", port=port, src="192.0.2.9", held=10, share=0.1)
            for port in range(8000, 8000 + culprits)
        ),
        victims=(
            Victim("v", "udp", "192.0.2.1", "192.0.2.2", 53, 1, drops=4, drop_per_s=2.0),
            Victim("w", "udp", "192.0.2.3", "192.0.2.2", 53, 1, drops=4, drop_per_s=1.0),
        ),
        cost=SelfCost(0.02, 40 << 20),
    )


def values(text: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def test_numbers_are_the_snapshots() -> None:
    got = values(Exposition().text(snapshot()))
    assert got["ctrace_table_entries", (("netns", "init"),)] == 900
    assert got["ctrace_table_seconds_to_full", (("netns", "init"),)] == 12.5
    assert got["ctrace_drops_total", (("netns", "init"),)] == 4
    ends = {
        dict(key[1])["reason"]: n for key, n in got.items() if key[0] == "ctrace_destroys_total"
    }
    assert ends == {"expired": 30, "evicted": 10, "deleted": 0, "other": 10}
    assert got["ctrace_victim_refused_per_second", (("service", "udp/53"),)] == 3.0
    assert got["ctrace_lost_events_total", ()] == 7
    assert got["ctrace_unseen_inserts_total", ()] == 3
    assert ("ctrace_table_pinned_ratio", (("netns", "init"),)) not in got  # unknown stays absent


@pytest.mark.slow
def test_an_export_has_the_families_and_values_of_a_scrape(tmp_path: Path) -> None:
    """Name by name: type, meaning, labels but the host's, and what was counted."""
    path = write(tmp_path / "a.data", incident())
    out = io.StringIO()
    with ctrace.open(str(path)) as recording:
        to_openmetrics(recording, out, lambda _: None)
    exported = {one.name: one for one in text_string_to_metric_families(out.getvalue())}
    with ctrace.open(str(path)) as recording:
        model = Model(recording.hooks, recording.clock, recording.started, host="web1")
        for batch in recording.batches():
            model.update(batch)
    text = Exposition().text(model.snapshot(group="service", sort="held", limit=50)).decode()
    scraped = {one.name: one for one in text_string_to_metric_families(text)}
    assert {
        "ctrace_table_entries", "ctrace_destroys", "ctrace_drops", "ctrace_cause_share_ratio"
    } <= exported.keys()  # fmt: skip
    for name, family in exported.items():
        same = scraped[name]
        if name == "ctrace_cause_share_ratio":  # other causes may have been told before
            end = max(one.timestamp for one in family.samples)
            family.samples = [one for one in family.samples if one.timestamp == end]
        assert (family.type, family.documentation) == (same.type, same.documentation), name
        last = {
            (one.name, *sorted((k, v) for k, v in one.labels.items() if k != "host")): one.value
            for one in family.samples
        }
        assert all(one.labels["host"] == "web1" for one in family.samples)
        live = {(one.name, *sorted(one.labels.items())): one.value for one in same.samples}
        # a gauge is as of its last reading, a scrape goes on from there by what was counted since
        assert last.keys() == live.keys() if family.type == "gauge" else last == live, name


def test_causes_are_told_by_namespace_and_kind() -> None:
    """What is wrong, and what is ordinary traffic; one sample for several services."""
    why = (
        Cause("no-keepalive", "one", share=0.5, netns=1, load=True),
        Cause("no-keepalive", "other", share=0.25, netns=1, load=True),
        Cause("clash", "races", netns=1),
        Cause("unknown", "nothing", share=1.0, netns=1),
    )
    got = values(Exposition().text(replace(snapshot(), why=why)))
    told = {key[1]: n for key, n in got.items() if key[0] == "ctrace_cause_share_ratio"}
    assert told == {
        (("cause", "no-keepalive"), ("kind", "load"), ("netns", "init")): 0.75,
        (("cause", "clash"), ("kind", "fault"), ("netns", "init")): 0.0,
    }


def test_addresses_leave_only_when_asked_for() -> None:
    assert b"192.0.2." not in Exposition().text(snapshot())
    assert b"192.0.2.9" in Exposition(addresses=True).text(snapshot())


def test_changes_that_share_a_label_are_one_series() -> None:
    """Prometheus refuses a whole scrape that has a series twice."""
    states = (HOLDS, HOLDS, OFF, HOLDS, OFF)
    changes = [Condition(n, f"n{n}", state, (), "") for n, state in enumerate(states)]
    text = Exposition(limit=1).text(snapshot(), changes).decode()
    lines = re.findall(r"^ctrace_change_holds\{.*", text, re.M)
    assert sorted(lines) == [
        'ctrace_change_holds{netns="other",state="holds"} 1.0',
        'ctrace_change_holds{netns="other",state="off"} 0.0',
    ]


def test_counters_of_tables_that_share_a_label_are_summed_and_never_fall() -> None:
    """A host may have more namespaces than labels: what any of them refused is counted."""

    def scraped(drops: dict[int, int]) -> dict[str, float]:
        tables = tuple(
            Table(n, f"pod{n}", 10 * n, 100, 64, totals=Counted(insert=9, drop=refused))
            for n, refused in drops.items()
        )
        got = values(exposition.text(replace(snapshot(), tables=tables)))
        return {dict(at)["netns"]: n for (name, at), n in got.items() if name == asked}

    exposition, asked = Exposition(limit=1), "ctrace_drops_total"
    assert scraped({1: 5, 2: 10, 3: 20}) == {"pod1": 5, "other": 30}
    assert scraped({1: 5, 2: 11, 3: 20}) == {"pod1": 5, "other": 31}
    assert scraped({1: 5, 2: 12}) == {"pod1": 5, "other": 32}  # one has gone
    assert scraped({1: 5, 2: 3, 4: 1}) == {"pod1": 5, "other": 36}  # one began anew, one came
    assert scraped({4: 1}) == {"other": 36}
    assert scraped({1: 1, 4: 1}) == {"pod1": 6, "other": 36}
    exposition, asked = Exposition(limit=1), "ctrace_table_entries"
    assert scraped({1: 0, 3: 0, 2: 0}) == {"pod1": 10, "other": 30}  # of the fullest


def test_label_values_are_bounded_for_ever() -> None:
    exposition = Exposition(limit=20)
    seen = set()
    for first in range(0, 3000, 100):
        shot = snapshot()
        shot = Snapshot(
            **{
                **shot.__dict__,
                "culprits": tuple(
                    Culprit(key=str(p), proto="tcp", port=p + 1, held=1)
                    for p in range(first, first + 100)
                ),
            }
        )
        got = values(exposition.text(shot))
        held = {k: v for k, v in got.items() if k[0] == "ctrace_culprit_entries"}
        assert sum(held.values()) == 100  # what loses its name is still counted
        seen |= set(held)
    assert len(seen) == 21


def test_a_host_never_has_more_series_than_the_page_says() -> None:
    """Thousands of services and namespaces come and go while Prometheus scrapes."""
    (told,) = re.findall(r"at most (\d+) series", (SHARE.parents[2] / "docs/fleet.md").read_text())
    exposition, seen = Exposition(), set()
    one = snapshot()
    for first in range(0, 3000, 100):
        names = range(first, first + 100)
        shot = replace(
            one,
            tables=tuple(replace(one.tables[0], name=f"pod{n}", pinned=0.5) for n in names),
            culprits=tuple(Culprit(key=str(n), proto="tcp", port=n + 1, held=1) for n in names),
            victims=tuple(
                Victim(str(n), "udp", "192.0.2.1", "192.0.2.2", n + 1, 1, drop_per_s=1.0)
                for n in names
            ),
            why=tuple(Cause(f"c{n}", "made", netns=1) for n in names),
        )
        seen |= set(values(exposition.text(shot)))
    assert len(seen) == int(told)


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


@contextmanager
def exporter() -> Iterator[int]:
    """``ctrace metrics`` at a free port; that port."""
    process = subprocess.Popen(
        # others' namespaces and services must not take the places of ours
        **command("metrics", "--listen", "127.0.0.1:0", "--limit", "1000"),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        found = re.search(r"http://127.0.0.1:(\d+)/metrics", line)
        assert found, line
        yield int(found[1])
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0


@pytest.mark.kernel
@pytest.mark.machine  # what is lost is counted for the whole host
def test_hung_scrapers_do_not_stall_capture() -> None:
    with Lab() as lab:
        server, client = lab.namespace("server", track=True), lab.namespace("client")
        lab.link(client, server)
        with exporter() as port:
            hung = []
            for _ in range(CONNECTIONS - 2):
                # a whole request, and an answer that is never read
                one = socket.socket()
                one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
                one.connect(("127.0.0.1", port))
                one.send(b"GET /metrics HTTP/1.0\r\n\r\n")
                hung.append(one)
            with tcp_server(server, 8063):
                done = tcp_connections(client, (server.addresses["client"][0], 8063), 100)
            assert len(done.flows) == 100
            key = ("ctrace_inserts_total", (("netns", f"netns:{server.inum}"),))
            url = f"http://127.0.0.1:{port}/metrics"
            deadline, inserted, lost = time.monotonic() + 60, 0.0, -1.0
            while inserted < 100 and time.monotonic() < deadline:
                time.sleep(0.5)
                try:
                    with urllib.request.urlopen(url, timeout=60) as answer:
                        got = values(answer.read())
                except OSError:  # before the first answer is made
                    continue
                inserted, lost = got.get(key, 0.0), got[("ctrace_lost_events_total", ())]
            assert (inserted, lost) == (100, 0)
            for one in hung:
                one.close()


def test_rules_and_dashboard_name_only_metrics_that_exist() -> None:
    names = {key[0] for key in values(Exposition().text(snapshot()))}
    names |= {"ctrace_table_pinned_ratio", "ctrace_change_holds", "ctrace_cause_share_ratio"}
    dashboard = json.loads((SHARE / "grafana-dashboard.json").read_text())
    expressions = [t["expr"] for panel in dashboard["panels"] for t in panel["targets"]]
    text = " ".join(expressions) + (SHARE / "alerts.yml").read_text()
    used = set(re.findall(r"\bctrace_\w+", text))
    assert used
    assert used <= names
    subprocess.run(["promtool", "check", "rules", SHARE / "alerts.yml"], check=True)


def unused() -> int:
    """A port that nobody has, below those that the kernel gives to others meanwhile."""
    for port in range(20_000 + os.getpid() % 10_000, 32_000):
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            return port
    raise OSError("no port is free")


@pytest.mark.kernel
def test_prometheus_scrapes_real_traffic(tmp_path: Path) -> None:
    assert shutil.which("prometheus"), "install Debian's prometheus package"
    with Lab() as lab, ExitStack() as stack:
        server, client = lab.namespace("server", track=True), lab.namespace("client")
        lab.link(client, server)
        exported = stack.enter_context(exporter())
        config = tmp_path / "prometheus.yml"
        config.write_text(
            "global: {scrape_interval: 1s}\n"
            f"rule_files: ['{SHARE / 'alerts.yml'}']\n"
            "scrape_configs:\n"
            f"- {{job_name: ctrace, static_configs: [{{targets: ['127.0.0.1:{exported}']}}]}}\n"
        )
        subprocess.run(["promtool", "check", "config", config], check=True)
        port = unused()
        prometheus = subprocess.Popen(
            ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'db'}",
             f"--web.listen-address=127.0.0.1:{port}"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            with tcp_server(server, 8063):
                done = tcp_connections(client, (server.addresses["client"][0], 8063), 100)
            assert len(done.flows) == 100
            name = f"netns:{server.inum}"
            deadline, inserted = time.monotonic() + 200, 0.0
            while inserted < 100 and time.monotonic() < deadline:
                time.sleep(0.5)
                inserted = query(port, f'ctrace_inserts_total{{netns="{name}"}}')
            assert inserted == 100
            assert query(port, 'ctrace_culprit_entries{service="tcp/8063"}') >= 100
        finally:
            prometheus.kill()
            prometheus.wait()


@pytest.mark.kernel
@pytest.mark.machine  # the rules of the namespaces that hold most are read
def test_what_only_rules_tell_is_scraped() -> None:
    """Connections that a rule refuses, in a table with room."""
    with Lab() as lab, exporter() as port, ExitStack() as stack:
        server, client = lab.namespace("server", track=True), lab.namespace("client")
        _, target = lab.link(client, server)
        server.sysctl("net.netfilter.nf_conntrack_udp_timeout", 600)
        udp_flows(client, (target, 9), 3000)
        server.run(["nft", "-f", "-"], stdin="table ip z {\n chain i {\n"
                   "  type filter hook input priority 0\n  tcp dport 80 ct state new "
                   "ct count over 2 counter reject with tcp reset\n }\n}\n")  # fmt: skip
        listener = stack.enter_context(server.socket(socket.AF_INET, socket.SOCK_STREAM))
        listener.bind((target, 80))
        listener.listen(50)
        told = f'{{cause="rule-limit",kind="fault",netns="netns:{server.inum}"}}'
        text, deadline = "", time.monotonic() + 200
        while told not in text and time.monotonic() < deadline:
            held = [client.socket(socket.AF_INET, socket.SOCK_STREAM) for _ in range(9)]
            for one in held:
                with contextlib.suppress(ConnectionRefusedError):
                    one.connect((target, 80))
            for one in held:
                one.close()
            time.sleep(0.5)
            with contextlib.suppress(urllib.error.HTTPError):  # there is no answer at first
                page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60)
                text = page.read().decode()
        assert f"ctrace_cause_share_ratio{told}" in text


def query(port: int, expression: str) -> float:
    url = f"http://127.0.0.1:{port}/api/v1/query?query={urllib.request.quote(expression)}"  # type: ignore[attr-defined]
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            result: list[dict[str, Any]] = json.load(answer)["data"]["result"]
    except OSError:
        return 0.0
    return float(result[0]["value"][1]) if result else 0.0


UNITS = sorted((SHARE.parent / "systemd").glob("*.service"))


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: str(unit.name))
def test_units_are_hardened_and_their_commands_exist(unit: Path) -> None:
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", unit], capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    level = float(done.stdout.split("exposure level for")[1].split(":")[1].split()[0])
    assert level < 3.7  # of which the recorder's AF_PACKET, for looks at INVALID packets, is 0.1
    words = re.search(r"^ExecStart=/usr/bin/env ctrace (.*)$", unit.read_text(), re.M)
    assert words
    verb = words[1].split()[0]
    helped = said(verb, "--help")
    for option in re.findall(r"--[a-z-]+", words[1]):
        assert option in helped


def with_capabilities_of(unit: str) -> list[str]:
    """The beginning of a command that runs with what the unit allows."""
    text = (SHARE.parent / "systemd" / f"ctrace-{unit}.service").read_text()
    found = re.search(r"^CapabilityBoundingSet=(.*)$", text, re.M)
    assert found
    names = ",".join("+" + name.removeprefix("CAP_").lower() for name in found[1].split())
    return ["setpriv", "--bounding-set", f"-all,{names}", "--no-new-privs"]


@pytest.mark.kernel
def test_the_units_capabilities_suffice() -> None:
    done = subprocess.run(
        [*with_capabilities_of("metrics"), sys.executable, "-m", "ctrace", "metrics", "--once"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert 'ctrace_table_entries{netns="init"}' in done.stdout
    assert 'ctrace_hooks_info{family="netlink"}' not in done.stdout


@pytest.mark.kernel
def test_the_recorders_capabilities_suffice_for_legacy_rules() -> None:
    with Lab() as lab:
        node = lab.namespace("legacy")
        node.run(["iptables-legacy", "-A", "INPUT", "-p", "tcp", "--dport", "8063", "-j", "ACCEPT"])
        told = node.run([*with_capabilities_of("recorder"), "iptables-legacy-save"])
    assert "--dport 8063" in told


def allowed(names: list[str]) -> set[str]:
    """System calls, and those of groups, as systemd knows them."""
    found: set[str] = set()
    for name in names:
        if not name.startswith("@"):
            found.add(name)
            continue
        told = subprocess.run(
            ["systemd-analyze", "syscall-filter", name], capture_output=True, text=True, check=True
        ).stdout
        lines = (line.strip() for line in told.splitlines()[1:])
        found |= allowed([line for line in lines if line and not line.startswith("#")])
    return found


@pytest.mark.kernel
@pytest.mark.parametrize("unit", ["metrics", "recorder"])
def test_the_units_allow_every_system_call_that_is_made(unit: str, tmp_path: Path) -> None:
    """Also of the compiler: it starts without kept programs."""
    text = (SHARE.parent / "systemd" / f"ctrace-{unit}.service").read_text()
    found = re.search(r"^SystemCallFilter=(.*)$", text, re.M)
    assert found
    verb = ["metrics", "--once"] if unit == "metrics" else ["record", "-q", "-o", "recording"]
    data = tmp_path / "perf.data"
    emptied = 'mkdir -p /var/cache/ctrace && mount -t tmpfs none /var/cache/ctrace && exec "$@"'
    subprocess.run(
        ["unshare", "-m", "sh", "-c", emptied, "sh",
         "perf", "record", "-q", "-e", "raw_syscalls:sys_enter", "-o", data, "--",
         "timeout", "-s", "TERM", "12", sys.executable, "-m", "ctrace", *verb],
        check=False,  # the recorder is stopped
        cwd=tmp_path, stdout=subprocess.DEVNULL, timeout=120,
        env={**os.environ, "PYTHONPATH": str(SHARE.parents[2])},
    )  # fmt: skip
    told = subprocess.run(
        ["perf", "script", "-i", data, "-F", "trace"], capture_output=True, text=True, check=True
    ).stdout
    macros = subprocess.run(
        ["gcc", "-E", "-dM", "-include", "sys/syscall.h", "-xc", "/dev/null"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    names = {int(n): name for name, n in re.findall(r"#define __NR_(\w+) (\d+)", macros)}
    used = {names[int(number)] for number in re.findall(r"NR (\d+) ", told)}
    assert "bpf" in used
    assert used <= allowed(found[1].split())
