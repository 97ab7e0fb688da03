"""Rules that iptables lists table by table, and lists that are no conntrack's."""

from __future__ import annotations

import io
import re
import shutil
from typing import Optional

import pytest
from click.testing import CliRunner

from ctrace.cli import cli
from ctrace.dumps.files import Text
from ctrace.dumps.found import TABLES, Found
from ctrace.dumps.recognise import Reader
from ctrace.lab import Lab

ONE = (
    "tcp      6 28 TIME_WAIT src=198.51.100.7 dst=192.0.2.10 sport=63518 dport=8063 "
    "src=192.0.2.10 dst=198.51.100.7 sport=8063 dport=63518 [ASSURED] mark=0 use=2"
)
FULL = "nf_conntrack: nf_conntrack: table full, dropping packet"
FILTER = "-P INPUT DROP\n-N mine\n-A INPUT -p tcp -m tcp --dport 22 -j ACCEPT\n"
RULES = (
    "-N mine", "-A mine -s 192.0.2.0/24 -j RETURN", "-A INPUT -p tcp --dport 22 -j mine",
    "-P FORWARD DROP", "-t raw -A PREROUTING -p udp --dport 53 -j NOTRACK",
    "-t nat -A POSTROUTING -o lo -j MASQUERADE", "-t mangle -A OUTPUT -m comment --comment 'a -c 1 "
    "2 b' -j MARK --set-mark 7",
)  # fmt: skip


def found(text: str) -> Found:
    one = Found()
    Reader(one).read(Text("typed", None, io.BytesIO(text.encode())))
    one.space().settle()
    return one


def told(save: str) -> dict[str, list[str]]:
    """Lines by table, without comments and counters."""
    return {
        part.split("\n", 1)[0]: sorted(
            re.sub(r" \[\d+:\d+\]", "", line)
            for line in part.splitlines()
            if line[:1] in (":", "-")
        )
        for part in re.split(r"(?m)^\*", save)[1:]
    }


@pytest.mark.kernel
@pytest.mark.parametrize("more", ["", " -v"])
def test_all_tables_shown_one_by_one_are_what_iptables_saves(more: str) -> None:
    if not shutil.which("iptables"):
        pytest.skip("no iptables here")
    with Lab() as lab:
        one = lab.namespace("listed")
        for rule in RULES:
            one.run(["sh", "-c", f"iptables {rule}"])
        text = "".join(
            f"root@fw:~# iptables -t {table} -S{more}\n"
            + one.run(["sh", "-c", f"iptables -t {table} -S{more}"])
            for table in TABLES
        )
        saved = told(one.run(["iptables-save"]))
    mine = found(text + f"root@fw:~# conntrack -L\n{ONE}\n")
    ((_, family, save),) = mine.space().saves
    assert (family, mine.unread.count, mine.space().listed) == ("ip", 0, set())
    assert told(save) == saved


@pytest.mark.parametrize(
    "asked",
    ["iptables -S", "iptables -S INPUT", "iptables -S | grep 22", "ip6tables -S", "iptables -S -t"],
)
def test_one_table_or_one_chain_is_not_all_rules(asked: str) -> None:
    one = found(f"root@fw:~# {asked}\n{FILTER}root@fw:~# conntrack -L\n{ONE}\n")
    assert not one.space().has_rules
    assert one.space().listed == {"iptables -S"}
    assert (one.unread.count, one.spool.n) == (0, 1)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("tcp   192.0.2.2:1234     198.51.100.4:80     ESTABLISHED", "netstat-nat"),
        ("192.0.2.2:1234   198.51.100.4:80   tcp  ESTABLISHED 119:59:59", "iptstate"),
        ("Session ID: 10115977, Policy name: a/4, State: Active, Timeout: 62", "Junos"),
        ("tcp    3599   192.0.2.1:123    198.51.100.1:123 203.0.113.4:80    -", "FortiOS"),
        (" 0  SAC   tcp     192.0.2.254:59040  198.51.100.226:443   23h59m51s", "RouterOS"),
        ("34  192.0.2.14:22  192.0.2.1:59 192.0.2.1:59 192.0.2.14:22  tcp  ESTABLISHED  431",
         "show conntrack table"),
        ("12345   web  ACTIVE  FLOW  NS   192.0.2.2[1234]/trust/6  (192.0.2.4[5555])", "PAN-OS"),
    ],
)  # fmt: skip
def test_other_lists_are_named_for_what_they_are(line: str, why: str) -> None:
    one = found(f"{line}\n{ONE}\n")
    assert one.spool.n == 1
    ((_, _, reason),) = one.unread.first
    assert why in reason


