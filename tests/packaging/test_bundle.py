"""The one file, in roots that have neither Python, compiler nor network.

Asked for by name: ``scripts/bundle --test``. In scripts/vm its table is full before the
file gets there.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kit import traffic
from kit.machines import families

from ctrace.host import ctnetlink
from ctrace.lab import Lab, Node

BUNDLE = Path(os.environ.get("CTRACE_BUNDLE", ""))
KERNEL = os.environ.get("CTRACE_VM", "")
CACHE = Path(os.environ.get("XDG_CACHE_HOME", "/root/.cache")) / "ctrace/roots"
SUITES = ("bullseye",) if KERNEL else ("bullseye", "bookworm", "trixie")
PLACES = ("/var/cache", "/run", "/dev/shm", "/tmp")
LIMIT = Path("/proc/sys/net/netfilter/nf_conntrack_max")
pytestmark = [
    pytest.mark.kernel,
    pytest.mark.slow,
    pytest.mark.skipif(not BUNDLE.is_file(), reason="scripts/bundle --test names one"),
    pytest.mark.timeout(900),
]


class Root:
    """A host that has nothing but the file."""

    def __init__(self, place: Path) -> None:
        self.place = place
        shutil.copy(BUNDLE, place / "root/ctrace")

    def run(self, *arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
        """The file with these arguments there; ``before``: shell, with $R the root."""
        script = f"""
            set -e; R=$1; shift
            for folder in proc sys dev; do mount --rbind /$folder $R/$folder; done
            mount -t tmpfs none $R/dev/shm; mount -t tmpfs -o noexec none $R/run
            {before}
            exec chroot $R env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin TERM=xterm /root/ctrace "$@"
        """
        return subprocess.run(
            ["unshare", "--mount", "--net", "sh", "-c", script, "sh", str(self.place), *arguments],
            capture_output=True, text=True, check=False, cwd="/", timeout=600,
        )  # fmt: skip

    def top(self, seconds: int, family: str) -> dict[str, Any]:
        done = self.run("top", str(seconds), "--once", "-o", "json", "--hooks", family)
        assert done.returncode == 0, done.stderr
        told: dict[str, Any] = json.loads(done.stdout)
        assert told["hooks"]["family"] == family
        return told


@pytest.fixture(scope="module", params=SUITES)
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Root:
    place = tmp_path_factory.mktemp(request.param)
    subprocess.run(["tar", "-xf", CACHE / f"{request.param}.tar", "-C", place], check=True)
    shutil.rmtree(place / "usr/lib/python3", ignore_errors=True)
    assert not list(place.glob("usr/bin/python*"))
    return Root(place)


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with Lab() as lab:
        a, b = (lab.namespace(name, track=True) for name in ("bundle-a", "bundle-b"))
        lab.link(a, b)
        a.peer = b.addresses[a.name][0]  # type: ignore[attr-defined]
        yield a


def table(told: dict[str, Any], node: Node) -> dict[str, Any]:
    found: dict[str, Any] = next(row for row in told["tables"] if row["netns"] == node.inum)
    return found


def test_it_unpacks_once_into_a_private_folder(root: Root) -> None:
    assert root.run("--version").stdout.startswith("ctrace, version ")
    cache = root.place / "var/cache/ctrace"
    (unpacked,) = cache.glob("bundle-*")
    first = unpacked.stat().st_ino
    assert unpacked.stat().st_mode & 0o777 == cache.stat().st_mode & 0o777 == 0o700
    assert root.run("--version").returncode == 0
    assert [path.stat().st_ino for path in cache.glob("bundle-*")] == [first]
    assert not list(cache.glob(".bundle-*"))
    assert sorted(path.name for path in (root.place / "root").iterdir() if path.name[0] != ".") == [
        "ctrace"
    ]


def test_what_a_killed_start_left_half_goes_with_the_next(root: Root) -> None:
    cache = root.place / "var/cache/ctrace"
    shutil.rmtree(cache, ignore_errors=True)
    (cache / f".bundle-{'0' * 32}.1/lib").mkdir(parents=True)
    (cache / f".bundle-{'0' * 32}.1/lib/half").write_bytes(bytes(1 << 20))
    cache.chmod(0o700)
    assert root.run("--version").returncode == 0
    assert [path.name[:7] for path in cache.iterdir()] == ["bundle-"]


@pytest.mark.parametrize("family", families())
def test_its_counts_are_the_kernels(root: Root, node: Node, family: str) -> None:
    ctnetlink.fill(node.path, 700)
    row = table(root.top(1, family), node)
    assert row["count"] == node.count() >= 700
    assert row["off_by"] == dict.fromkeys(row["off_by"], 0)


@pytest.mark.skipif(not KERNEL, reason="fills the whole machine's table")
@pytest.mark.parametrize("family", families())
def test_it_comes_while_the_table_is_full(root: Root, node: Node, family: str) -> None:
    kept, stop = LIMIT.read_text(), threading.Event()
    ctnetlink.fill(node.path, 700)
    LIMIT.write_text(str(node.count()))
    before = node.stats()["drop"]

    def burn() -> None:
        while not stop.wait(0.2):
            traffic.udp_flows(node, (node.peer, 9), 5, first_port=30000)  # type: ignore[attr-defined]

    burning = threading.Thread(target=burn)
    burning.start()
    try:
        row = table(told := root.top(5, family), node)
    finally:
        stop.set()
        burning.join()
        LIMIT.write_text(kept)
    assert row["count"] == row["max"]
    # refusals go on while it starts, looks and ends: it cannot have seen them all
    assert 5 <= row["totals"]["drop"] <= node.stats()["drop"] - before
    if told["hooks"]["drop_tuples"]:
        assert told["victims"]


def test_it_knows_passwords(root: Root) -> None:
    """The hashes are checked by a C library that came with it: these roots' may be another."""
    (root.place / "root/web.yml").write_text(
        "basic_auth_users:\n"
        "  prometheus: $2b$05$CCCCCCCCCCCCCCCCCCCCC.E5YPO9kmyuRGyh0XouQYb4YMJKvyOeW\n"
    )
    bare = "find $R/lib $R/usr/lib -name 'libcrypt*' -exec mount --bind /dev/null {} ';'"
    done = root.run("metrics", "--once", "--web.config.file", "/root/web.yml", before=bare)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("# EOF\n")


