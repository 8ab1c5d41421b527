"""The lowest layer of a build: Debian's essential packages and the user's, installed by mmdebstrap from this machine's mirrors.

The packages are really installed (their scripts run), so that what they register works: users, alternatives, the loader's
cache. Documentation and translations are left out, and all that would differ from one machine or day to the next.
"""

from __future__ import annotations

import os
import re
import shutil
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

from atoll.images.command import Finished, run_tool
from atoll.images.entries import kept_xattrs
from atoll.images.layer import LayerWriter
from atoll.images.steps import StepCache, StepResult
from atoll.images.threads import in_thread
from atoll.images.tree import EPOCH
from atoll.model.errors import AtollError, ImageError, Invalid, Unavailable, Unsupported

BASE_DEADLINE_S = 1800.0
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
COMPONENTS = ("main", "contrib", "non-free", "non-free-firmware")
_LEFT_OUT = ("usr/share/man", "usr/share/info", "usr/share/locale", "usr/share/doc", "usr/share/lintian", "usr/share/bug")
_DPKG_OPTIONS = (
    *(f"path-exclude=/{path}/*" for path in _LEFT_OUT),
    "path-include=/usr/share/doc/*/copyright",
    "force-unsafe-io",
)
_APT_OPTIONS = ('Acquire::Retries "3";', 'Acquire::http::Timeout "30";')
_MACHINE_SPECIFIC = re.compile(
    rb"(?:dev|proc|sys|run|tmp|var/log|var/tmp|var/cache/(?:apt|ldconfig|debconf)|var/lib/apt/lists|var/backups)/."
    rb"|etc/(?:resolv\.conf|hostname|machine-id|mtab|\.pwd\.lock|[a-z]+-|apt/sources\.list(?:\.d/.*)?)$"
    rb"|etc/(?:apt/apt\.conf\.d|dpkg/dpkg\.cfg\.d)/99mmdebstrap$"
    rb"|var/lib/dpkg/(?:lock|lock-frontend|[a-z]+-old|triggers/Lock)$|var/lib/dbus/machine-id$|var/lib/systemd/.*/random"
)
MEMORY_BYTES_MIN = 4 << 30
"""With so much memory available the base is made in memory: twice as fast, and without thousands of files on the disk."""
_IN_MEMORY = ("sh", "-c", 'mount -t tmpfs -o mode=0755,size=75% atoll-build "$TMPDIR" && exec "$@"', "sh")
_UNKNOWN = re.compile(
    r"Unable to locate package ([^\s.]+)|Package '?([^\s']+)'? has no installation candidate|Couldn't find any package.*'(.+)'"
)


async def make_base(
    cache: StepCache, key: str, *, suite: str, packages: Sequence[str], architecture: str, on_line: Callable[[str], None]
) -> StepResult:
    """Build the layer and keep it under `key`; its facts have `python`, the version of python3 (`3.11`) if it has one.

    Raises Invalid for an unknown package, Unavailable without a mirror, Unsupported without mmdebstrap or root.
    """
    if shutil.which("mmdebstrap") is None:
        raise Unsupported("building needs mmdebstrap", mend="apt-get install mmdebstrap")
    await _check_names(packages, suite)
    with cache.workplace() as work:
        work.chmod(0o755)
        sources = work / "sources.list"
        sources.write_text("".join(f"{line}\n" for line in await mirrors(suite, architecture)))
        settings = work / "apt.conf"  # a file, since a proxy's address may hold a password
        settings.touch(mode=0o600)
        settings.write_text("".join(f"{line}\n" for line in [*await _proxies(), *_APT_OPTIONS]))
        tar, scratch = work / "base.tar", work / "tmp"
        scratch.mkdir(mode=0o755)
        argv = [
            *(_IN_MEMORY if _memory_available() >= MEMORY_BYTES_MIN else ()),
            "mmdebstrap",
            "--mode=root",
            "--variant=essential",
            "--format=tar",
            f"--architectures={architecture}",
            *(f"--dpkgopt={option}" for option in _DPKG_OPTIONS),
            f"--aptopt={settings}",
            *([f"--include={','.join(packages)}"] if packages else []),
            suite,
            str(tar),
            str(sources),
        ]
        env = {**os.environ, "SOURCE_DATE_EPOCH": str(EPOCH), "TMPDIR": str(scratch), "LC_ALL": "C.UTF-8", "TZ": "UTC"}
        finished = await run_tool(argv, env=env, deadline_s=BASE_DEADLINE_S, on_line=on_line, isolated=True)
        if finished.status != 0:
            raise _failure(finished, suite)
        on_line("packing the base layer")
        layer = work / "layer"
        result = await in_thread(lambda: _pack(tar, layer))
        return cache.keep(key, result, layer)


async def _check_names(packages: Sequence[str], suite: str) -> None:
    """Refuse a package that this machine's own lists of the same release do not know; mmdebstrap would say so much later."""
    if not packages or suite != _own_suite() or not any(Path("/var/lib/apt/lists").glob("*_Packages*")):
        return
    known = {line[:-1].partition(":")[0] for line in await _words("apt-cache", "policy", *packages) if line.endswith(":")}
    for name in packages:
        if name not in known:
            raise _unknown(name, suite)


