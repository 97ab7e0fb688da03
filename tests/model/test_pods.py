"""Pods by the addresses of their network namespaces: live, and one after the other."""

from __future__ import annotations

import io

from kit.shapes import NETNS, START, Trace, steady
from rich.console import Console

from ctrace.batch import Batch, Clock, HookInfo, Names, Netns
from ctrace.filters import parse_network
from ctrace.live.filtering import filtered
from ctrace.model.model import Model
from ctrace.model.scope import Scope
from ctrace.model.snapshot import Snapshot
from ctrace.model.who.pods import Pods
from ctrace.view.screen.frame import frame

SECONDS = 4
INIT = Netns(NETNS, "init", ("127.0.0.1", "192.0.2.1", "10.244.0.1"))
CART = Netns(NETNS + 1, "k8s:shop/cart-0", ("127.0.0.1", "10.244.0.5", "fe80::1"))
WEB = Netns(NETNS + 2, "k8s:shop/web-7d9f-x2k", ("127.0.0.1", "10.244.0.6", "2001:db8::6"))
JOB = Netns(NETNS + 3, "docker:job", ("127.0.0.1", "172.17.0.2"))
BARE = Netns(NETNS + 4, f"netns:{NETNS + 4}", ("10.244.0.9",))


def spaces(*told: Netns) -> dict[int, Netns]:
    return {one.inum: one for one in told}


def model() -> Model:
    t = Trace(seed=5)
    t.flows(steady(200, SECONDS, t.rng), 0, 60, src="10.244.0.5", direction=3,
            dport=t.rng.integers(1000, 60000, 200 * SECONDS))  # fmt: skip
    for src in ("10.244.0.6", "172.17.0.2", "10.244.0.9", "192.0.2.1"):
        t.flows(steady(5, SECONDS, t.rng), 0, 60, src=src, dport=53, proto=17, direction=3)
    t.drops(steady(8, SECONDS, t.rng), src="10.244.0.6", dport=443)
    found = Model(HookInfo("fentry"), Clock(0), START)
    names = Names(netns=spaces(INIT, CART, WEB, JOB, BARE))
    found.update(Batch(t.events(0)[:0], START, names=names))
    for batch in t.batches(SECONDS):
        found.update(batch)
    return found


def held(snapshot: Snapshot) -> dict[str, int]:
    return {one.key: one.held for one in snapshot.culprits}


def test_sources_are_summed_up_by_pod_and_by_its_namespace() -> None:
    m = model()
    src = held(m.snapshot("src", limit=99))
    none = src["10.244.0.9"] + src["192.0.2.1"]
    assert held(m.snapshot("pod")) == {
        "k8s:shop/cart-0": src["10.244.0.5"], "k8s:shop/web-7d9f-x2k": src["10.244.0.6"],
        "docker:job": src["172.17.0.2"], "(no container's address)": none,
    }  # fmt: skip
    assert held(m.snapshot("pod-namespace")) == {
        "k8s:shop": src["10.244.0.5"] + src["10.244.0.6"],
        "(no pod's address)": src["172.17.0.2"] + none,
    }
    some = held(m.snapshot("pod", scope=Scope(port=53)))
    assert some["k8s:shop/web-7d9f-x2k"] == src["10.244.0.6"]
    assert some.get("k8s:shop/cart-0", 0) < src["10.244.0.5"]
    assert "destination" in Scope(dst=(parse_network("192.0.2.1"),)).refusal("pod")


def test_rows_and_victims_name_the_pod() -> None:
    snapshot = model().snapshot("src", limit=99)
    pods = {one.src: one.pod for one in snapshot.culprits}
    assert pods["10.244.0.5"] == "k8s:shop/cart-0"
    assert pods["10.244.0.9"] == pods["192.0.2.1"] == ""
    assert {one.pod for one in snapshot.victims} == {"k8s:shop/web-7d9f-x2k"}
    assert [one.src for one in filtered(snapshot, "owner=cart").culprits] == ["10.244.0.5"]
    out = io.StringIO()
    Console(file=out, width=160).print(frame(snapshot, 160))
    (row,) = (line for line in out.getvalue().splitlines() if line.startswith(" 10.244.0.5 "))
    assert "shop/cart-0" in row
    who = [one.text for one in snapshot.who]
    assert any("10.244.0.5 (k8s:shop/cart-0)" in text for text in who), who


def test_only_what_one_namespace_has_is_told() -> None:
    pods = Pods()
    pods.update(spaces(INIT, CART, WEB, JOB, BARE))
    assert pods.known == {
        "10.244.0.5": "k8s:shop/cart-0", "10.244.0.6": "k8s:shop/web-7d9f-x2k",
        "2001:db8::6": "k8s:shop/web-7d9f-x2k", "172.17.0.2": "docker:job",
    }  # fmt: skip
    twin = Netns(NETNS + 9, "podman:twin", ("172.17.0.2",))
    pods.update(spaces(twin))
    assert "172.17.0.2" not in pods.known
    pods.update(spaces(Netns(twin.inum, twin.name)))  # it went
    assert pods.known["172.17.0.2"] == "docker:job"
    # What went keeps its address until another comes with it.
    pods.update(spaces(Netns(CART.inum, CART.name)))
    assert pods.known["10.244.0.5"] == "k8s:shop/cart-0"
    pods.update(spaces(Netns(NETNS + 7, "k8s:shop/cart-1", ("10.244.0.5",))))
    assert pods.known["10.244.0.5"] == "k8s:shop/cart-1"
    # An address that is another's now: the host's own.
    pods.update(spaces(Netns(NETNS, "init", (*INIT.addresses, "10.244.0.6"))))
    assert "10.244.0.6" not in pods.known


def test_what_is_remembered_has_a_bound() -> None:
    pods = Pods()
    for number in range(5000):
        one = Netns(NETNS + number, f"k8s:a/{number}", (f"10.{number >> 8}.{number & 255}.7",))
        pods.update({one.inum: one})
        pods.update({one.inum: Netns(one.inum, one.name)})
    assert len(pods.known) <= 4096
    assert "k8s:a/4999" in pods.known.values()