def test_a_module_that_cannot_be_unloaded_has_its_users() -> None:
    one = found("Module Size Used by\nnf_conntrack 90112 3 xt_conntrack,nf_nat,[permanent]\n")
    assert one.modules["nf_conntrack"] == (3, ("xt_conntrack", "nf_nat"))
    assert one.unread.count == 0
    for said in ("rmmod: ERROR: Module nf_conntrack is in use by: xt_CT nf_nat",
                 "ERROR: Module nf_conntrack is in use by xt_CT,nf_nat"):  # fmt: skip
        one = found(
            "[root@h ~]# modprobe -r nf_nat\nmodprobe: FATAL: Module nf_nat is in use.\n"
            f"[root@h ~]# rmmod nf_conntrack\n{said}\n"
        )
        assert one.modules == {"nf_conntrack": (2, ("xt_CT", "nf_nat"))}
        assert one.unread.count == 0


def test_a_facility_is_no_host() -> None:
    one = found(f"Mon Jul 29 11:02:03 2024 kern.warn kernel: [12345.678901] {FULL}\n")
    assert (one.log.full, one.log.hosts) == (1, set())


def test_the_only_prompt_tells_the_host() -> None:
    done = CliRunner().invoke(cli, ["report", "-"], input=f"[root@web1 ~]# conntrack -L\n{ONE}\n")
    assert done.stdout.startswith("web1 ")
    assert "1 entry" in done.stdout
    assert "1 entries" not in done.stdout


@pytest.mark.parametrize(
    "text",
    [
        "root@a:~# dmesg | grep table\n[7.5] {0}\n[9.5] {0}\nroot@a:~# dmesg | tail\n[9.5] {0}\n",
        "[7.5] {0}\n[9.5] {0}\nJul 29 11:02:03 a kernel: [7.5] {0}\n",
        "#==[ Command ]====#\n# /usr/bin/dmesg\n[7.5] {0}\n[9.5] {0}\n#==[ Log File ]====#\n"
        "# /var/log/messages\n2024-07-29T11:02:03.1+02:00 a kernel: [    7.500000] {0}\n",
    ],
)
def test_a_message_that_is_shown_twice_counts_once(text: str) -> None:
    one = found(text.format(FULL).replace("[7.5]", "[7.500000]").replace("[9.5]", "[9.500000]"))
    assert (one.log.full, one.log.refused, one.unread.count) == (2, 2, 0)


@pytest.mark.parametrize(
    ("text", "times"),
    [
        # a log whose first line's head is missing
        ("s kernel: [    7.500000] {0}\nJul 29 11:02:03 a kernel: [    9.500000] {0}\n", 2),
        ("el: {0}\nJul 29 11:02:03 a kernel: {0}\n", 2),
        ("7.500000] {0}\n[    9.500000] {0}\n", 2),
        ("1:02:03 a kernel: {0}\nJul 29 11:02:03 a kernel: {0}\n", 2),
        ("29T11:02:03.5Z a kernel: {0}\n2024-07-29T11:02:03.7Z a kernel: {0}\n", 2),
        # somebody's words before the log
        ("{0}\n[    9.500000] {0}\n", 1),
        # the first of a minute has its time, the others how long after it they are (dmesg -H)
        ("[Jul29 11:02] {0}\n[  +0.000012] {0}\n[  +0.000012] {0}\n", 3),
        # from a month with an English name to another
        ("Feb 28 23:59:59 a kernel: {0}\nMär  1 00:00:01 a kernel: {0}\n", 2),
    ],
)
def test_messages_of_one_log_count_whatever_the_form_of_their_times(text: str, times: int) -> None:
    assert found(text.format(FULL)).log.full == times


def test_counters_and_counts_as_tools_of_other_ages_print_them() -> None:
    one = found(
        "root@a:~# conntrack -S\ncpu=0   \tfound=1 invalid=0 insert_failed=3 drop=7 early_drop=0\n"
        "cpu=1   \tfound=1 invalid=0 insert_failed=3 drop=7 (null)=0 chaintoolong=2\n"
        "root@a:~# conntrack -L 2>/dev/null | wc -l\n16384\n"
    )
    ((_, counted),) = one.space().counters
    assert (counted["drop"], counted["chaintoolong"]) == (14, 2)
    assert (one.space().counts, one.unread.count) == ([16384], 0)


