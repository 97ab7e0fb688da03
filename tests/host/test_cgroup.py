"""Names from cgroup paths, in the forms that runtimes and systemd write."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ctrace.host import cgroup

ID = "3f4e" + "0" * 56 + "beef"


@pytest.mark.parametrize(
    ("path", "container"),
    [
        (f"/system.slice/docker-{ID}.scope", "docker:3f4e00000000"),
        (f"/docker/{ID}", "docker:3f4e00000000"),
        (f"/docker/{ID}/system.slice/nginx.service", "docker:3f4e00000000"),
        (f"/machine.slice/libpod-{ID}.scope/container", "podman:3f4e00000000"),
        (
            "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice/"
            f"cri-containerd-{ID}.scope",
            "k8s:3f4e00000000",
        ),
        (f"/kubepods/besteffort/pod0a1b/{ID}", "k8s:3f4e00000000"),
        (f"/kubepods.slice/kubepods-pod1.slice/crio-{ID}.scope", "k8s:3f4e00000000"),
        (f"/system.slice/nerdctl-{ID}.scope", "containerd:3f4e00000000"),
        (f"/default/{ID}", "container:3f4e00000000"),
        ("/lxc/web1", "lxc:web1"),
        ("/lxc.payload.web1/init.scope", "machine:web1"),
        ("/machine.slice/machine-web\\x2d1.scope", "machine:web-1"),
        ("/system.slice/nginx.service", ""),
        (f"/docker/{ID[:-1]}", ""),
        ("/", ""),
        ("", ""),
    ],
)
def test_container(path: str, container: str) -> None:
    assert cgroup.container(path) == container


@pytest.mark.parametrize(
    ("path", "unit"),
    [
        ("/system.slice/nginx.service", "nginx.service"),
        ("/user.slice/user-0.slice/user@0.service/app.slice/db.service", "db.service"),
        ("/user.slice/user-0.slice/session-3.scope", "session-3.scope"),
        ("/system.slice/system-getty.slice/getty@tty1.service", "getty@tty1.service"),
        ("/system.slice/a\\x2db.service", "a-b.service"),
        ("/system.slice", ""),
        ("/", ""),
    ],
)
def test_unit(path: str, unit: str) -> None:
    assert cgroup.unit(path) == unit


def test_label_prefers_the_container_and_falls_back_to_the_path() -> None:
    assert cgroup.label(f"/docker/{ID}/system.slice/nginx.service") == "docker:3f4e00000000"
    assert cgroup.label("/system.slice/nginx.service") == "nginx.service"
    assert cgroup.label("/batch/7") == "/batch/7"
    assert cgroup.label("/") == ""


# The first process of a PID namespace, in the host's root; its child in another, as a container
# with the host's processes is.
_IN_A_CONTAINER = """
import os, sys
from ctrace.host import cgroup
host, container, *paths = sys.argv[1:]
assert os.getpid() == 1
go, ready = os.pipe()
child = os.fork()
if child:
    os.chroot(host)
    os.write(ready, b"x")
    sys.exit(os.waitpid(child, 0)[1])
os.read(go, 1)
os.mkdir(container + "/proc")
os.system(f"mount -t proc none {container}/proc")
os.chroot(container)
for path in paths:
    print(cgroup.container(path))
"""


@pytest.mark.kernel
@pytest.mark.skipif(os.geteuid() != 0, reason="makes namespaces")
def test_a_container_finds_the_hosts_names_below_the_first_process(tmp_path: Path) -> None:
    host, container = tmp_path / "host", tmp_path / "container"
    container.mkdir()
    logs = host / "var/log/containers"
    logs.mkdir(parents=True)
    # the kubelet's link leads to a file that is not below this root
    (logs / f"web-5d4_shop_nginx-{ID}.log").symlink_to("/var/log/pods/shop_web/nginx/0.log")
    uid = "0a1b2c3d-0000-4000-8000-00000000beef"
    (host / f"var/log/pods/shop_cart-0_{uid}").mkdir(parents=True)
    docker = host / f"var/lib/docker/containers/{ID}"
    docker.mkdir(parents=True)
    (docker / "config.v2.json").write_text('{"Name": "/shop"}')
    done = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", sys.executable, "-c", _IN_A_CONTAINER,
         host, container, f"/kubepods/besteffort/pod0a1b/{ID}", f"/docker/{ID}",
         f"/docker/{ID[:-1]}0", f"/../../pod0a1b/{ID}", f"/../cri-containerd-{ID}.scope",
         f"/../cri-containerd-{ID[:-1]}0.scope",
         # what keeps a pod's network namespace writes no log: the pod is known by its own id
         f"/kubepods/burstable/pod{uid}/{ID[:-1]}1", f"/../../pod{uid}/{ID[:-1]}1",
         "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod"
         f"{uid.replace('-', '_')}.slice/crio-{ID[:-1]}1.scope"],
        check=False, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        "k8s:shop/web-5d4", "docker:shop", f"docker:{ID[:12]}",
        "k8s:shop/web-5d4", "k8s:shop/web-5d4", f"containerd:{ID[:12]}",
        "k8s:shop/cart-0", "k8s:shop/cart-0", "k8s:shop/cart-0",
    ]  # fmt: skip
