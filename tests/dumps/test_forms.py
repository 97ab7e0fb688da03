"""The same facts in other forms: logs in other orders and languages, tools of other ages, and
hosts that do not belong together."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ctrace.cli import cli
from ctrace.dumps.files import Text
from ctrace.dumps.found import Found
from ctrace.dumps.host.log import Log
from ctrace.dumps.opened import open_any
from ctrace.dumps.recognise import Reader
from ctrace.dumps.rules import given_of
from ctrace.dumps.source import Told
from ctrace.errors import CtraceError
from ctrace.record import PROTO_NUMBERS
from ctrace.recording.format.evidence import parse, redacted

FULL = "nf_conntrack: nf_conntrack: table full, dropping packet"
AT = 1722250923.0
BARE = (
    "tcp      6 28 TIME_WAIT src=198.51.100.{0} dst=192.0.2.10 sport=63518 dport=8063 "
    "src=192.0.2.10 dst=198.51.100.{0} sport=8063 dport=63518 [ASSURED] mark=0 use=2"
)
ONE, TWO = BARE.format(7), BARE.format(8)


def told(*paths: Path) -> dict[str, Any]:
    with open_any([str(path) for path in paths]) as recording:  # type: ignore[attr-defined]
        said = parse(recording.header.facts)
    assert said is not None
    return said


def found(text: str) -> Found:
    one = Found()
    Reader(one).read(Text("typed", None, io.BytesIO(text.encode())))
    return one


@pytest.mark.parametrize(
    ("text", "when", "boot", "utc"),
    [
        (f"[   12.345678 <    0.000005 >] gw kernel: {FULL}", "12.345678", 12.345678, None),
        (f"Mär 29 11:02:03 gw kernel: {FULL}", "Mär 29 11:02:03", None, None),
        (f"29 juil. 11:02:03 gw kernel: {FULL}", "29 juil. 11:02:03", None, None),
        (f"[lun. juil. 29 11:02:03 2024] {FULL}", "lun. juil. 29 11:02:03 2024", None, None),
        (f"/var/log/kern.log.1.gz:7:Jul 29 11:02:03 gw kernel: {FULL}", "Jul 29 11:02:03", None,
         None),
        (f"node-1  | [   12.345678] {FULL}", "12.345678", 12.345678, None),
        (f"> [   12.345678] {FULL}", "12.345678", 12.345678, None),
        (f"Mon 2024-07-29 11:02:03 UTC [s=ab;i=1;b=cd;m=1;t=2;x=3]\n    PRIORITY=4\n"
         f"    MESSAGE={FULL}", "2024-07-29 11:02:03 UTC", None, None),
        (f"__CURSOR=s=ab\n__REALTIME_TIMESTAMP=1722250923000000\nPRIORITY=4\nMESSAGE={FULL}\n",
         "1722250923", None, AT),
        (f'{{"MESSAGE":"{FULL}","__REALTIME_TIMESTAMP":"1722250923000000"}}', "1722250923", None,
         AT),
        (f'{{"MESSAGE":{list(FULL.encode())},"__REALTIME_TIMESTAMP":"1722250923000000"}}',
         "1722250923", None, AT),
        (f'{{"log":"{FULL}\\n","stream":"stdout","time":"2024-07-29T11:02:03.000000000Z"}}',
         "2024-07-29T11:02:03.000000000Z", None, AT),
        (f'data: {{"__REALTIME_TIMESTAMP":"1722250923000000","MESSAGE":"{FULL}"}}', "1722250923",
         None, AT),
        (f'\t"MESSAGE" : "{FULL}",\n\t"__REALTIME_TIMESTAMP" : "1722250923000000"\n}}',
         "1722250923", None, AT),
        (f'   "dmesg": [\n      {{\n         "pri": 4,\n         "time":   12.345678,\n'
         f'         "msg": "{FULL}"\n      }}', "12.345678", 12.345678, None),
    ],
)  # fmt: skip
def test_the_time_stands_elsewhere(
    text: str, when: str, boot: float | None, utc: float | None
) -> None:
    log = Log()
    for line in text.split("\n"):
        assert log.take(line), line
    (message,) = log.messages
    assert (message.when, message.boot, message.utc) == (when, boot, utc)
    assert log.full == 1


def test_dmesg_prints_its_objects_one_behind_the_other() -> None:
    one = f'         "pri": 4,\n         "time": %d.5,\n         "msg": "{FULL}"\n'
    text = '   "dmesg": [\n      {\n' + "      },{\n".join(one % at for at in (1, 2, 3))
    log = Log()
    for line in (text + "      }\n   ]\n}").split("\n"):
        assert log.take(line), line
    assert [message.boot for message in log.messages] == [1.5, 2.5, 3.5]


@pytest.mark.parametrize("again", [
    "Jul 29 11:02:33 gw last message repeated 17 times",
    f"Jul 29 11:02:33 gw kernel: message repeated 17 times: [ {FULL}]",
])  # fmt: skip
def test_a_message_that_a_log_repeats_counts_as_often(again: str) -> None:
    log = Log()
    log.take(f"Jul 29 11:02:03 gw kernel: {FULL}")
    log.take(again)
    assert (log.full, log.refused, log.messages[-1].when) == (18, 18, "Jul 29 11:02:33")
    log.take("Jul 29 11:02:34 gw sshd[1]: x")
    log.take("Jul 29 11:02:39 gw last message repeated 9 times")
    assert log.full == 18


NETSTAT = (
    "Proto Recv-Q Send-Q Local Address           Foreign Address         State       "
    "PID/Program name    \n"
    "tcp        0      0 0.0.0.0:22              0.0.0.0:*               LISTEN      "
    "715/sshd: /usr/sbin \n"
    "tcp6       0      0 :::80                   :::*                    LISTEN      5/nginx\n"
    "tcp        0      0 192.0.2.1:22            192.0.2.9:5000          ESTABLISHED 9/sshd: x\n"
    "tcp        0      0 127.0.0.1:6010          0.0.0.0:*               LISTEN      -\n"
    "udp        0      0 0.0.0.0:53              0.0.0.0:*                           7/dnsmasq\n"
)


def test_who_listens_by_netstat() -> None:
    one = found(NETSTAT)
    assert {key: owner.comm for key, owner in one.space().listeners.items()} == {
        (PROTO_NUMBERS["tcp"], 22): "sshd",
        (PROTO_NUMBERS["tcp"], 80): "nginx",
        (PROTO_NUMBERS["udp"], 53): "dnsmasq",
    }
    assert one.unread.count == 0


def test_what_old_kernels_and_tools_print() -> None:
    one = found(
        "Linux version 3.10.0-229.el7.x86_64 (builder@x) (gcc version 4.8.2) #1 SMP\n"
        "entries                 4489\nsearched                123\ninsert_failed           12\n"
        "drop                    13\nnf_conntrack_max 65536\n"
        f"{ONE.replace(' 28 ', ' -1 ')}\n"
        "nf_conntrack_expect      0      0    216   18    1 : tunables    0    0    0\n"
    )
    space = one.space()
    assert (one.kernel, one.host) == ("3.10.0-229.el7.x86_64", "")
    assert space.counts == [4489]
    ((_, counted),) = space.counters
    assert (counted["drop"], counted["insert_failed"]) == (13, 12)
    assert space.sysctls["net.netfilter.nf_conntrack_max"] == "65536"
    assert len(one.dumps[0]) == 1
    assert one.unread.count == 0


@pytest.mark.parametrize("text", [
    "\x1b]0;root@gw: ~\x07root@gw:~# conntrack -C\n2\nroot@gw:~# conntrack -L\n{0}\n{1}\n",
    "> root@gw:~# sysctl net.netfilter.nf_conntrack_count\n> net.netfilter.nf_conntrack_count = 2\n"
    "> {0}\n> {1}\n",
    '{{"log":"{0}\\n","stream":"stdout"}}\n{{"log":"{1}\\n","stream":"stdout"}}\n'
    "nf_conntrack_count: 2\n",
    '{{"__REALTIME_TIMESTAMP":"1722250923000000","MESSAGE":"{0}","_PID":"7"}}\n'
    '{{"__REALTIME_TIMESTAMP":"1722250923000001","MESSAGE":"{1}","_PID":"7"}}\n'
    "nf_conntrack_count: 2\n",
    '{{"stdout": "{0}\\n{1}", "stdout_lines": ["{0}", "{1}"]}}\nnf_conntrack_count: 2\n',
    "1,{0}\n2,{1}\nnf_conntrack_count: 2\n",
    "<pre><code>{0}\n{1}</code></pre>\nnf_conntrack_count: 2\n",
    "- `{0}`\n- `{1}`\nnf_conntrack_count: 2\n",
    "['{0}\\n', '{1}\\n']\nnf_conntrack_count: 2\n",
    "+{0}\n+{1}\nnf_conntrack_count: 2\n",
    "{{noformat}}\n{0}\n{1}\n{{noformat}}\nnf_conntrack_count: 2\n",
    "\0\0\0{0}\0\n{1}\nnf_conntrack_count: 2\n",
    "{0}\r{1}\rnf_conntrack_count: 2\r",
    "/tmp/a.txt:{0}\n/tmp/a.txt:{1}\n/tmp/a.txt:net.netfilter.nf_conntrack_count = 2\n"
    "/etc/sysctl.conf:net.netfilter.nf_conntrack_max = 9\n",
])  # fmt: skip
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be", "utf-32"])
def test_entries_inside_something_else(text: str, encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "copied.txt"
    path.write_bytes(text.format(ONE, TWO).replace("\0", "" if encoding != "utf-8" else "\0")
                     .encode(encoding))  # fmt: skip
    said = told(path)
    assert (said["entries"], said["count"], said["assured"]) == (2, 2, 2)
    assert said["max"] is None
    unread = [line for _, line, _ in said["unread"]]
    assert len(unread) == (4 in unread)  # the last line of one of them


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("all tcp 10.0.0.1:22 <- 10.0.0.2:51234       ESTABLISHED:ESTABLISHED", "a state of pf"),
        ("TCP outside 192.0.2.1:443 inside 10.0.0.1:51234, idle 0:00:01, bytes 100, flags UIO",
         "Cisco ASA"),
        ("session info: proto=6 proto_state=01 duration=142 expire=3590 timeout=3600", "FortiOS"),
        ("10.0.2.2:36278  10.0.2.15:22  10.0.2.15:22  10.0.2.2:36278  tcp  TIME_WAIT  34  0",
         "show conntrack table"),
        ("28  192.0.2.1  192.0.2.4  31953  2684052  192.0.2.4  192.0.2.1  31953  2684052  icmp  2",
         "show conntrack table"),
        ("TCP OUT 10.0.0.1:51234 -> 10.0.0.2:443 expires=123 RxFlagsSeen=0x1b LastRxReport=1",
         "Cilium"),
        ("proto=tcp proto-no=6 orig-src=192.0.2.1 orig-dst=192.0.2.2 orig-sport=1 "
         "reply-src=192.0.2.2 reply-dst=192.0.2.1 reply-sport=2", "Sophos"),
    ],
)  # fmt: skip
def test_tables_that_are_not_conntracks_have_their_reason(line: str, why: str) -> None:
    one = found(f"{ONE}\n{line}\n")
    ((_, number, reason),) = one.unread.first
    assert number == 2
    assert why in reason


# -- rules ------------------------------------------------------------------------------

LISTED = """\
Name: banned
Type: hash:ip
Revision: 4
Header: family inet hashsize 1024 maxelem 65536 timeout 300
Size in memory: 200
References: 1
Number of entries: {}
Members:
192.0.2.1 timeout 5
192.0.2.2 timeout 6

