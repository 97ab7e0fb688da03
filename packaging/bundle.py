"""Makes the one file: ctrace with all that it needs, for a host that has nothing.

Python and the C library are Debian bullseye's, the Python packages are wheels; nothing
of them is run here but Python itself, to compile modules, so one machine makes the files
of both processors. The loader and the C library are inside: any libc will do over there.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
SUITE: Final = "bullseye"
MACHINES: Final = {"x86_64": "amd64", "aarch64": "arm64"}
DEBS: Final = (
    "python3.9-minimal", "libpython3.9-minimal", "libpython3.9-stdlib", "libc6", "libgcc-s1",
    "libstdc++6", "zlib1g", "libexpat1", "libssl1.1", "libbz2-1.0", "liblzma5", "libffi7",
    "libatomic1", "libmpdec3", "libcrypt1", "libzstd-dev",
)  # fmt: skip
WHEELS: Final = ROOT / "packaging/locks/bundle.txt"
"""What pyproject.toml asks for, with its extras but pyarrow, which is as large as all the rest.
Versions and hashes are pinned (scripts/lock)."""
LOADER_ROOM: Final = 200
"""Bytes for the loader's name in python, which packaging/launcher.c writes there."""
PLACE: Final = "/usr/lib/ctrace"
"""Where packages and images have it."""
TRAILER: Final = struct.Struct("<QQ32s16s")
MAGIC: Final = b"ctrace-bundle-1"
STDLIB_UNUSED: Final = (
    "test", "tests", "idlelib", "tkinter", "lib2to3", "distutils", "ensurepip", "turtledemo",
    "pydoc_data", "sqlite3", "dbm", "curses", "turtle.py", "pydoc.py", "sitecustomize.py",
    "__phello__.foo.py",
)  # fmt: skip
EXTENSIONS_UNUSED: Final = re.compile(
    r"_(test|xxtest|xxsub|ctypes_test|curses|dbm|sqlite3|crypt|lsprof|uuid)|xxlimited|nis|"
    r"ossaudiodev|parser|readline|audioop"
)
PACKAGES_UNUSED: Final = (
    "numpy/**/tests", "numpy/f2py", "numpy/distutils", "numpy/doc", "numpy/_core/include",
    "numpy/_core/lib", "numpy/random/lib", "numpy/**/*.pyi", "numpy/_pyinstaller",
    "zstandard/_cffi*.so", "**/*.c", "**/*.pxd", "**/*.pyx",
    "**/_simd.*.so", "numpy/_core/_[orsu]*_tests.*.so", "bin",
)  # fmt: skip


def main() -> None:
    """Make what was asked for, into dist/."""
    parser = argparse.ArgumentParser(prog="scripts/bundle", description="Make dist/ctrace-MACHINE")
    parser.add_argument("machine", nargs="*", choices=[[], *MACHINES], help="default: both")
    parser.add_argument("--folder", action="store_true", help=f"also dist/MACHINE, for {PLACE}")
    told = parser.parse_args()
    for machine in told.machine or MACHINES:
        print(make(machine, told.folder))


def make(machine: str, keep: bool) -> str:
    """One file; a sentence that says which and how large."""
    target = ROOT / "dist" / f"ctrace-{machine}"
    target.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="ctrace-bundle.") as name:
        work = Path(name)
        system, tree = work / "system", work / "tree"
        fetch_debs(machine, work / "apt", system)
        wheels = fetch_wheels(machine, work / "wheels")
        lay_out(system, wheels, tree)
        link(machine, tree, work)
        compile_modules(machine, system, tree, work)
        check_libraries(tree)
        launcher = build_launcher(machine, system, work)
        payload = pack(tree, work)
        unpacked = sum(file.stat().st_size for file in tree.rglob("*") if file.is_file())
        key = hashlib.sha256(payload).hexdigest()[:32]
        # a block is lost by each file, and by the folders
        room = unpacked + 4096 * sum(1 for _ in tree.rglob("*"))
        draft = target.with_suffix(".new")
        draft.write_bytes(
            launcher + payload + TRAILER.pack(len(payload), room, key.encode(), MAGIC)
        )
        draft.chmod(0o755)
        draft.rename(target)
        if keep:
            settle(tree, target.parent / machine)
    size = target.stat().st_size / 1e6
    return f"{target.relative_to(ROOT)}: {size:.1f} MB, {unpacked / 1e6:.0f} MB unpacked"


