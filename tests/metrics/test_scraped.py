"""``ctrace metrics`` beside real traffic, checked with Prometheus itself where it is there."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from kit.command import command
from kit.running.scrapes import snapshot, values
from kit.traffic import tcp_connections, tcp_server, udp_flows

from ctrace.lab import Lab
from ctrace.view.export.openmetrics import Exposition
from ctrace.view.export.scrape import CONNECTIONS

SHARE = Path(__file__).parents[2] / "ctrace" / "share" / "prometheus"


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
