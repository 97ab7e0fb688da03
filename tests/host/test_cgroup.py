"""Names from cgroup paths, in the forms that runtimes and systemd write."""

from __future__ import annotations

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
