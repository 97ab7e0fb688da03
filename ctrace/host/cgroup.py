"""Cgroup paths to the names that people use: containers and systemd units.

No runtime's API is asked. A container runtime writes the container's id into the
cgroup's path, and Docker's and Kubernetes' own files, where they can be read,
turn the id into a name (a pod's also the pod's own id, for the process that keeps its
network namespace writes no log): here, or from a container that sees the host's processes,
below the first process's root. Who owns a folder below names it as he likes: names come
back harmless, paths as they are.
"""

from __future__ import annotations

import json
import os
import re
from functools import lru_cache
from glob import escape, glob

from ctrace.names import clean

_ID = r"[0-9a-f]{64}"
_SCOPE = re.compile(rf"^(docker|libpod|cri-containerd|crio|containerd|nerdctl)-({_ID})\.scope$")
_NAMED_SCOPE = re.compile(
    r"^(?:machine-(.+)\.scope|lxc\.payload\.(.+)|systemd-nspawn@(.+)\.service)$"
)
_BARE_ID = re.compile(rf"^(?:crio-)?({_ID})$")
_POD = re.compile(r"(?:^|-)pod([0-9a-f]{8}[0-9a-f_-]{24,28})(?:\.slice)?$")
_UNIT = re.compile(r"^[^/]+\.(service|scope|socket|mount|slice)$")
_HEX = re.compile(r"\\x([0-9a-f]{2})")

_RUNTIMES = {
    "docker": "docker",
    "libpod": "podman",
    "cri-containerd": "containerd",
    "crio": "cri-o",
    "containerd": "containerd",
    "nerdctl": "containerd",
}
_ROOTS = ("", "/proc/1/root")
_PARENTS = {"docker": "docker", "libpod_parent": "podman", "lxc": "lxc", "ecs": "ecs"}


def container(path: str) -> str:
    """The container that a cgroup path belongs to, as ``runtime:name``; empty for none.

    ``path`` is relative to a hierarchy's root, as in /proc/PID/cgroup. The name is
    the runtime's where its files tell it, else the id's first twelve digits.
    """
    parts = [part for part in path.split("/") if part]
    uid = next((found[1].replace("_", "-") for found in map(_POD.search, parts) if found), "")

    def is_pod(ident: str) -> bool:
        # seen from a pod's own control group (``/../../pod2/ID``) the first folders have no name
        return any(part.startswith("kubepods") for part in parts) or (
            ".." in parts and bool(_name("k8s", ident, uid))
        )

    def called(runtime: str, ident: str) -> str:
        return f"{runtime}:{clean(_name(runtime, ident, uid)) or ident[:12]}"

    # The innermost match wins: a container may itself run containers.
    for at in range(len(parts) - 1, -1, -1):
        part = parts[at]
        if scope := _SCOPE.match(part):
            return called("k8s" if is_pod(scope[2]) else _RUNTIMES[scope[1]], scope[2])
        if bare := _BARE_ID.match(part):
            parent = parts[at - 1] if at else ""
            runtime = "k8s" if is_pod(bare[1]) else _PARENTS.get(parent, "container")
            return called(runtime, bare[1])
        if named := _NAMED_SCOPE.match(part):
            return "machine:" + clean(_unescape(next(name for name in named.groups() if name)))
        if at and parts[at - 1] == "lxc":
            return f"lxc:{clean(part)}"
    return ""


def unit(path: str) -> str:
    """The systemd unit of a cgroup path (``nginx.service``), innermost service first.

    Empty when the path holds none. Slices are grouping, not programs: never returned.
    """
    parts = [part for part in path.split("/") if _UNIT.match(part)]
    for suffix in (".service", ".scope", ".socket", ".mount"):
        for part in reversed(parts):
            if part.endswith(suffix):
                return clean(_unescape(part))
    return ""


def label(path: str) -> str:
    """What to call a cgroup: its container, else its unit, else the path itself."""
    return container(path) or unit(path) or ("" if path in ("", "/") else clean(path))


def of_pid(pid: int) -> str:
    """A process's cgroup path: from v2, or on v1 the one of systemd's own hierarchy.

    Empty when the process has gone.
    """
    try:
        with open(f"/proc/{pid}/cgroup", "rb") as file:
            # A folder's name may hold every byte but a slash, a newline and a zero.
            lines = os.fsdecode(file.read()).rstrip("\n").split("\n")
    except OSError:
        return ""
    found = {}
    for line in filter(None, lines):
        _, controllers, path = line.split(":", 2)
        found[controllers] = path
    paths = [found.get(name, "") for name in ("", "name=systemd", "memory", "pids")]
    return next((path for path in paths if path not in ("", "/")), "/" if found else "")


def _unescape(name: str) -> str:
    return _HEX.sub(lambda match: chr(int(match[1], 16)), name)


@lru_cache(maxsize=4096)
def _name(runtime: str, ident: str, uid: str) -> str:
    """``uid``: the pod's id."""
    for root in _ROOTS:
        if runtime == "docker":
            try:
                with open(f"{root}/var/lib/docker/containers/{ident}/config.v2.json") as file:
                    return str(json.load(file)["Name"]).lstrip("/")
            except (OSError, ValueError, KeyError):
                continue
        if runtime == "k8s":
            # The kubelet's folders, there before a pod's first process: NAMESPACE_POD_UID
            for folder in glob(f"{root}/var/log/pods/*_{escape(uid)}") if uid else ():
                return "/".join(os.path.basename(folder).split("_")[:2])
            # and its links: POD_NAMESPACE_CONTAINER-ID.log
            for link in glob(f"{root}/var/log/containers/*-{escape(ident)}.log"):
                pod, _, rest = os.path.basename(link).partition("_")
                return f"{rest.partition('_')[0]}/{pod}"
    return ""