STAT = (
    "entries  clashres found new invalid ignore delete chainlength insert insert_failed drop\n"
    + "00000010 00000001 00000000 00000000 00000004 00000000 00000000 00000000 00000000 00000000 "
      "{:08x}\n" * 2
)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "drops"),
    [
        ("cpu=0   found=1 drop=5 early_drop=0 \\\n        error=0 chaintoolong=3\n" * 1, [5]),
        ("cpu=0   found=1 drop=5\nearly_drop=0 chaintoolong=3\ncpu=1   found=1 drop=6\n"
         "early_drop=0 chaintoolong=3\n", [11]),
        ("# cpu=0   found=1 drop=5 early_drop=0\n# cpu=1   found=1 drop=6 early_drop=0\n", [11]),
        ("# cat /proc/net/stat/nf_conntrack; sleep 9; cat /proc/net/stat/nf_conntrack\n"
         + STAT.format(5, 6) + STAT.format(7, 8), [11, 15]),
    ],
)  # fmt: skip
def test_each_reading_of_the_counters_is_one(text: str, drops: list[int]) -> None:
    one = found(text + ONE + "\n")
    assert [counted["drop"] for _, counted in one.space().counters] == drops
    assert one.unread.count == 0


@pytest.mark.parametrize(
    ("drops", "dates", "said"),
    [
        ((5, 45), True, "from the first reading to the last, 20 s apart: drop 80 (4.0/s)"),
        ((5, 45), False, "from the first reading to the last: drop 80"),
        ((5, 5), True, "from the first reading to the last, 20 s apart: none of them"),
        ((45, 5), True, None),  # the host was started anew
    ],
)
def test_what_the_kernel_counted_between_two_readings(
    drops: tuple[int, int], dates: bool, said: Optional[str]
) -> None:
    text = "".join(
        f"{f'Mon Jul 29 11:02:{second} UTC 2024' if dates else ''}\n{STAT.format(n, n)}"
        for second, n in zip(("03", "23"), drops)
    )
    done = CliRunner().invoke(cli, ["report", "-"], input=text)
    shown = " ".join(done.stdout.split())
    assert f"it counted drop {2 * drops[1]}, clash_resolve 2, invalid 8" in shown
    assert ("from the first reading" in shown) == (said is not None)
    assert (said or "") in shown


def test_a_row_of_counters_is_no_connection() -> None:
    head = "entries searched found new invalid ignore delete delete_list insert insert_failed drop"
    row = "00000010 00000001 00000002 00000003 00000004 ab000005 " + "00000000 " * 4 + "00000007"
    one = found(f"{head}\n{row}\n")
    assert (one.space().counters[-1][1]["drop"], one.unread.count) == (7, 0)


@pytest.mark.parametrize("n", [1, 50])
def test_a_name_with_the_number_of_another_protocol_is_not_read(n: int) -> None:
    """Neither alone nor among lines that are alike."""
    right = "".join(ONE.replace("63518", str(1000 + i)) + "\n" for i in range(n))
    one = found(right + ONE.replace("tcp      6", "tcp      17") + "\n")
    assert (one.spool.n, one.unread.count) == (n, 1)
    assert one.unread.first[0][1:] == (n + 1, "a protocol's name with the number of another")


@pytest.mark.parametrize("line", [
    "net.netfilter.nf_conntrack_max = 262,144", "nf_conntrack_max: 262.144",
    "nf_conntrack_max 262 144",
    "| net.netfilter.nf_conntrack_max | 262144 |", '  "net.netfilter.nf_conntrack_max": "262144",',
    "net.netfilter.nf_conntrack_max -> 262'144",
])  # fmt: skip
def test_a_number_is_read_as_people_write_it(line: str) -> None:
    one = found(line + "\n")
    assert one.space().sysctls == {"net.netfilter.nf_conntrack_max": "262144"}
    assert one.unread.count == 0


@pytest.mark.parametrize(("text", "times", "refused"), [
    (f"[1.5] {FULL[:-4]}>\n[9.5] net_ratelimit: 7 callb>", 1, 8),
    (f"[1.5] {FULL[:-10]}...\n[2.5] nf_conntrack: nf_conntrack: table full\u2026", 2, 2),
    ('[root@gw ~]# dmesg | grep -c "table full"\n1234', 1234, 1234),
    (f"[root@gw ~]# grep 'table full' /var/log/messages | wc -l\n7\n# dmesg\n[1.5] {FULL}", 7, 7),
    ("# grep -c conntrack /var/log/messages\n12", 0, 0),
])  # fmt: skip
def test_messages_that_a_window_cuts_or_somebody_counts(
    text: str, times: int, refused: int
) -> None:
    one = found(text + "\n")
    assert (one.log.full, one.log.refused) == (times, refused)


def test_texts_put_behind_one_another_keep_their_first_lines() -> None:
    one = found(f"{ONE}\n\ufeff{ONE.replace('63518', '63519')}\n")
    assert (one.spool.n, one.unread.count) == (2, 0)