Name: of
Type: list:set
Header: size 8
Size in memory: 200
References: 1
Members:
banned
"""
SAVED = (
    "create banned hash:ip family inet hashsize 1024 maxelem 65536 timeout 300\n"
    "add banned 192.0.2.1 timeout 5\nadd banned 192.0.2.2 timeout 6\n"
    "create of list:set size 8\nadd of banned\n"
)


def test_sets_that_are_listed_are_as_if_saved() -> None:
    one = found("# ipset list\n" + LISTED.format(2))
    assert given_of(one, one.space()).ipsets == SAVED
    both = found("# ipset list\n" + LISTED.format(2) + "# ipset save\n" + SAVED)
    assert given_of(both, both.space()).ipsets == SAVED
    cut = found("# ipset list\n" + LISTED.format(7))
    assert "the members of banned are cut off" in given_of(cut, cut.space()).ipsets
    other = found("Name: x\nfoo\n")
    assert (given_of(other, other.space()).ipsets, other.unread.count) == ("", 1)


def test_rules_as_json_of_any_length_and_form() -> None:
    rules = {"nftables": [{"metainfo": {"version": "1.0"}}] + [
        {"table": {"family": "inet", "name": f"t{i}", "comment": 'a } "b'}} for i in range(3000)
    ]}  # fmt: skip
    for text in (json.dumps(rules), json.dumps(rules, indent=2)):
        one = found(text + "\n" + ONE + "\n")
        assert json.loads(one.space().nft) == rules
        assert one.unread.count == 0


def test_rules_in_a_form_that_lacks_some_are_told() -> None:
    text = (
        "# iptables -S\n-P INPUT DROP\n-A INPUT -p tcp --dport 22 -j ACCEPT\n"
        "Chain INPUT (policy DROP 0 packets, 0 bytes)\n"
        " pkts bytes target     prot opt in     out     source               destination\n"
        "  123  4567 ACCEPT     all  --  *      *       0.0.0.0/0            0.0.0.0/0\n"
    )
    one = found(text)
    assert (one.space().has_rules, one.unread.count) == (False, 0)
    done = CliRunner().invoke(cli, ["report", "-"], input=text + ONE + "\n")
    said = " ".join(done.stdout.split())
    assert "iptables -L and iptables -S of one table do not show all of them" in said
    assert "iptables-save" in said


# -- whose it is ------------------------------------------------------------------------


@pytest.mark.parametrize("text", [
    f"[root@web1 ~]# conntrack -L\n{ONE}\n[root@db2 ~]# conntrack -C\n99\n",
    f"Linux web1 3.10.0 #1 SMP x86_64\n{ONE}\nLinux db2 4.18.0 #1 SMP x86_64\n",
    f"web1: {ONE}\ndb2: {TWO}\n",
    "".join(f"{host}: {ONE.replace('63518', str(1000 + at))}\n" for at in range(50)
            for host in ("web1", "db2")),
    f"web1  | {ONE}\ndb2   | {TWO}\n",
    f"Jul 29 11:02:03 web1 dump[7]: {ONE}\nJul 29 11:02:03 db2 dump[7]: {TWO}\n",
    f"[pod/web1/c] {ONE}\n[pod/db2/c] {TWO}\n",
    f"web1 | CHANGED | rc=0 >>\n{ONE}\ndb2 | CHANGED | rc=0 >>\n{TWO}\n",
    f"{'-' * 16}\nweb1\n{'-' * 16}\n{ONE}\n{'-' * 16}\ndb2\n{'-' * 16}\n{TWO}\n",
    f"me@jump:~$ ssh web1 conntrack -L\n{ONE}\nme@jump:~$ ssh -p 22 root@db2 conntrack -C\n9\n",
    f"$ kubectl -n x exec web1 -c y -- conntrack -L\n{ONE}\n"
    f"$ kubectl exec -n x db2 -- conntrack -L\n{TWO}\n",
])  # fmt: skip
def test_two_hosts_are_not_made_one(text: str, tmp_path: Path) -> None:
    path = tmp_path / "both.txt"
    path.write_text(text)
    with pytest.raises(CtraceError, match=r"output of 2 hosts.* \(db2, web1\)"):
        told(path)


@pytest.mark.parametrize("text", [
    "me@jump:~$ ssh web1 conntrack -L\n{0}\n[root@web1 ~]# conntrack -C\n9\n",
    "me@jump:~$ ssh 192.0.2.1\n[root@web1 ~]# conntrack -C\n9\n{0}\n",
    "[root@web1 ~]# conntrack -C\n9\n{0}\nadmin@web1.example.com:~$ sysctl -a\n"
    "net.netfilter.nf_conntrack_max = 5\n",
])  # fmt: skip
def test_the_way_to_a_host_is_no_second_host(text: str, tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text(text.format(ONE))
    assert told(path)["count"] == 9


def test_logs_of_several_hosts_are_told_as_such(tmp_path: Path) -> None:
    path = tmp_path / "messages"
    path.write_text("".join(f"Jul 29 11:02:0{i} web{i} kernel: {FULL}\n" for i in range(3)))
    done = CliRunner().invoke(cli, ["report", str(path)])
    assert "in the logs of 3 hosts (web0, web1, web2) together" in " ".join(done.stdout.split())
    with open_any([str(path)]) as recording:  # type: ignore[attr-defined]
        assert "web1" not in json.dumps(redacted(recording.header.facts))


def table(first: int, n: int, proto: str = "tcp", left: int = 28) -> str:
    word = "6 {} TIME_WAIT" if proto == "tcp" else "17 {}"
    return "".join(
        f"{proto} {word.format(left)} src=198.51.100.7 dst=192.0.2.10 sport={port} dport=80 "
        f"src=192.0.2.10 dst=198.51.100.7 sport=80 dport={port} use=2\n"
        for port in range(first, first + n)
    )


@pytest.mark.parametrize(
    ("texts", "looks", "entries", "left_out"),
    [  # (entries of each look, seconds apart)
        ((table(1, 50), table(11, 50, left=21)), [(50, None), (50, 7)], 50, 0),
        ((table(1, 50), table(1, 30, "udp")), [(50, None), (30, None)], 80, 0),
        ((table(1, 50), table(1000, 30)), [(30, None)], 30, 1),
        ((table(1, 50) + table(1, 30, "udp"), table(11, 50)), [(80, None)], 80, 1),
    ],
)
def test_files_are_compared_where_they_show_the_same_table(
    texts: tuple[str, ...], looks: list[tuple[int, Any]], entries: int, left_out: int,
    tmp_path: Path,
) -> None:  # fmt: skip
    paths = [tmp_path / name for name in ("before.txt", "after.txt")]
    for at, (path, text) in enumerate(zip(paths, texts)):
        path.write_text(text)
        os.utime(path, (AT + 7 * at, AT + 7 * at))
    said = told(*paths)
    assert [(one["entries"], one["apart"]) for one in said["dumps"]] == looks
    assert (said["entries"], said["left_out"]) == (entries, left_out)
    done = CliRunner().invoke(cli, ["report", *map(str, paths), "-o", "json"])
    data = json.loads(done.stdout)
    assert data["tables"][0]["count"] == data["held_total"] == entries


@pytest.mark.parametrize(
    ("heads", "apart"),
    [
        (("=== Mon Jul 29 11:02:03 UTC 2024 ===", "=== Mon Jul 29 11:02:09 UTC 2024 ==="), 6),
        (("----- Dump at 2024-07-29 11:02:03 -----", "----- Dump at 2024-07-29 11:02:09 -----"), 6),
        (("11:02:03", "11:02:09"), 6),
        (("--- 11:02:03 ---", "--- 11:02:09 ---"), 6),
        (("### 11:02:03", "### 11:02:09"), 6),
        (("Mo 29. Jul 11:02:03 CEST 2024", "Mo 29. Jul 11:02:09 CEST 2024"), 6),
        (("lun. 29 juil. 2024 11:02:03 CEST", "lun. 29 juil. 2024 11:02:09 CEST"), 6),
        (("2024年 07月 29日 星期一 11:02:03 CST", "2024年 07月 29日 星期一 11:02:09 CST"), 6),
        (("Mo 29. Jul 23:59:58 CEST 2024", "Di 30. Jul 00:00:04 CEST 2024"), 7),  # another day
        (("##### round 1 #####", "##### round 2 #####"), 7),  # by how far timeouts went down
    ],
)
def test_a_loop_has_headings_of_many_forms(heads: tuple[str, str], apart: int) -> None:
    """The time between two dumps is that of their headings, where these tell one."""
    text = f"{heads[0]}\n{table(1, 9)}{heads[1]}\n{table(1, 9, left=21)}"
    one = found(text)
    assert [look.apart for look in Told(one, now=AT).looks] == [None, apart]
    assert one.unread.count == 0


def test_a_table_before_events_without_anything_between_is_kept() -> None:
    """As when both were written into one file."""
    event = f"[1722250923.112233]\t[DESTROY] {BARE.format(9).replace(' 28', '')}\n"
    one = found(table(1, 9) + event + table(1, 9, left=21))
    assert [(len(dump), dump.events) for dump in one.dumps] == [(9, False), (1, True), (9, False)]
