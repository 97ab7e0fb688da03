"""Who made conntrack active: what is said against what really happens to packets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from kit.traffic import udp_flows

from ctrace.host import netns
from ctrace.lab import Lab, Node
from ctrace.ruleset.activation import explain, read_modules
from ctrace.ruleset.users import owner_of, users_of_save

NFT = "nft"
USERS = {
    "v4 ct state": (NFT, "table ip f { chain i { type filter hook input priority 0;"
                    " ct state new counter; }; }", (True, False)),
    "v4+v6 ct mark": (NFT, "table inet f { chain i { type filter hook input priority 0;"
                      " ct mark 7 counter; }; }", (True, True)),
    "v6 masquerade": (NFT, "table ip6 f { chain p { type nat hook postrouting priority 100;"
                      " masquerade; }; }", (False, True)),
    "ct count": (NFT, "table ip f { chain i { type filter hook input priority 0;"
                 " udp dport 9 ct count over 900 drop; }; }", (True, False)),
    "timeout policy": (NFT, "table ip f { ct timeout t { protocol udp; l3proto ip;"
                       " policy = { unreplied: 5 }; }; }", (True, False)),
    "notrack only": (NFT, "table inet f { chain p { type filter hook prerouting priority raw;"
                     " tcp dport 9 notrack; }; }", (False, False)),
    "no state at all": (NFT, "table inet f { chain i { type filter hook input priority 0;"
                        " udp dport 9 counter accept; }; }", (False, False)),
    "empty nat chain": (NFT, "table ip f { chain p { type nat hook postrouting priority 100; }; }",
                        (False, False)),
    "iptables-nft conntrack": ("iptables-nft-restore", "*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -m "
                               "conntrack --ctstate NEW -j ACCEPT\nCOMMIT\n", (True, False)),
    "ip6tables-legacy state": ("ip6tables-legacy-restore", "*filter\n:INPUT ACCEPT [0:0]\n-A INPUT "
                               "-m state --state NEW -j ACCEPT\nCOMMIT\n", (False, True)),
    "legacy notrack": ("iptables-legacy-restore", "*raw\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING "
                       "-p tcp -j CT --notrack\nCOMMIT\n", (False, False)),
    "legacy CT zone": ("iptables-legacy-restore", "*raw\n:OUTPUT ACCEPT [0:0]\n-A OUTPUT -p tcp "
                       "--dport 9 -j CT --zone 3\nCOMMIT\n", (True, False)),
}  # fmt: skip


@pytest.mark.kernel
@pytest.mark.parametrize("name", USERS)
def test_said_and_done(lab: Lab, name: str) -> None:
    """Active exactly where real packets make entries, and off once the user is gone."""
    tool, text, expected = USERS[name]
    node = lab.namespace("node")
    node.run(["nft", "-f", "-"] if tool == NFT else [tool], stdin=text)
    place = explained(node)
    assert tracked(node) == expected
    assert (place.active("ipv4"), place.active("ipv6")) == expected
    if any(expected):
        assert place.users
        assert all(user.rule for user in place.users)
        assert "No module has to be removed" in place.verdict
    # The last user goes, and tracking with it.
    if tool == NFT:
        node.run(["nft", "flush", "ruleset"])
    else:
        table = text.split("\n", 1)[0].strip("*")
        node.run([tool.replace("-restore", ""), "-t", table, "-F"])
        if "nft" in tool:
            node.run(["nft", "flush", "ruleset"])
    node.run(["conntrack", "-F"])
    assert tracked(node) == (False, False)
    after = explained(node)
    assert (after.active("ipv4"), after.active("ipv6")) == (False, False)
    assert after.verdict.startswith("off")


def explained(node: Node):  # type: ignore[no-untyped-def]
    (place,) = explain([space for space in netns.find() if space.inum == node.inum]).namespaces
    return place


def tracked(node: Node) -> tuple[bool, bool]:
    """Whether loopback packets of each family leave an entry."""
    found = []
    for n, target in enumerate(("127.0.0.1", "::1")):
        before = node.count()
        udp_flows(node, (target, 9), 3, first_port=21000 + 10 * n)
        found.append(node.count() > before)
    return found[0], found[1]


@pytest.mark.kernel
def test_handles_lead_to_the_rule(lab: Lab) -> None:
    """The handle that is named deletes exactly the rule that holds conntrack."""
    node = lab.namespace("node")
    node.run(["nft", "-f", "-"], stdin=USERS["v4 ct state"][1])
    (user,) = explained(node).users
    node.run(["nft", "delete", "rule", *user.table.split(), user.chain, "handle", str(user.handle)])
    assert tracked(node) == (False, False)


@pytest.mark.parametrize(
    ("line", "owner"),
    [
        ("-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP", "kube-proxy"),
        ("-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j DOCKER", "Docker"),
        ("-A ufw-before-input -m conntrack --ctstate INVALID -j ufw-logging-deny", "ufw"),
        ("-A cali-INPUT -m conntrack --ctstate INVALID -j DROP", "Calico"),
        ("-A LIBVIRT_PRT -s 192.168.122.0/24 -j MASQUERADE", "libvirt"),
        ("-A ts-postrouting -m mark --mark 0x40000/0xff0000 -j MASQUERADE", "Tailscale"),
        ("-A f2b-sshd -m conntrack --ctstate NEW -j REJECT", "fail2ban"),
        ('-A INPUT -m state --state NEW -m comment --comment "my own" -j ACCEPT', "unknown"),
    ],
)  # fmt: skip
def test_owners(line: str, owner: str) -> None:
    (user,) = users_of_save(f"*filter\n{line}\nCOMMIT\n", "iptables", "ipv4")
    assert user.owner == owner
    assert user.position == 1


def test_firewalld_by_its_table() -> None:
    assert owner_of("firewalld", "filter_INPUT") == "firewalld"


def test_modules_as_in_lsmod(tmp_path: Path) -> None:
    base = tmp_path / "nf_conntrack"
    for name in ("xt_CT", "nf_nat", "xt_conntrack"):
        (base / "holders" / name).mkdir(parents=True)
    (base / "refcnt").write_text("6\n")
    (base / "parameters").mkdir()
    (base / "parameters" / "enable_hooks").write_text("N\n")
    modules = read_modules(str(tmp_path))
    assert modules.loaded
    assert modules.refcount == 6
    assert modules.holders == ("nf_nat", "xt_CT", "xt_conntrack")
    text = " ".join(modules.notes)
    assert "no rmmod is needed" in text
    assert "xt_CT is what NOTRACK rules themselves load" in text


def test_built_in_and_absent(tmp_path: Path) -> None:
    assert not read_modules(str(tmp_path)).built_in
    (tmp_path / "nf_conntrack" / "parameters").mkdir(parents=True)
    assert read_modules(str(tmp_path)).built_in


@pytest.mark.kernel
def test_json_is_plain(lab: Lab) -> None:
    node = lab.namespace("node", track=True)
    answer = explain([space for space in netns.find() if space.inum == node.inum])
    document = json.loads(json.dumps(answer.to_json()))
    assert document["namespaces"][0]["active"] == {"ipv4": True, "ipv6": True}
    assert "ct state" in answer.render()
