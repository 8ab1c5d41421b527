"""Building images without Docker: examples/hello on a real Debian base, pip and files layers, mistakes.

The base takes tens of seconds and the network, so that it is kept between runs below the user's cache directory.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from atoll.images.build import BuildProgress, Built, build
from atoll.images.build_files import list_files, pack_files
from atoll.images.build_pip import make_pip
from atoll.images.layout import Layout, LayoutImage
from atoll.images.registry import Registries
from atoll.images.steps import StepCache
from atoll.images.store import ImageStore
from atoll.model.codec import convert, parse_text
from atoll.model.errors import Invalid, Unavailable
from atoll.model.spec import AppSpec, Build

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(os.geteuid() != 0, reason="building needs root"),
    pytest.mark.skipif(not shutil.which("mmdebstrap"), reason="no mmdebstrap on this machine"),
    pytest.mark.timeout(600),
]

HELLO = Path(__file__).parents[2] / "examples/hello"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "atoll-tests/build"


def hello_spec() -> Build:
    spec = convert(parse_text((HELLO / "atoll.toml").read_bytes(), ".toml"), AppSpec)
    assert spec.build is not None
    return spec.build


@pytest.fixture(scope="module")
def hello() -> Built:
    try:
        return asyncio.run(build(HELLO, hello_spec(), cache=CACHE))
    except Unavailable as error:
        pytest.skip(f"no Debian mirror: {error}")


@contextlib.contextmanager
def mounted(layers: tuple[Path, ...], target: Path) -> Iterator[Path]:
    target.mkdir()
    lower = ":".join(str(layer) for layer in reversed(layers))
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", f"lowerdir={lower}", str(target)], check=True)
    try:
        yield target
    finally:
        subprocess.run(["umount", str(target)], check=True)


def unpacked(built: Built, directory: Path) -> tuple[Path, ...]:
    async def add() -> tuple[Path, ...]:
        registries = Registries()
        store = ImageStore(directory, registries)
        image = await store.add("cell.internal/default/app:1", LayoutImage(Layout(built.layout), digest=built.digest))
        await registries.aclose()
        return image.layers

    return asyncio.run(add())


def test_the_hello_app_answers_from_its_image_and_stops_when_told(hello: Built, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with mounted(unpacked(hello, tmp_path / "images"), tmp_path / "root") as root:
        env = {"PATH": "/usr/bin:/bin", "PORT": str(port), "ATOLL_INSTANCE": "hello-1"}
        argv = ["/usr/sbin/chroot", "--userspec=65534:65534", str(root), "python3", "/app/app.py"]
        process = subprocess.Popen(argv, env=env, stdout=subprocess.PIPE)
        try:
            assert process.stdout is not None
            assert b"listens" in process.stdout.readline()
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as answer:
                assert answer.read() == b"Hello from Atoll! I am hello-1.\n"
            slow = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    f"import urllib.request as u; print(u.urlopen('http://127.0.0.1:{port}/slow?ms=500').status)",
                ],
                stdout=subprocess.PIPE,
            )
            time.sleep(0.3)
            process.terminate()
            assert slow.communicate(timeout=10)[0] == b"200\n"
            assert process.wait(10) == 0
        finally:
            process.kill()
            process.communicate()


def test_the_image_has_nothing_of_this_machine(hello: Built, tmp_path: Path) -> None:
    base = unpacked(hello, tmp_path / "images")[0]
    for absent in ("etc/resolv.conf", "etc/hostname", "etc/machine-id", "etc/apt/sources.list", "etc/dpkg/dpkg.cfg.d/99mmdebstrap"):
        assert not (base / absent).exists(), absent
    for empty in ("dev", "proc", "sys", "run", "tmp", "var/log", "var/cache/apt", "var/lib/apt/lists"):
        assert [path for path in (base / empty).rglob("*") if not path.is_dir()] == [], empty
    assert (base / "usr/bin/python3").exists()
    assert (base / "etc/passwd").exists()


def test_a_second_build_with_nothing_changed_takes_under_100_ms(hello: Built) -> None:
    seen: list[BuildProgress] = []
    again = asyncio.run(build(HELLO, hello_spec(), cache=CACHE, progress=seen.append))
    again = asyncio.run(build(HELLO, hello_spec(), cache=CACHE, progress=seen.append))
    assert again.digest == hello.digest
    assert again.cached == ("base", "files")
    assert again.took_s < 0.1
    assert seen[-1].step == "image"


def test_a_changed_file_makes_only_its_layer_anew(hello: Built, tmp_path: Path) -> None:
    app = tmp_path / "app"
    shutil.copytree(HELLO, app)
    same = asyncio.run(build(app, hello_spec(), cache=CACHE))
    assert same.digest == hello.digest
    (app / "app.py").write_text("print('new')\n")
    other = asyncio.run(build(app, hello_spec(), cache=CACHE))
    assert other.digest != hello.digest
    assert other.cached == ("base",)
    assert other.took_s < 2


def test_builds_at_once_wait_for_each_other(hello: Built) -> None:
    async def both() -> set[str]:
        return {built.digest for built in await asyncio.gather(*(build(HELLO, hello_spec(), cache=CACHE) for _ in range(4)))}

    assert asyncio.run(both()) == {hello.digest}


@pytest.mark.soak
def test_a_base_from_a_cold_cache_has_the_same_digest(hello: Built, tmp_path: Path) -> None:
    """Of one state of the mirror: when it has moved on since the kept base was made, remove that and run again."""
    assert asyncio.run(build(HELLO, hello_spec(), cache=tmp_path / "cold")).digest == hello.digest


def test_an_unknown_package_is_named(hello: Built, tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="no-such-package-here") as caught:
        asyncio.run(build(HELLO, Build(apt=("no-such-package-here",)), cache=tmp_path))
    assert caught.value.field == "build.apt"
    assert list((tmp_path / "work").iterdir()) == []


def test_without_a_mirror_the_error_says_so(tmp_path: Path) -> None:
    program = (
        "import asyncio, sys; from pathlib import Path; from atoll.images.build import build; from atoll.model.spec import Build\n"
        "from atoll.model.errors import Unavailable\n"
        "try: asyncio.run(build(Path(sys.argv[1]), Build(), cache=Path(sys.argv[2])))\n"
        "except Unavailable as error: print(error, '|', error.mend)\n"
    )
    proxy = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:1")
    done = subprocess.run(
        [sys.executable, "-c", program, str(HELLO), str(tmp_path)],
        env={**os.environ, **proxy},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "no mirror of Debian answers" in done.stdout, done.stdout + done.stderr
    assert "apt sources" in done.stdout


def test_a_killed_build_leaves_neither_mounts_nor_processes(tmp_path: Path) -> None:
    program = (
        "import asyncio, sys; from pathlib import Path; from atoll.images.build import build; from atoll.model.spec import Build\n"
        "asyncio.run(build(Path(sys.argv[1]), Build(), cache=Path(sys.argv[2]), progress=lambda p: print(p.text, flush=True)))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(HELLO), str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    for line in process.stdout:
        if b"extracting" in line or b"apt-get update" in line:
            break
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 10
    while holders(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert holders(tmp_path) == []
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()


def holders(directory: Path) -> list[bytes]:
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and process.name != str(os.getpid()):
            with contextlib.suppress(OSError):
                line = (process / "cmdline").read_bytes()
                if os.fsencode(directory) in line:
                    found.append(line)
    return found


def wheel(directory: Path) -> Path:
    """A wheel with a module and a program, as pip would fetch one."""
    files = {
        "reef.py": b"def main():\n    print('reef')\n",
        "reef-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: reef\nVersion: 1.0\n",
        "reef-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "reef-1.0.dist-info/entry_points.txt": b"[console_scripts]\nreef = reef:main\n",
    }
    record = "".join(
        f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b'=').decode()},{len(data)}\n"
        for name, data in files.items()
    )
    path = directory / "reef-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {**files, "reef-1.0.dist-info/RECORD": f"{record}reef-1.0.dist-info/RECORD,,\n".encode()}.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return path


@pytest.mark.parametrize("python", [f"{sys.version_info.major}.{sys.version_info.minor}", "3.13"])
def test_the_pip_layer_is_reproducible_and_its_programs_run_the_images_python(tmp_path: Path, python: str) -> None:
    source = wheel(tmp_path)

    async def make(name: str) -> tuple[StepCache, str]:
        cache = StepCache(tmp_path / name)
        async with cache.locked():
            result = await make_pip(
                cache,
                "key",
                requirements=[f"reef @ file://{source}"],
                python=python,
                suite="bookworm",
                architecture="amd64",
                on_line=lambda _: None,
            )
        assert cache.find("key") == result
        return cache, result.layer.digest

    first, digest = asyncio.run(make("one"))
    _, other = asyncio.run(make("a-rather-longer-name-for-another-directory"))
    assert digest == other
    listing = subprocess.run(["tar", "--zstd", "-tf", first.layout.blob(digest)], capture_output=True, check=True).stdout.decode()
    assert "usr/local/bin/reef\n" in listing
    assert f"usr/local/lib/python{python}/dist-packages/reef.py\n" in listing
    subprocess.run(["tar", "--zstd", "-C", tmp_path, "-xf", first.layout.blob(digest)], check=True)
    assert (tmp_path / "usr/local/bin/reef").read_text().startswith("#!/usr/bin/python3\n")
    record = (tmp_path / f"usr/local/lib/python{python}/dist-packages/reef-1.0.dist-info/RECORD").read_text()
    assert "../../../bin/reef,sha256=" in record
    assert str(tmp_path) not in record


def test_an_unknown_pip_package_is_named(tmp_path: Path) -> None:
    async def make() -> None:
        cache = StepCache(tmp_path)
        async with cache.locked():
            await make_pip(
                cache,
                "key",
                requirements=["atoll-no-such-package-at-all==9.9"],
                python="3.11",
                suite="bookworm",
                architecture="amd64",
                on_line=lambda _: None,
            )

    with pytest.raises((Invalid, Unavailable), match=r"atoll-no-such-package-at-all|no package index"):
        asyncio.run(make())


def test_the_files_layer_does_not_depend_on_times_modes_or_order(tmp_path: Path) -> None:
    digests = []
    for name, umask, stamp in (("one", 0o022, 1e9), ("two", 0o077, 2e9)):
        app = tmp_path / name
        old = os.umask(umask)
        try:
            (app / "sub/__pycache__").mkdir(parents=True)
            for file in ("sub/b.py", "a.py", "sub/__pycache__/b.pyc", "run"):
                (app / file).write_text(file)
                os.utime(app / file, (stamp, stamp))
            (app / "run").chmod(0o700)
            (app / "link").symlink_to("a.py")
        finally:
            os.umask(old)
        layer = tmp_path / f"{name}.layer"
        digests.append(pack_files(list_files(app, Build()), "/srv/app", layer).digest)
    assert digests[0] == digests[1]
    listing = subprocess.run(["tar", "--zstd", "-tvf", tmp_path / "one.layer"], capture_output=True, check=True).stdout.decode()
    assert "srv/app/sub/b.py" in listing
    assert "pycache" not in listing
    assert "-rwxr-xr-x 0/0" in listing


@pytest.mark.parametrize(
    ("files", "match"),
    [
        (("nothing.py",), "there is no"),
        (("../other",), "outside"),
        (("/etc/passwd",), "outside"),
        (("out/passwd",), "leads out"),
        (("pipe",), "neither"),
    ],
)
def test_a_mistake_in_files_names_the_field(tmp_path: Path, files: tuple[str, ...], match: str) -> None:
    (tmp_path / "out").symlink_to("/etc")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(Invalid, match=match) as caught:
        asyncio.run(build(tmp_path, msgspec.structs.replace(Build(), files=files), cache=tmp_path / "cache"))
    assert caught.value.field == "build.files[0]"
    assert caught.value.mend
    assert not (tmp_path / "cache").exists()


def test_only_root_can_build(tmp_path: Path) -> None:
    program = (
        "import os, asyncio; from pathlib import Path\n"
        "from atoll.images.build import build; from atoll.model.spec import Build\n"
        "from atoll.model.errors import Unsupported\n"
        "os.setuid(65534)\n"
        "try: asyncio.run(build(Path('/'), Build(), cache=Path('/nonexistent')))\n"
        "except Unsupported as error: print(error, '|', error.mend)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert "needs root" in done.stdout, done.stderr


def test_an_image_from_scratch_has_its_files_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "app").mkdir()
    (tmp_path / "app/model.bin").write_bytes(bytes(1000))
    spec = Build(base="scratch", workdir="/", files=("model.bin",))
    built = asyncio.run(build(tmp_path / "app", spec, cache=tmp_path / "cache"))
    (layer,) = unpacked(built, tmp_path / "images")
    assert [path.name for path in layer.iterdir()] == ["model.bin"]
    again = asyncio.run(build(tmp_path / "app", spec, cache=tmp_path / "cache"))
    assert again.digest == built.digest


@pytest.mark.parametrize("kind", ["apt", "pip"])
def test_packages_without_a_base_are_refused(tmp_path: Path, kind: str) -> None:
    spec = msgspec.structs.replace(Build(base="scratch"), **{kind: ("python3",)})
    with pytest.raises(Invalid, match="need a system below them") as caught:
        asyncio.run(build(tmp_path, spec, cache=tmp_path / "cache"))
    assert caught.value.field == f"build.{kind}"
