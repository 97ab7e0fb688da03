"""Lines as other tools, old kernels, routers and support bundles have them."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import pytest

from ctrace.dumps.host.log import Log
from ctrace.dumps.opened import open_any
from ctrace.errors import CtraceError
from ctrace.recording.format.evidence import parse
from ctrace.recording.review import review
from ctrace.view.report.story import headline

FULL = "nf_conntrack: nf_conntrack: table full, dropping packet"
AT = 1722250923.0
ENTRY = (
    "tcp      6 28 TIME_WAIT src=198.51.100.7 dst=192.0.2.10 sport=63518 dport=8063 "
    "src=192.0.2.10 dst=198.51.100.7 sport=8063 dport=63518 [ASSURED] mark=0 use=2\n"
)


def told(path: Path) -> dict[str, Any]:
    with open_any([str(path)]) as recording:  # type: ignore[attr-defined]
        said = parse(recording.header.facts)
    assert said is not None
    return said


@pytest.mark.parametrize(
    ("head", "when", "boot", "utc"),
    [
        ("[   12.345678] ", "12.345678", 12.345678, None),
        ("<4>[   12.345678] [ T1234] ", "12.345678", 12.345678, None),
        ("[12.345678,3] ", "12.345678", 12.345678, None),
        ("[12.345678][T1234] ", "12.345678", 12.345678, None),
        ("kernel: [   12.345678] ", "12.345678", 12.345678, None),
        ("<4>1 2024-07-29T11:02:03.000Z gw kernel - - - [12.345678] ",
         "2024-07-29T11:02:03.000Z", None, AT),
        ("07-29 11:02:03.123     0     0 W ", "07-29 11:02:03.123", None, None),
        ("kern  :warn  : [   12.345678] ", "12.345678", 12.345678, None),
        ("4,1234,12345678,-;", "12.345678", 12.345678, None),
        ("[Mon Jul 29 11:02:03 2024] ", "Mon Jul 29 11:02:03 2024", None, None),
        ("[Jul29 11:02] ", "Jul29 11:02", None, None),
        ("[  +0.000005] ", "+0.000005", None, None),
        ("2024-07-29T11:02:03,000000+00:00 ", "2024-07-29T11:02:03,000000+00:00", None, AT),
        ("2024-07-29T13:02:03+0200 gw kernel: ", "2024-07-29T13:02:03+0200", None, AT),
        ("Mon 2024-07-29 11:02:03 UTC gw kernel: ", "2024-07-29 11:02:03 UTC", None, AT),
        ("Mon 2024-07-29 11:02:03 CEST gw kernel: ", "2024-07-29 11:02:03 CEST", None, None),
        ("2024-07-29T11:02:03.000Z stdout F [   12.345678] ", "2024-07-29T11:02:03.000Z", 12.345678,
         AT),
        ("10.5.0.2: kern: warning: [2024-07-29T11:02:03.000Z]: ", "2024-07-29T11:02:03.000Z", None,
         AT),
        ("[2024-07-29 11:02:03] ", "2024-07-29 11:02:03", None, None),
        ("29.07.2024 11:02:03 gw kernel: ", "29.07.2024 11:02:03", None, None),
        ("1722250923.000000 gw kernel: ", "1722250923.000000", None, AT),
        ("Jul 29 11:02:03 gw kernel: [   12.345678] ", "Jul 29 11:02:03", 12.345678, None),
        ("Jul 29 2024 11:02:03 gw kernel: ", "Jul 29 2024 11:02:03", None, None),
        ("Mon Jul 29 11:02:03 2024 kern.warn kernel: [   12.345678] ",
         "Mon Jul 29 11:02:03 2024", 12.345678, None),
        ('{"__REALTIME_TIMESTAMP":"1722250923000000","MESSAGE":"', "1722250923", None, AT),
    ],
)  # fmt: skip
def test_the_time_of_a_message_in_every_form(
    head: str, when: str, boot: float | None, utc: float | None
) -> None:
    log = Log()
    assert log.take(head + FULL + ('"}' if head[0] == "{" else ""))
    (message,) = log.messages
    assert (message.when, message.boot, message.utc) == (when, boot, utc)
    assert (log.full, log.refused) == (1, 1)


@pytest.mark.parametrize("text", ["ip_conntrack: VPS 101 table full, dropping packet.",
                                  "nf_conntrack: table full in netns 4026531999, dropping packet",
                                  "nf_conntrack: table full,"])  # fmt: skip
def test_the_message_as_containers_and_narrow_logs_have_it(text: str) -> None:
    log = Log()
    assert log.take(f"Jul 29 11:02:03 gw kernel: {text}")
    assert log.full == 1


def test_a_full_table_of_another_namespace_is_not_the_hosts(tmp_path: Path) -> None:
    line, path = "[12.345678] nf_conntrack: table full{}, dropping packet\n", tmp_path / "log.txt"
    theirs = line.format(" in netns 4026532999") + line.format(" in netns 4026533111")
    for text, where, what in (
        (theirs, " in netns 4026532999 and 1 other", "may be another table"),
        (theirs + line.format(""), "", "is from another moment"),
    ):
        path.write_text(text + ENTRY + "net.netfilter.nf_conntrack_max = 65536\n")
        with open_any([str(path)]) as recording:  # type: ignore[attr-defined]
            seen = review(recording)
        assert f"full{where}, last 12.345678 s after boot" in str(headline(seen))
        assert f"full{where} at 12.345678 s after boot" in seen.final.why[0].text
        assert what in seen.final.why[0].text


WRAPPED = {
    "a mail": (
        "> tcp      6 115 SYN_SENT src=192.0.2.1 dst=192.0.2.9 sport=52476\n"
        "> dport=7 packets=2 bytes=104 [UNREPLIED] src=192.0.2.9\n"
        "> dst=192.0.2.1 sport=7 dport=52476 packets=0 bytes=0 mark=0\n"
        "> secctx=system_u:object_r:unlabeled_t:s0 use=1\n",
        {"entries": 1, "unreplied": 1, "assured": 0},
    ),
    "a mail's equal signs": (
        "> ipv4     2 udp      17 119 src=3D192.0.2.1 dst=3D192.0.2.9 sport=3D53\n"
        "> dport=3D49469 src=3D192.0.2.9 dst=3D192.0.2.1 sport=3D49469\n"
        "> dport=3D53 [ASSURED] mark=3D0 zone=3D0 use=3D2\n",
        {"entries": 1, "assured": 1},
    ),
    "a mail's ends of lines": (
        "> udp      17 119 src=3D192.0.2.1 dst=3D192.0.2.9 sport=3D5=\n3\n"
        "> dport=3D49469 src=3D192.0.2.9 dst=3D192.0.2.1 sport=3D4=\n9469\n"
        "> dport=3D53 [ASSURED] mark=3D0 use=3D2\n",
        {"entries": 1, "assured": 1, "src_nat": 0, "dst_nat": 0},
    ),
    "a page": (
        "tcp      6 119 ESTABLISHED src=192.0.2.1 dst=192.0.2.9 sport=5 dport=80 src=192.0.2.9 "
        "dst=192.0.2.1 sport=80 dport=5\n    [ASSURED] mark=0 use=1\n"
        "tcp      6 119 ESTABLISHED src=192.0.2.1 dst=192.0.2.9 sport=6 dport=80 src=192.0.2.9 "
        "dst=192.0.2.1 sport=80 dport=6\n    [ASSURED] mark=0 use=1\n",
        {"entries": 2, "assured": 2},
    ),
    "backslashes": (
        "ipv4 2 tcp 6 \\\n\tsrc=192.0.2.1 dst=192.0.2.9 sport=5 dport=80 \\\n"
        "\tsrc=192.0.2.9 dst=192.0.2.1 sport=80 dport=5 [HW_OFFLOAD] \\\n\tmark=0 use=3\n",
        {"entries": 1, "offloaded": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("where", WRAPPED)
def test_an_entry_that_was_broken_into_lines_is_one(where: str, tmp_path: Path) -> None:
    text, expected = WRAPPED[where]
    path = tmp_path / "wrapped.txt"
    path.write_text(text)
    said = told(path)
    assert {name: said[name] for name in expected} == expected
    assert said["not_understood"] == 0


@pytest.mark.parametrize("width", [62, 65, 80, 97, 120, 148])
def test_a_terminal_breaks_entries_within_words(width: int, tmp_path: Path) -> None:
    """At its width, whatever stands there: ports are whole again, and nothing looks translated."""
    whole = [ENTRY.strip().replace("63518", str(port)) for port in range(9996, 10004)]
    path = tmp_path / "terminal.txt"
    path.write_text("\n".join(
        line[at : at + width] for line in whole for at in range(0, len(line), width)
    ))  # fmt: skip
    said = told(path)
    assert (said["entries"], said["src_nat"], said["dst_nat"]) == (8, 0, 0)
    assert (said["not_understood"], said["by"]) == (0, {"tcp TIME_WAIT": 8})
    path.write_text(f"{ENTRY}4489\nnf_conntrack_max=65536\ncpu=0   found=1 drop=5\n")
    said = told(path)
    assert (said["entries"], said["max"], said["kernel_counted"]) == (1, 65536, {"drop": 5})
    assert [line for _, line, _ in said["unread"]] == [2]


def test_one_direction_alone_is_no_entry_whatever_follows(tmp_path: Path) -> None:
    path = tmp_path / "half.txt"
    half = "tcp 6 431999 ESTABLISHED src=192.0.2.1 dst=192.0.2.9 sport=5 dport=22\n"
    path.write_text(half + half + ENTRY + half)
    said = told(path)
    assert (said["entries"], said["not_understood"]) == (1, 3)
    assert [line for _, line, _ in said["unread"]] == [1, 2, 4]


def test_what_a_bundle_has_of_settings_at_boot_is_not_what_was(tmp_path: Path) -> None:
    path = tmp_path / "sosreport.tar"
    files = {
        "sos/etc/sysctl.d/90.conf": "net.netfilter.nf_conntrack_max = 9\n",
        "sos/etc/nftables.conf": "table inet f {\n\tchain c {\n\t\taccept\n\t}\n}\n",
        "sos/etc/iproute2/rt_tables": "#\n# reserved values\n#\n255\tlocal\n",
        "sos/proc/net/nf_conntrack": ENTRY,
        "sos/sos_commands/kernel/sysctl_-a": "net.netfilter.nf_conntrack_max = 65536\n",
    }
    with tarfile.open(path, "w") as archive:
        for name, text in files.items():
            (tmp_path / "one").write_text(text)
            archive.add(tmp_path / "one", name)
    said = told(path)
    assert (said["max"], said["rules"], said["not_understood"]) == (65536, {"": False}, 0)


@pytest.mark.parametrize("word", ["net_ratelimit", "__ratelimit", "printk", "NET"])
def test_hidden_messages_of_every_kernel(word: str) -> None:
    log = Log()
    log.take("Jul 29 11:02:03 gw kernel: ip_conntrack: table full, dropping packet.")
    kind = "messages" if word in ("printk", "NET") else "callbacks"
    log.take(f"Jul 29 11:02:09 gw kernel: {word}: 12 {kind} suppressed.")
    assert (log.full, log.suppressed, log.refused) == (1, 12, 13)


def test_lists_that_are_not_conntracks_are_counted_with_a_reason(tmp_path: Path) -> None:
    path = tmp_path / "router.txt"
    path.write_text(
        "[admin@gw] > ip firewall connection print detail\n"
        " 0  SAC  protocol=tcp src-address=192.0.2.1:5 dst-address=203.0.113.5:443 timeout=23h\n"
    )
    with pytest.raises(CtraceError, match="line 2: a connection as RouterOS prints it"):
        told(path)
    path.write_text(
        "ubnt@gw:~$ show conntrack table ipv4\n"
        "CONN ID    Source                 Destination            Protocol         TIMEOUT\n"
        "3021451744 192.0.2.1:51234        203.0.113.5:443        tcp [6] TW       119\n"
        "ubnt@gw:~$ sudo conntrack -L\n" + ENTRY
    )
    said = told(path)
    assert (said["entries"], said["not_understood"]) == (1, 1)
    assert said["unread"][0][1] == 3


def test_a_kernel_of_2_6(tmp_path: Path) -> None:
    path = tmp_path / "old.txt"
    path.write_text(
        "# cat /proc/net/ip_conntrack\n" + ENTRY.replace("mark=0", "mark=0 secmark=0 rate=3")
        + "unknown  47 599 src=192.0.2.1 dst=192.0.2.9 src=192.0.2.9 dst=192.0.2.1 use=1\n"
        "# wc -l /proc/net/ip_conntrack\n65530 /proc/net/ip_conntrack\n"
        "# cat /proc/sys/net/ipv4/ip_conntrack_max\n65536\n# grep conntrack /proc/slabinfo\n"
        "ip_conntrack       65536  65600    384   10    1 : tunables   54   27    8\n"
    )  # fmt: skip
    said = told(path)
    assert (said["entries"], said["max"], said["count"], said["not_understood"]) == (
        2, 65536, 65530, 0,
    )  # fmt: skip


BUNDLE = {
    "sos_commands/conntrack/conntrack_-L_-o_extended": "ipv4     2 " + ENTRY,
    "sos_commands/conntrack/ip_netns_exec_red_conntrack_-L_-o_extended": "ipv4     2 "
    + ENTRY.replace("63518", "63519"),
    "sos_commands/networking/ss_-peaonmi": "State Recv-Q Send-Q Local Address:Port Peer\n"
    "ESTAB 0 0 192.0.2.10:22 192.0.2.1:5555 users:((\"sshd\",pid=9,fd=4)) uid:1 ino:7 sk:1\n"
    "\t skmem:(r0,rb1,t0,tb1,f0,w0,o0,bl0,d0) ts sack cubic\n",
    "sos_commands/networking/netstat_-W_-neopa": "Active Internet connections (servers)\n"
    "Proto Recv-Q Send-Q Local Address Foreign Address State User Inode PID/Program name\n"
    "tcp 0 0 0.0.0.0:8063 0.0.0.0:* LISTEN 0 23011 812/nginx: master off (0.00/0/0)\n"
    "Active UNIX domain sockets (servers and established)\n"
    "unix  2      [ ]         DGRAM      CONNECTED     15011    1/systemd /run/x\n",
    "sos_commands/kernel/sysctl_-a": "kernel.pid_max = 9\nnet.netfilter.nf_conntrack_max = 65536\n",
    "sos_commands/kernel/lsmod": "Module Size Used by\nnf_conntrack 172032 1 xt_conntrack\n",
    "sos_commands/logs/journalctl_--no-pager_--boot": "-- Logs begin at Mon 2024-07-29. --\n"
    f"Jul 29 11:02:03 gw kernel: {FULL}\nJul 29 11:02:03 gw kernel: {FULL}\n"
    "Jul 29 11:02:08 gw kernel: net_ratelimit: 33 callbacks suppressed\n",
    "var/log/messages": f"Jul 29 11:02:03 gw kernel: {FULL}\nJul 29 11:02:04 gw x[1]: y\n"
    f"Jul 29 11:03:04 gw kernel: {FULL}\n",
    "sos_commands/kernel/dmesg": f"[  100.100000] {FULL}\n",
    "etc/services": "http 80/tcp www # WorldWideWeb HTTP\n" * 400,
}  # fmt: skip


def test_a_bundle_counts_no_message_twice(tmp_path: Path) -> None:
    """The journal, the log's file and dmesg have the same messages: one of them tells of most."""
    path = tmp_path / "sosreport-web1.tar.xz"
    for name, text in BUNDLE.items():
        file = tmp_path / "sosreport-web1" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    with tarfile.open(path, "w:xz") as archive:
        archive.add(tmp_path / "sosreport-web1", "sosreport-web1")
    for given in (path, tmp_path / "sosreport-web1"):
        said = told(given)
        assert (said["entries"], said["max"], said["held_by"]) == (2, 65536, ["xt_conntrack"])
        assert said["not_understood"] == 0, said["unread"]
        assert (said["log"]["full"], said["log"]["suppressed"]) == (3, 33)
        assert said["refused_at_least"] == 36
        assert [said["log"][one]["text"] for one in ("first", "last")] == [
            "Jul 29 11:02:03", "Jul 29 11:03:04",
        ]  # fmt: skip


