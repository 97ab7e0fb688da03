"""Makes a container image of the one file's content: files of the OCI layout, no engine asked.

Nothing is in it but ctrace with its own Python and C library, so there is no shell and no
other tool. One archive holds the images of all machines that are given; the same content
makes the same archive to the byte.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

MACHINES: Final = {"x86_64": "amd64", "aarch64": "arm64"}
PLACE: Final = "usr/lib/ctrace"
"""packaging/bundle.py has written it into python."""
START: Final = b"""#!/usr/lib/ctrace/bin/python3.9 -IS
from ctrace.cli import main
main()
"""
FOLDERS: Final = {
    "data": 0o700, "proc": 0o755, "sys": 0o755, "dev": 0o755, "run": 0o755, "run/netns": 0o755,
    "tmp": 0o1777, "var": 0o755, "var/cache": 0o755, "usr": 0o755, "usr/bin": 0o755,
    "usr/lib": 0o755, "etc": 0o755,
}  # fmt: skip
FILES: Final = {
    "usr/bin/ctrace": (START, 0o755),
    "etc/passwd": (b"root:x:0:0:root:/:/usr/bin/ctrace\n", 0o644),
    "etc/group": (b"root:x:0:\n", 0o644),
}
OCI: Final = "application/vnd.oci.image."


def main() -> None:
    """``image.py VERSION TARGET MACHINE=FOLDER...``."""
    version, target, *given = sys.argv[1:]
    trees = {machine: Path(folder) for machine, _, folder in (one.partition("=") for one in given)}
    data = make(version, trees)
    Path(target).write_bytes(data)
    print(f"{target}: {len(data) / 1e6:.1f} MB")


def make(version: str, trees: Mapping[str, Path]) -> bytes:
    """The archive. ``trees``: machine to the folder that belongs at :data:`PLACE`."""
    blobs: dict[str, bytes] = {}

    def keep(data: bytes, kind: str, **more: Any) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        blobs[f"blobs/sha256/{digest}"] = data
        return {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(data), **more}

    images = []
    for machine, tree in trees.items():
        content = layer(tree)
        platform = {"architecture": MACHINES[machine], "os": "linux"}
        settings = {
            **platform,
            "config": {
                "Entrypoint": ["/usr/bin/ctrace"],
                "Cmd": ["--help"],
                "Env": ["PATH=/usr/bin", "TERM=xterm-256color"],
                "WorkingDir": "/data",
                "Labels": {
                    "org.opencontainers.image.title": "ctrace",
                    "org.opencontainers.image.version": version,
                    "org.opencontainers.image.licenses": "GPL-2.0-only",
                },
            },
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{sha256(content)}"]},
        }
        packed = gzip.compress(content, 6, mtime=0)
        manifest = {
            "schemaVersion": 2,
            "mediaType": f"{OCI}manifest.v1+json",
            "config": keep(encoded(settings), f"{OCI}config.v1+json"),
            "layers": [keep(packed, f"{OCI}layer.v1.tar+gzip")],
        }
        images.append(keep(encoded(manifest), f"{OCI}manifest.v1+json", platform=platform))
    index = {"schemaVersion": 2, "mediaType": f"{OCI}index.v1+json", "manifests": images}
    named = keep(
        encoded(index), f"{OCI}index.v1+json",
        annotations={
            "org.opencontainers.image.ref.name": version,
            "io.containerd.image.name": f"docker.io/library/ctrace:{version}",
        },
    )  # fmt: skip
    blobs["oci-layout"] = encoded({"imageLayoutVersion": "1.0.0"})
    blobs["index.json"] = encoded({**index, "manifests": [named]})
    return archive({name: (data, 0o644) for name, data in blobs.items()}, {})


def layer(tree: Path) -> bytes:
    """The root of the image, not packed."""
    files, folders = dict(FILES), {**FOLDERS, PLACE: 0o755}
    for path in sorted(tree.rglob("*")):
        name = f"{PLACE}/{path.relative_to(tree)}"
        if path.is_dir():
            folders[name] = 0o755
        else:
            files[name] = path.read_bytes(), 0o755 if path.stat().st_mode & 0o100 else 0o644
    return archive(files, folders)


def archive(files: Mapping[str, tuple[bytes, int]], folders: Mapping[str, int]) -> bytes:
    """A tar of root's files, in the order of their names."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in sorted({*files, *folders}):
            info = tarfile.TarInfo(name)
            data, info.mode = files.get(name, (b"", folders.get(name, 0)))
            info.type = tarfile.DIRTYPE if name in folders else tarfile.REGTYPE
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def encoded(value: Any) -> bytes:
    """JSON that is the same for the same content."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def sha256(data: bytes) -> str:
    """In hexadecimal."""
    return hashlib.sha256(data).hexdigest()


if __name__ == "__main__":
    main()