def settle(tree: Path, folder: Path) -> None:
    """Where the place is known before, the loader's name can be written now."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(tree, folder)
    python = folder / "bin/python3.9"
    name = f"{PLACE}/lib/ld.so".encode().ljust(LOADER_ROOM, b"\0")
    python.write_bytes(python.read_bytes().replace(b"#" * LOADER_ROOM, name))


def run(*command: object, cwd: Path | None = None) -> None:
    """A tool; what it says is shown when it fails."""
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, check=False, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"bundle: {command[0]} failed:\n{done.stdout[-2000:]}")


# -- what goes in --------------------------------------------------------------------------


def fetch_debs(machine: str, work: Path, into: Path) -> None:
    """Debian's packages, unpacked; apt checks their signatures, and this host's lists stay."""
    architecture = MACHINES[machine]
    for folder in ("lists/partial", "archives/partial", "debs"):
        (work / folder).mkdir(parents=True)
    key = "/usr/share/keyrings/debian-archive-keyring.gpg"
    (work / "sources.list").write_text(
        f"deb [arch={architecture} signed-by={key}] {mirror()} {SUITE} main\n"
    )
    settings = {
        "Dir::Etc::SourceList": work / "sources.list", "Dir::Etc::SourceParts": "/dev/null",
        "Dir::Etc::Preferences": "/dev/null", "Dir::Etc::PreferencesParts": "/dev/null",
        "Dir::State::Lists": work / "lists", "Dir::Cache": work, "Dir::State::status": "/dev/null",
        "APT::Architecture": architecture, "APT::Architectures": architecture,
        "APT::Sandbox::User": "root", "Acquire::Languages": "none", "Acquire::Retries": 3,
        "Acquire::Check-Valid-Until": "false",  # an archived suite is not signed anew
    }  # fmt: skip
    apt = ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in settings.items())]
    print(f"bundle: fetching Debian {SUITE}'s packages for {architecture}", file=sys.stderr)
    run(*apt, "update")
    run(*apt, "download", *DEBS, cwd=work / "debs")
    for deb in sorted((work / "debs").glob("*.deb")):
        run("dpkg-deb", "-x", deb, into)


def mirror() -> str:
    """This machine's own Debian archive; elsewhere (Ubuntu) Debian's."""
    told = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(ORIGIN) $(REPO_URI)", "Created-By: Packages"],
        check=False, capture_output=True, text=True,
    ).stdout  # fmt: skip
    found = re.search(r"^Debian (?!.*(?:security|backports))(\S+)", told, re.M)
    return found[1] if found else "http://deb.debian.org/debian"


def fetch_wheels(machine: str, into: Path) -> Iterator[Path]:
    """Packages for Python 3.9 and that machine."""
    print(f"bundle: fetching wheels for {machine}", file=sys.stderr)
    run(
        sys.executable, "-I", "-m", "pip", "download", "-q", "--disable-pip-version-check",
        "-d", into, "--only-binary=:all:", "--python-version", "3.9", "--implementation", "cp",
        "--abi", "cp39", "--abi", "none", f"--platform=manylinux2014_{machine}",
        "--require-hashes", "-r", WHEELS,
    )  # fmt: skip
    return into.glob("*.whl")


def lay_out(system: Path, wheels: Iterator[Path], tree: Path) -> None:
    """``bin/``, ``lib/`` with the C library and its kin, ``lib/python3.9`` with all modules."""
    modules = tree / "lib/python3.9"
    (tree / "bin").mkdir(parents=True)
    shutil.copy(system / "usr/bin/python3.9", tree / "bin")
    shutil.copytree(
        system / "usr/lib/python3.9", modules, ignore_dangling_symlinks=True,
        ignore=shutil.ignore_patterns(*STDLIB_UNUSED),
    )  # fmt: skip
    for file in (modules / "lib-dynload").iterdir():
        if EXTENSIONS_UNUSED.match(file.name):
            file.unlink()
    for wheel in wheels:
        add_wheel(wheel, modules)
    shutil.copytree(ROOT / "ctrace", modules / "ctrace", ignore=shutil.ignore_patterns("*.pyc"))
    shutil.copytree(ROOT / "bpf", modules / "ctrace/bpf")
    for pattern in ("lib/*-linux-gnu/*.so*", "usr/lib/*-linux-gnu/*.so*"):
        for file in system.glob(pattern):
            soname = library_facts(file)[0] if file.is_file() and not file.is_symlink() else None
            if soname and not (tree / "lib" / soname).exists():
                shutil.copy(file, tree / "lib" / soname)
    loader = next((tree / "lib").glob("ld-linux-*"))
    shutil.copy(loader, tree / "lib/ld.so")


def add_wheel(wheel: Path, modules: Path) -> None:
    """A package without what nothing here imports; of its description the version remains."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if ".dist-info/" in name and not name.endswith("/METADATA"):
                continue
            archive.extract(name, modules)
    for pattern in PACKAGES_UNUSED:
        for path in list(modules.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


# -- how it is put together ----------------------------------------------------------------


def link(machine: str, tree: Path, work: Path) -> None:
    """Python finds its libraries beside it, by a loader whose name is written at unpacking."""
    python = tree / "bin/python3.9"
    run("patchelf", "--set-interpreter", "#" * LOADER_ROOM, python)
    run("patchelf", "--force-rpath", "--set-rpath", "$ORIGIN/../lib", python)
    for library in tree.glob("lib/python3.9/zstandard/*.so"):
        run(tool(machine, "strip"), "--strip-unneeded", library)  # 12 MB, nearly all symbols
    libraries = tree / "lib/python3.9/numpy.libs"
    missing: set[str] = set()
    for module in (tree / "lib/python3.9/numpy").rglob("*.so"):
        told = output("readelf", "-Ws", "--dyn-syms", module)
        missing |= set(re.findall(r"UND (scipy_\w+)", told))
    (blas,) = libraries.glob("libscipy_openblas64_*")
    for file in libraries.iterdir():
        file.unlink()
    listed = work / "blas-missing.h"
    real = re.findall(r"^\w+ (scipy_\w+)\(", (ROOT / "packaging/blas.c").read_text(), re.M)
    listed.write_text("".join(f"MISSING({name})\n" for name in sorted(missing - set(real))))
    run(
        tool(machine, "gcc"), "-O2", "-s", "-shared", "-fPIC", f"-I{work}",
        f"-Wl,-soname,{blas.name}", "-o", blas, ROOT / "packaging/blas.c",
    )  # fmt: skip


def compile_modules(machine: str, system: Path, tree: Path, work: Path) -> None:
    """Bytecode beside where sources were, never checked against them: a fast start.

    Bytecode is the same on all machines, so the x86-64 Python serves for both.
    """
    if machine != "x86_64":
        system = work / "compiler"
        fetch_debs("x86_64", work / "compiler-apt", system)
    (loader,) = system.glob("lib/x86_64-linux-gnu/ld-*.so")
    libraries = f"{system}/lib/x86_64-linux-gnu:{system}/usr/lib/x86_64-linux-gnu"
    modules = tree / "lib/python3.9"
    run(
        "env", f"PYTHONHOME={system}/usr", loader, "--library-path", libraries,
        system / "usr/bin/python3.9", "-S", "-m", "compileall", "-q", "-b", "-s", tree,
        "--invalidation-mode", "unchecked-hash", modules, cwd=work,
    )  # fmt: skip
    for file in [*modules.rglob("*.py"), *modules.rglob("__pycache__")]:
        shutil.rmtree(file) if file.is_dir() else file.unlink()


def library_facts(file: Path) -> tuple[str | None, list[str]]:
    """A library's own name, and those that it needs."""
    told = output("readelf", "-dW", file)
    soname = re.search(r"\(SONAME\).*\[(.+)\]", told)
    return soname and soname[1], re.findall(r"\(NEEDED\).*\[(.+)\]", told)


def check_libraries(tree: Path) -> None:
    """Nothing may be looked for on the host."""
    have = {file.name for file in tree.rglob("*.so*")}
    for file in (*tree.rglob("*.so*"), tree / "bin/python3.9"):
        lost = set(library_facts(file)[1]) - have
        if lost:
            sys.exit(f"bundle: {file.relative_to(tree)} needs {', '.join(sorted(lost))}")


def pack(tree: Path, work: Path) -> bytes:
    """A tar, the same for the same content, packed."""
    archive, packed = work / "payload.tar", work / "payload.zst"
    with tarfile.open(archive, "w", format=tarfile.USTAR_FORMAT) as tar:
        for path in sorted(tree.rglob("*")):
            info = tar.gettarinfo(path, str(path.relative_to(tree)))
            if len(info.name) > 100:
                sys.exit(f"bundle: a name is too long for the launcher: {info.name}")
            info.uid = info.gid = info.mtime = 0
            info.uname = info.gname = ""
            if info.isfile():
                with path.open("rb") as file:
                    tar.addfile(info, file)
            else:
                tar.addfile(info)
    run("zstd", "-q", "-12", "--check", "-T0", "-o", packed, archive)
    return packed.read_bytes()


def build_launcher(machine: str, system: Path, work: Path) -> bytes:
    """packaging/launcher.c, static."""
    program = work / "launcher"
    (library,) = system.glob("usr/lib/*/libzstd.a")
    run(
        tool(machine, "gcc"), "-O2", "-Wall", "-Werror", "-Wno-format-truncation", "-s", "-static",
        f"-I{system}/usr/include", "-o", program, ROOT / "packaging/launcher.c", library,
    )  # fmt: skip
    return program.read_bytes()


def tool(machine: str, name: str) -> str:
    """A compiler's tool for it: this machine's own, or the cross compiler's."""
    found = name if os.uname().machine == machine else f"{machine}-linux-gnu-{name}"
    if not shutil.which(found):
        sys.exit(f"bundle: {found} is missing: apt-get install gcc-{machine}-linux-gnu")
    return found


def output(*command: object) -> str:
    """What a tool prints."""
    parts: Sequence[str] = [str(part) for part in command]
    return subprocess.run(parts, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