@pytest.mark.parametrize("life_us", [200, 3768, 40_000])
def test_how_long_a_connection_of_events_lived(life_us: int, tmp_path: Path) -> None:
    """From its birth to the event of its close, which is known to a millisecond."""
    there, back = "src=198.51.100.7 dst=192.0.2.10", "src=192.0.2.10 dst=198.51.100.7"
    told, path = [], tmp_path / "events.txt"
    for port in range(3000, 3012):
        at = 1_753_786_144_000_000 + port * 1000
        flow = f"{there} sport={port} dport=8063 {{}}{back} sport=8063 dport={port}"
        told += [
            (at, f"[NEW] tcp 6 120 SYN_SENT {flow.format('[UNREPLIED] ')}"),
            (at + life_us, f"[UPDATE] tcp 6 120 TIME_WAIT {flow.format('')} [ASSURED]"),
            (at + 120_000_999, f"[DESTROY] tcp 6 {flow.format('')} [ASSURED]"),
        ]
    path.write_text(
        "".join(f"[{at // 10**6}.{at % 10**6:06d}] {line}\n" for at, line in sorted(told))
    )
    with open_any([str(path)]) as recording:  # type: ignore[attr-defined]
        life = review(recording).final.culprits[0].life
    assert life.n == 12
    assert life.p50 == pytest.approx(life_us / 1e6, rel=0.13, abs=0.0006)