def everywhere(options: str) -> str:
    return "; ".join(f"mount -t tmpfs -o {options} none $R{place}" for place in PLACES)


@pytest.mark.parametrize(
    ("before", "word"),
    [
        (everywhere("noexec"), "noexec"),
        (everywhere("size=4m"), "MB free"),
        (everywhere("ro"), "Read-only"),
    ],
    ids=["noexec", "full", "read-only"],
)
def test_no_place_to_unpack_is_one_line(root: Root, before: str, word: str) -> None:
    done = root.run("--version", before=before)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert all(f"{place}" in done.stderr for place in PLACES)
    assert done.stderr.count(word) == len(PLACES)
    assert "mount -t tmpfs" in done.stderr


def test_a_place_that_will_not_do_is_passed_over(root: Root) -> None:
    noexec = "mount -t tmpfs -o noexec none $R/var/cache; mount -t tmpfs -o ro none $R/run"
    assert root.run("--version", before=noexec).returncode == 0


def test_another_users_folder_is_not_trusted(root: Root) -> None:
    open_to_all = "mount -t tmpfs none $R/var/cache; mkdir -m 777 $R/var/cache/ctrace; "
    for place in PLACES[1:]:
        open_to_all += f"mount -t tmpfs -o ro none $R{place}; "
    done = root.run("--version", before=open_to_all)
    assert done.returncode == 1
    assert "/var/cache/ctrace: others may write there" in done.stderr


@pytest.mark.parametrize("keep", [0.5, 0.999999])
def test_half_a_file_is_one_line(root: Root, tmp_path: Path, keep: float) -> None:
    cut = tmp_path / "cut"
    shutil.copy(BUNDLE, cut)
    os.truncate(cut, int(BUNDLE.stat().st_size * keep))
    done = subprocess.run([cut, "--version"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "ctrace: this file is not whole: copy it again\n"


@pytest.mark.parametrize("size", [64, 1])  # what no block's form shows, the checksum does
def test_a_changed_file_is_one_line(root: Root, size: int) -> None:
    bad = root.place / "root/bad"
    data = bytearray(BUNDLE.read_bytes())
    for at in range(len(data) // 2, len(data) // 2 + size):
        data[at] ^= 0xFF
    data[-48:-44] = b"0000"  # a key that nothing was unpacked under
    bad.write_bytes(data)
    bad.chmod(0o755)
    done = subprocess.run(
        ["chroot", root.place, "/root/bad", "--version"],
        capture_output=True,
        text=True,
        check=False,
    )
    bad.unlink()
    assert done.returncode == 1
    assert done.stderr == "ctrace: this file is damaged: copy it again\n"
    assert not list((root.place / "var/cache/ctrace").glob(".bundle-*"))
