"""What iptables, its mangle table and its sets add to a rule set by lot."""

from __future__ import annotations

from kit.rulesets.drawn_nft import EXT, INT, PORT, Draw
from kit.rulesets.texts import Setup
from kit.rulesets.tool.words import HOST, POD

# ---- iptables ----------------------------------------------------------------------------


def xt_filter_rules(d: Draw, tool: str) -> Setup:
    """A rule put before the others by hand, or by a script of a daemon."""
    chain = d.hook.upper()
    port = f"-p {d.proto} --dport {PORT}"
    lines = d.one(
        ("-m conntrack --ctstate NEW -m recent --set --name R --rsource",
         "-m recent --update --seconds 9 --hitcount 60 --name R --rsource -j DROP"),
        (f"{port} -m hashlimit --hashlimit-above 900/sec --hashlimit-burst 900 --hashlimit-mode "
         "srcip,dstport --hashlimit-name H -j DROP",),
        (f"{port} -m connlimit --connlimit-above 500 --connlimit-mask 32 -j REJECT",),
        (f"-p {d.proto} -m conntrack --ctorigdstport {PORT} --ctdir ORIGINAL -j ACCEPT",),
        (f"-m conntrack --ctorigdst {HOST} --ctstate NEW -j ACCEPT",),
        ("-m conntrack --ctreplsrc 192.0.2.0/24 -j DROP",),
        ("-m conntrack --ctstate DNAT -j ACCEPT",),
        ("-m conntrack ! --ctstate DNAT -m mark --mark 0x9 -j DROP",),
        ("-m conntrack --ctstatus ASSURED -j ACCEPT",),
        ("-m conntrack --ctexpire 1:90000 -m conntrack --ctstate ESTABLISHED -j ACCEPT",),
        ("-m conntrack --ctproto 47 -j ACCEPT",),
        ("-m policy --dir in --pol ipsec -j ACCEPT",) if chain == "INPUT" else (
            "-m comment --comment none",),
        (f"{port} -m string --algo bm --string attack -j DROP",),
        ("-m helper --helper ftp -j ACCEPT",),
        (f"{port} -m statistic --mode random --probability 0.0000001 -j DROP",),
        ("-p tcp ! --syn -m conntrack --ctstate NEW -j DROP",),
        (f"{port} -m addrtype --src-type LOCAL -j ACCEPT",),
        (f"{port} -m connbytes --connbytes 999999999: --connbytes-dir both --connbytes-mode bytes "
         "-j DROP",),
        (f"{port} -m quota --quota 99999999 -j ACCEPT",),
        (f"{port} -m length --length 1501:65535 -j DROP",),
        ("-m state --state INVALID -j DROP",), ("-m u32 --u32 \"6&0xFF=0x84\" -j DROP",),
    )  # fmt: skip
    script = "".join(f"{tool} -w -A {chain} {line}\n" for line in lines)
    if d.rng.random() < 0.7:  # before all others
        first = [f"{tool} -w -I {chain} {n} {line}\n" for n, line in enumerate(lines, 1)]
        script = "".join(first)
    return (("sh", script),)


def xt_mangle_rules(d: Draw, tool: str) -> Setup:
    rules = d.one(
        ("PREROUTING -j CONNMARK --restore-mark",
         f"PREROUTING -i {EXT} -m mark --mark 0 -j MARK --set-mark 0x10",
         "PREROUTING -m mark --mark 0x10 -j CONNMARK --save-mark",
         "OUTPUT -j CONNMARK --restore-mark"),
        ("PREROUTING -m rpfilter --invert --loose -j DROP",),
        ("PREROUTING -m rpfilter --validmark --invert -j DROP",),
        ("OUTPUT -m connmark --mark 0x10 -j MARK --set-mark 0x10",),
        ("POSTROUTING -m conntrack --ctstate NEW -j TOS --set-tos 0x10",),
        ("POSTROUTING -p tcp -j DSCP --set-dscp 8",),
        ("PREROUTING -m conntrack --ctstate INVALID -j DROP",
         "PREROUTING -p tcp ! --syn -m conntrack --ctstate NEW -j DROP"),
        (f"PREROUTING -p {d.proto} --dport {PORT} -m conntrack --ctdir ORIGINAL -j MARK --set-mark "
         "2",), ("FORWARD -p tcp --tcp-flags SYN,RST SYN -j TCPMSS --clamp-mss-to-pmtu",),
        ("PREROUTING -m socket --transparent -j MARK --set-mark 1",),
        ("POSTROUTING -j CLASSIFY --set-class 1:10",), ("PREROUTING -j TTL --ttl-inc 1",),
    )  # fmt: skip
    return (("sh", "".join(f"{tool} -w -t mangle -A {rule}\n" for rule in rules)),)


def xt_set_rules(d: Draw, tool: str) -> Setup:
    """Sets of other types than addresses alone, some of them in a list."""
    out = d.hook == "output"
    kind, elements, side = d.one(
        ("hash:ip,port", (f"10.77.1.1,{d.proto}:{PORT}", f"{POD},{d.proto}:{PORT}"),
         "dst,dst" if out else "src,dst"),
        ("hash:net,iface", (f"10.77.0.0/16,{EXT}", f"10.77.4.0/24,{INT}"),
         "dst,dst" if out else "src,src"),
        ("bitmap:port range 1-65535", (str(PORT), "22"), "dst"),
        ("hash:net,port", (f"10.77.0.0/16,{d.proto}:8000-9000",), "dst,dst" if out else "src,dst"),
        ("hash:ip timeout 9000", ("10.77.1.1", "10.77.4.2"), "dst" if out else "src"),
    )  # fmt: skip
    lines = [f"ipset create beside {kind}", *(f"ipset add beside {one}" for one in elements)]
    way, match, new = "A", f"--match-set beside {side}", "-m conntrack --ctstate NEW"
    port = f"-p {d.proto} --dport {PORT}"
    end = d.one(f"{port} -m set {match} -j ACCEPT", f"{port} {new} -m set {match} -j ACCEPT",
                f"-m set {match} {new} -j ACCEPT",
                f"{port} {new} -m set ! {match} -j DROP")  # fmt: skip
    if "DROP" in end:
        way = "I"
    return (("sh", "\n".join([*lines, f"{tool} -w -{way} {d.hook.upper()} {end}"]) + "\n"),)
