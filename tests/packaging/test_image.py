"""The container image: every blob is what its name says, and what is in it starts.

Made of a small folder here; ``scripts/image --test`` names the real one, which is unpacked as
an engine would and run in a root of its own.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import json
import os
import re
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SHARE = ROOT / "ctrace/share"
MANIFEST = SHARE / "kubernetes/ctrace.yaml"
IMAGE = Path(os.environ.get("CTRACE_IMAGE", ""))


def read(tar: tarfile.TarFile, name: str) -> bytes:
    found = tar.extractfile(name)
    return found.read() if found else b""


class Archive:
    """An OCI archive read by the rules of its specification."""

    def __init__(self, data: bytes) -> None:
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            self.files = {member.name: read(tar, member.name) for member in tar}
        assert json.loads(self.file("oci-layout")) == {"imageLayoutVersion": "1.0.0"}

    def file(self, name: str) -> bytes:
        return self.files[name]

    def blob(self, told: dict[str, Any]) -> bytes:
        algorithm, _, digest = told["digest"].partition(":")
        data = self.file(f"blobs/{algorithm}/{digest}")
        assert hashlib.new(algorithm, data).hexdigest() == digest
        assert len(data) == told["size"]
        return data

    def images(self) -> dict[str, tuple[dict[str, Any], bytes]]:
        """Architecture to the image's settings and its only layer, unpacked."""
        (named,) = json.loads(self.file("index.json"))["manifests"]
        found = {}
        for entry in json.loads(self.blob(named))["manifests"]:
            manifest = json.loads(self.blob(entry))
            settings = json.loads(self.blob(manifest["config"]))
            (packed,) = manifest["layers"]
            layer = gzip.decompress(self.blob(packed))
            assert settings["rootfs"]["diff_ids"] == [f"sha256:{hashlib.sha256(layer).hexdigest()}"]
            assert settings["architecture"] == entry["platform"]["architecture"]
            found[settings["architecture"]] = settings, layer
        return found


def made(trees: dict[str, Path]) -> bytes:
    spec = importlib.util.spec_from_file_location("image", ROOT / "packaging/image.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    data: bytes = module.make("1.2.3", trees)
    return data


def test_every_blob_is_what_its_name_says(tmp_path: Path) -> None:
    trees = {"x86_64": tmp_path / "x", "aarch64": tmp_path / "a"}
    for machine, tree in trees.items():
        (tree / "bin").mkdir(parents=True)
        (tree / "bin/python3.9").write_text(machine)
        (tree / "bin/python3.9").chmod(0o755)
        (tree / f"{'long' * 40}.pyc").write_text("module")
    data = made(trees)
    assert made(trees) == data
    images = Archive(data).images()
    assert set(images) == {"amd64", "arm64"}
    settings, layer = images["arm64"]
    (start,) = settings["config"]["Entrypoint"]
    with tarfile.open(fileobj=io.BytesIO(layer)) as tar:
        assert read(tar, "usr/lib/ctrace/bin/python3.9") == b"aarch64"
        assert tar.getmember("usr/lib/ctrace/bin/python3.9").mode == 0o755
        assert tar.getmember("tmp").mode == 0o1777
        assert tar.getmember(start[1:]).mode == 0o755
        seen = {""}
        for member in tar:  # a folder comes before what is in it
            assert (member.uid, member.gid, member.mtime) == (0, 0, 0)
            assert member.name.rpartition("/")[0] in seen
            seen.add(member.name)


@pytest.mark.kernel
@pytest.mark.slow
@pytest.mark.skipif(not IMAGE.is_file(), reason="scripts/image --test names one")
def test_what_is_in_it_starts(tmp_path: Path) -> None:
    machine = {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine]
    settings, layer = Archive(IMAGE.read_bytes()).images()[machine]
    with tarfile.open(fileobj=io.BytesIO(layer)) as tar:
        tar.extractall(tmp_path)
    config = settings["config"]
    script = """
        set -e; R=$1; shift
        mount --bind $R $R; mount -o remount,bind,ro $R; cd $R
        for folder in proc sys dev; do mount --rbind /$folder $R/$folder; done
        mount -t tmpfs none $R/var/cache; mount -t tmpfs none $R/tmp
        exec env -i "$@"
    """

    def run(*arguments: str) -> str:
        return subprocess.run(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh",
             str(tmp_path), *config["Env"], "/usr/sbin/chroot", str(tmp_path),
             *config["Entrypoint"], *arguments],
            check=True, capture_output=True, text=True, timeout=300,
        ).stdout  # fmt: skip

    assert "Usage: ctrace" in run(*config["Cmd"])
    told = run("metrics", "--once")
    assert 'ctrace_table_entries{netns="init"}' in told


# -- Kubernetes -----------------------------------------------------------------------------


def documents(path: Path) -> dict[str, Any]:
    yaml = pytest.importorskip("yaml")
    return {one["kind"]: one for one in yaml.safe_load_all(path.read_text())}


def test_the_daemon_set_has_the_rights_of_the_units() -> None:
    pod = documents(MANIFEST)["DaemonSet"]["spec"]["template"]["spec"]
    assert pod["hostPID"]
    assert pod["hostNetwork"]
    assert not pod["automountServiceAccountToken"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    for container in pod["containers"]:
        unit = (SHARE / f"systemd/ctrace-{container['name']}.service").read_text()
        allowed = re.search(r"^CapabilityBoundingSet=(.*)$", unit, re.M)
        memory = re.search(r"^MemoryMax=(\d+M)$", unit, re.M)
        assert allowed
        assert memory
        rights = container["securityContext"]
        assert rights["capabilities"]["drop"] == ["ALL"]
        assert {f"CAP_{name}" for name in rights["capabilities"]["add"]} == set(allowed[1].split())
        assert rights["readOnlyRootFilesystem"]
        # the API server refuses it together with SYS_ADMIN
        assert "allowPrivilegeEscalation" not in rights
        assert container["resources"]["limits"]["memory"] == f"{memory[1]}i"
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes


@pytest.mark.parametrize("name", ["metrics", "recorder"])
def test_the_daemon_sets_commands_are_ours(name: str) -> None:
    from ctrace.cli import cli

    pod = documents(MANIFEST)["DaemonSet"]["spec"]["template"]["spec"]
    (container,) = [one for one in pod["containers"] if one["name"] == name]
    verb, *arguments = container["args"]
    told = [argument.replace("$(NODE_ADDRESS)", "192.0.2.1") for argument in arguments]
    with cli.make_context("ctrace", [verb]) as context:
        command = cli.get_command(context, verb)
        assert command is not None
        command.make_context(verb, told, parent=context).close()


def test_prometheus_finds_the_daemon_sets_port() -> None:
    daemons = documents(MANIFEST)["DaemonSet"]
    monitor = documents(SHARE / "kubernetes/podmonitor.yaml")["PodMonitor"]
    assert monitor["metadata"]["namespace"] == daemons["metadata"]["namespace"]
    labels = daemons["spec"]["template"]["metadata"]["labels"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert daemons["spec"]["selector"]["matchLabels"].items() <= labels.items()
    ports = {port["name"] for one in daemons["spec"]["template"]["spec"]["containers"]
             for port in one.get("ports", ())}  # fmt: skip
    assert {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]} <= ports