def _unknown(name: str, suite: str) -> Invalid:
    return Invalid(
        f"build.apt: {suite} has no package {name!r}", field="build.apt", mend="check its name; if it is new, run apt-get update"
    )


async def mirrors(suite: str, architecture: str) -> list[str]:
    """Return apt source lines for `suite` and its updates, from the mirrors that this machine's own apt uses.

    Raises Unavailable when it has none of Debian's.
    """
    listed = await _words(
        "apt-get", "indextargets", "--format", "$(SITE) $(RELEASE) $(COMPONENT) $(ORIGIN)", "Identifier: Packages"
    )
    own = _own_suite()
    signed = f" signed-by={KEYRING}" if KEYRING.exists() else ""
    lines: list[str] = []
    for target in listed:
        site, release, component, *origin = target.split(" ")
        known = own if own and _belongs(release, own) else suite
        if component not in COMPONENTS or (origin and origin[0] not in ("Debian", "", "$(ORIGIN)")) or not _belongs(release, known):
            continue
        line = f"deb [arch={architecture}{signed}] {site} {suite}{release[len(known) :]} {component}"
        if line not in lines:
            lines.append(line)
    if not lines:
        raise Unavailable(
            f"this machine's apt has no mirror of Debian to build {suite} from",
            mend=f"add 'deb MIRROR {suite} main' to /etc/apt/sources.list",
        )
    return lines


def _belongs(release: str, suite: str) -> bool:
    return release in (suite, f"{suite}-updates", f"{suite}-security", f"{suite}/updates")


def _own_suite() -> str:
    try:
        release = Path("/etc/os-release").read_text()
    except OSError:
        return ""
    match = re.search(r'^VERSION_CODENAME="?([a-z]+)', release, re.MULTILINE)
    return match[1] if match and re.search(r'^ID="?debian', release, re.MULTILINE) else ""


async def _proxies() -> list[str]:
    """Return the proxy settings of this machine's apt, which mmdebstrap does not read by itself."""
    wanted = re.compile(r"Acquire::https?::(?:Proxy\b|Proxy::|Verify|CAInfo)", re.IGNORECASE)
    return [line for line in await _words("apt-config", "dump") if wanted.match(line) and not line.endswith('"";')]


async def _words(*argv: str) -> list[str]:
    lines: list[str] = []
    if shutil.which(argv[0]) is None:
        raise Unsupported(f"building needs {argv[0]}", mend="build on Debian")
    await run_tool(argv, env=os.environ, deadline_s=60, on_line=lines.append)
    return lines


def _failure(finished: Finished, suite: str) -> AtollError:
    unknown = _UNKNOWN.search(finished.output)
    if unknown:
        name = next(group for group in unknown.groups() if group)
        return Invalid(
            f"build.apt: {suite} has no package {name!r}", field="build.apt", mend="check its name on packages.debian.org"
        )
    words = finished.last("E: ")
    if finished.lacks_network:
        return Unavailable(f"no mirror of Debian answers: {words}", mend="check the network and this machine's apt sources")
    if re.search(r"does not have a Release file|404 +Not Found", finished.output):
        return Unavailable(f"this machine's mirror has no {suite}: {words}", mend="check build.base and the apt sources")
    if "No space left on device" in finished.output:
        return ImageError("the disk is full: the base needs about 500 MB while it is made", mend="free some space")
    return ImageError(f"mmdebstrap failed with status {finished.status}: {words}", mend="the build's log says more")


def _pack(tar: Path, target: Path) -> StepResult:
    """Rewrite mmdebstrap's tar, which is sorted and has no time after `EPOCH`, without what belongs to this machine."""
    facts: dict[str, str] = {}
    writer = LayerWriter(target)
    try:
        with tarfile.open(tar, mode="r:", errors="surrogateescape", encoding="utf-8") as base:
            while (member := base.next()) is not None:
                base.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all
                name = member.name.removeprefix("./").strip("/")
                if name in ("", ".") or _MACHINE_SPECIFIC.match(os.fsencode(name)):
                    continue
                if name == "usr/bin/python3" and member.issym() and member.linkname.startswith("python3."):
                    facts["python"] = member.linkname.removeprefix("python")
                writer.add(
                    name,
                    member.type,
                    mode=member.mode,
                    uid=member.uid,
                    gid=member.gid,
                    size=member.size if member.isreg() else 0,
                    content=base.extractfile(member) if member.isreg() else None,  # type: ignore[arg-type]
                    link=member.linkname.removeprefix("./") if member.islnk() else member.linkname,
                    device=(member.devmajor, member.devminor),
                    mtime=min(int(member.mtime), EPOCH),
                    xattrs=kept_xattrs(member),
                )
        return StepResult(writer.close(), facts)
    finally:
        writer.abandon()


def _memory_available() -> int:
    match = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(match[1]) << 10 if match else 0
