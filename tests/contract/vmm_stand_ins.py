"""Stand-ins for Firecracker with its jailer and for Cloud Hypervisor: their APIs on a real unix socket, with their states.

They answer as the real ones do (Firecracker's `rpc_interface.rs`, Cloud Hypervisor's `vmm/src/api`): what may be asked before and
after the boot, with which status and which body. Every request, and every answer of their own, is held against the OpenAPI
document; an answer that breaks it ends the stand-in with ANSWER_BROKEN. What they boot is `stand_in_guest.py`: no virtual machine.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import encodings.idna  # noqa: F401 - nothing can be imported once the root is the jail's
import fcntl
import json
import os
import re
import resource
import shutil
import socket
import struct
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

from openapi_check import Document, cloud_hypervisor, firecracker
from stand_in_guest import Guest

VERSIONS = {"firecracker": "1.17.0", "jailer": "1.17.0", "cloud-hypervisor": "48.0"}
ANSWER_BROKEN = 70
MEMORY_STEP = 1 << 20
CLONE_NEWNS, CLONE_NEWNET, CLONE_NEWPID = 0x20000, 0x40000000, 0x20000000
MS_REC, MS_PRIVATE, MS_BIND = 16384, 1 << 18, 4096
_libc = ctypes.CDLL(None, use_errno=True)


class Fault(Exception):
    def __init__(self, status: int, *words: str) -> None:
        self.status, self.words = status, words


TROUBLES = ("garbage", "silent", "refusing", "dying", "old", "whole")
"""What a stand-in can be made to be: it answers with random bytes or not at all, refuses or dies when it should boot, is old, reads
a snapshot's memory only as a whole."""


class StandIn:
    """One monitor. A subclass decides about requests; `fault` gives the body of a refusal. `trouble` is of TROUBLES, or none."""

    server_name: str
    trouble = ""

    def __init__(self, document: Document, *, server: Path) -> None:
        self.document = document
        self.guest: Guest | None = None
        self._server = server
        self._ended = asyncio.Event()
        self.listens = asyncio.Event()
        self._vsock: tuple[str, socket.socket] | None = None

    def handle(self, method: str, path: str, body: Any) -> Any:
        """Return the body of the answer, None for 204. Raises Fault."""
        raise NotImplementedError

    def fault(self, words: tuple[str, ...]) -> Any:
        raise NotImplementedError

    def end(self) -> None:
        self._ended.set()

    def broken(self, words: str) -> None:
        """An answer of its own breaks the document."""
        print(f"stand-in: {words}", file=sys.stderr, flush=True)
        os._exit(ANSWER_BROKEN)

    def check_boot(self) -> None:
        if self.trouble == "dying":
            os._exit(1)
        if self.trouble == "refusing":
            raise Fault(400, "Internal error while starting microVM: Cannot create a VM: KVM refuses")

    def make_vsock(self, path: str) -> None:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            listener.bind(path)
        except OSError as error:
            raise Fault(400, f"Vsock config error: Cannot create backend for vsock device: {error.strerror}") from None
        listener.listen(8)
        self._vsock = (path, listener)

    def boot_guest(self, disk: str) -> None:
        assert self._vsock is not None, "a machine without vsock cannot be reached"
        path, listener = self._vsock
        self.guest = Guest(Path(disk), path, self._server, self.end)
        self.guest.boot(listener)

    async def run(self, socket_path: str) -> None:
        server = await asyncio.start_unix_server(self._connected, socket_path)
        self.listens.set()
        await self._ended.wait()
        server.close()
        await asyncio.sleep(0.01)  # for an answer that is under way

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin1").split("\r\n")
                method, path, version = head[0].split(" ")
                assert version == "HTTP/1.1"
                headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
                content = await reader.readexactly(int(headers.get("content-length", "0")))
                if self.trouble == "silent":
                    await asyncio.Event().wait()
                if self.trouble == "garbage":
                    writer.write(os.urandom(200))
                    break
                writer.write(self._answer(method, path, content))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def _answer(self, method: str, path: str, content: bytes) -> bytes:
        status, body = 204, None
        try:
            request = json.loads(content) if content else None
            if self.document.operation(method, path) is None:
                raise Fault(400, f"Invalid request method and/or path: {method} {path}.")
            if problem := self.document.request_problem(method, path, request):
                print(f"stand-in: broken request {method} {path}: {problem}", file=sys.stderr, flush=True)
                raise Fault(400, f"An error occurred when deserializing the json body of a request: {problem}.")
            body = self.handle(method, path, request)
            status = 204 if body is None else 200
        except json.JSONDecodeError as error:
            status, body = 400, self.fault((f"An error occurred when deserializing the json body of a request: {error}.",))
        except Fault as fault:
            status, body = fault.status, self.fault(fault.words)
        if self.document.operation(method, path) is not None and (
            problem := self.document.answer_problem(method, path, status, body)
        ):
            self.broken(f"broken answer to {method} {path}: {problem}")
        head = f"HTTP/1.1 {status} \r\nServer: {self.server_name}\r\nConnection: keep-alive\r\n"
        if body is None:
            return f"{head}\r\n".encode()
        data = json.dumps(body).encode()
        return f"{head}Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data


class Firecracker(StandIn):
    server_name = "Firecracker API"

    def __init__(self, *, server: Path, id: str = "anonymous-instance") -> None:
        super().__init__(firecracker(), server=server)
        self.id = id
        self.state = "Not started"
        self.boot_path = False
        self.config: dict[str, Any] = {"machine-config": {"vcpu_count": 1, "mem_size_mib": 128}}
        self.drives: dict[str, dict[str, Any]] = {}
        self.cards: dict[str, dict[str, Any]] = {}
        self.metadata: Any = None
        self.taps: list[int] = []
        self.pages: list[bytes] = []
        """What is written in the guest's memory, at every MEMORY_STEP."""

    def fault(self, words: tuple[str, ...]) -> Any:
        return {"fault_message": words[0]}

    def handle(self, method: str, path: str, body: Any) -> Any:
        kind, _, name = path.strip("/").partition("/")
        if method == "GET":
            return self._get(path.strip("/"))
        if path == "/mmds":
            return self._metadata(method, body)
        if path == "/actions" and body["action_type"] == "InstanceStart":
            self._only_before()
            return self._start()
        if method == "PATCH" and kind != "machine-config":
            self._only_after()
            return self._patch(path, kind, name, body)
        if path in {"/actions", "/snapshot/create"}:
            self._only_after()
            return self._action(body) if path == "/actions" else self._snapshot(body)
        self._only_before()
        return self._load(body) if path == "/snapshot/load" else self._configure(path.strip("/"), kind, name, body)

    def _only_before(self) -> None:
        if self.state != "Not started":
            raise Fault(400, "The requested operation is not supported after starting the microVM.")

    def _only_after(self) -> None:
        if self.state == "Not started":
            raise Fault(400, "The requested operation is not supported before starting the microVM.")

    def _get(self, what: str) -> Any:
        match what:
            case "":
                version = VERSIONS["firecracker"]
                return {"app_name": "Firecracker", "id": self.id, "state": self.state, "vmm_version": version}
            case "version":
                return {"firecracker_version": VERSIONS["firecracker"]}
            case "machine-config":
                return self.config["machine-config"]
            case "vm/config":
                lists = {"drives": list(self.drives.values()), "network-interfaces": list(self.cards.values())}
                return self.config | lists
            case "mmds":
                if self.metadata is None:
                    raise Fault(404, "MMDS error: The MMDS data store is not initialized.")
                return self.metadata
            case "balloon" if "balloon" in self.config:
                return self.config["balloon"]
            case "balloon/statistics" if self.state != "Not started" and self._polling():
                pages = self.config["balloon"]["amount_mib"] * 256
                mib = self.config["balloon"]["amount_mib"]
                return {"target_pages": pages, "actual_pages": pages, "target_mib": mib, "actual_mib": mib}
            case "balloon/statistics" if self.state == "Not started":
                raise Fault(400, "The requested operation is not supported before starting the microVM.")
            case _:
                raise Fault(400, f"Balloon config error: No balloon device found for {what}.")

    def _polling(self) -> bool:
        return bool(self.config.get("balloon", {}).get("stats_polling_interval_s"))

    def _metadata(self, method: str, body: Any) -> None:
        if method == "PATCH" and self.metadata is None:
            raise Fault(400, "MMDS error: The MMDS data store is not initialized.")
        self.metadata = _merged(self.metadata, body) if method == "PATCH" else body

    def _configure(self, what: str, kind: str, name: str, body: Any) -> None:
        if kind not in {"logger", "metrics", "serial", "cpu-config"}:
            self.boot_path = True
        match kind:
            case "logger" | "metrics" | "serial":
                path = body.get("log_path") or body.get("metrics_path") or body.get("serial_out_path")
                if path and not os.access(path, os.W_OK):
                    raise Fault(400, f"{kind.title()} error: Cannot open {path}: No such file or directory")
            case "machine-config":
                count = body.get("vcpu_count", 1)
                if count != 1 and count % 2:
                    raise Fault(400, "Machine config error: The vCPU number is invalid!")
                if body.get("mem_size_mib", 1) < 1:
                    raise Fault(400, "Machine config error: The memory size (MiB) is invalid.")
                self.config["machine-config"] = self.config["machine-config"] | body
            case "boot-source":
                for key in ("kernel_image_path", "initrd_path"):
                    if key in body and not os.access(body[key], os.R_OK):
                        raise Fault(400, "Boot source error: The kernel file cannot be opened: No such file or directory")
                self.config[what] = body
            case "drives":
                self._drive(name, body)
            case "network-interfaces":
                self._card(name, body)
            case "vsock":
                self.make_vsock(body["uds_path"])
                self.config[what] = body
            case "mmds":
                for card in body["network_interfaces"]:
                    if card not in self.cards:
                        raise Fault(
                            400, "MMDS config error: The list of network interface IDs provided contains at least one invalid ID."
                        )
                self.config["mmds-config"] = body
            case _:
                self.config[what] = body

    def _drive(self, name: str, body: Any) -> None:
        if body["drive_id"] != name:
            raise Fault(400, "The id from the path does not match the id from the body!")
        mode = os.R_OK if body["is_read_only"] else os.R_OK | os.W_OK
        if not os.access(body["path_on_host"], mode):
            raise Fault(400, f"Drive config error: Unable to open the backing file {body['path_on_host']}")
        self.drives[name] = body

    def _card(self, name: str, body: Any) -> None:
        if body["iface_id"] != name:
            raise Fault(400, "The id from the path does not match the id from the body!")
        try:
            self.taps.append(open_tap(body["host_dev_name"]))
        except OSError as error:
            why = f"Open tap device failed: Error while creating ifreq structure: {error.strerror}"
            raise Fault(400, f"Network config error: {why}") from None
        self.cards[name] = body

    def _start(self) -> None:
        if "boot-source" not in self.config:
            raise Fault(400, "Start microvm error: Cannot start microvm without kernel configuration.")
        self.check_boot()
        self._boot_own()
        self.state = "Running"

    def _boot_own(self) -> None:
        disk = next((drive["path_on_host"] for drive in self.drives.values() if not drive["is_read_only"]), None)
        if disk is not None and self._vsock is not None:
            self.boot_guest(disk)

    def _patch(self, path: str, kind: str, name: str, body: Any) -> None:
        match kind:
            case "vm":
                self._switch(body["state"])
            case "drives" | "network-interfaces":
                if name not in (self.drives if kind == "drives" else self.cards):
                    raise Fault(400, f"Unknown device: {name}")
            case "balloon" if "balloon" not in self.config:
                raise Fault(400, "Balloon update error: No balloon device found.")
            case "balloon" if path == "/balloon/statistics" and not self._polling():
                raise Fault(400, "Balloon update error: Statistics are not enabled.")
            case "balloon":
                self.config["balloon"] = self.config["balloon"] | body

    def _switch(self, state: str) -> None:
        if state == "Paused" and self.state == "Running" and self.guest is not None:
            self.guest.pause()
        if state == "Resumed" and self.state == "Paused" and self.guest is not None:
            self.guest.resume()
        self.state = "Paused" if state == "Paused" else "Running"

    def _action(self, body: Any) -> None:
        if body["action_type"] == "SendCtrlAltDel":
            if self.guest is not None:
                self.guest.stop()
            self.end()

    def _snapshot(self, body: Any) -> None:
        if self.state != "Paused":
            raise Fault(400, "Create snapshot error: Operation not allowed while the microVM is running.")
        Path(body["snapshot_path"]).write_text(json.dumps({"snapshot": 1, "config": self.config, "drives": self.drives}))
        # With each snapshot one more page is written to; of a Diff, only that one is in the file.
        self.pages.append(f"page {len(self.pages)} of {self.id}".encode())
        with Path(body["mem_file_path"]).open("wb") as file:
            file.truncate(self.config["machine-config"]["mem_size_mib"] << 20)
            for at, page in enumerate(self.pages):
                if body["snapshot_type"] == "Full" or at == len(self.pages) - 1:
                    file.seek(at * MEMORY_STEP)
                    file.write(page)

    def _load(self, body: Any) -> None:
        if self.boot_path:
            raise Fault(
                400,
                "Load snapshot error: Loading a microVM snapshot not allowed after configuring boot-specific resources.",
            )
        if ("mem_backend" in body) == ("mem_file_path" in body):
            raise Fault(400, "missing field: either `mem_backend` or `mem_file_path` is required")
        memory = Path(body["mem_backend"]["backend_path"] if "mem_backend" in body else body["mem_file_path"])
        try:
            saved = json.loads(Path(body["snapshot_path"]).read_text())
            assert memory.exists()
        except (OSError, ValueError, AssertionError):
            asyncio.get_running_loop().call_later(0.01, self.end)  # it is too dirty to go on
            raise Fault(
                400, "Load snapshot error: Failed to restore from snapshot: Failed to get snapshot state from file"
            ) from None
        self.config, self.drives = saved["config"], saved["drives"]
        if body.get("mem_backend", {}).get("backend_type", "File") == "File":
            self.pages = read_pages(memory)
        self.config["machine-config"]["track_dirty_pages"] = body.get("track_dirty_pages", False)
        if "vsock" in self.config:
            self.make_vsock(body.get("vsock_override", self.config["vsock"])["uds_path"])
        for drive in self.drives.values():
            if not os.access(drive["path_on_host"], os.R_OK):
                raise Fault(400, f"Load snapshot error: Unable to open the backing file {drive['path_on_host']}")
        self.state = "Running" if body.get("resume_vm") else "Paused"
        if self.state == "Running":
            self._boot_own()


class CloudHypervisor(StandIn):
    server_name = "Cloud Hypervisor API"

    def __init__(self, *, server: Path) -> None:
        super().__init__(cloud_hypervisor(), server=server)
        self.state = ""
        self.config: dict[str, Any] = {}
        self.devices: list[str] = []
        self.taps: list[int] = []

    def fault(self, words: tuple[str, ...]) -> Any:
        return ["Error from API", *words]

    def handle(self, method: str, path: str, body: Any) -> Any:
        action = path.rpartition("/")[2]
        match action:
            case "vmm.ping":
                return {"version": VERSIONS["cloud-hypervisor"], "pid": os.getpid(), "features": []}
            case "vmm.shutdown":
                asyncio.get_running_loop().call_later(0.01, self._stop)
                return None
            case "vm.create":
                return self._create(body)
            case "vm.restore":
                return self._restore(body)
        if not self.state:
            raise Fault(404, f"{action} failed", "VM is not created")
        if action in {"vm.pause", "vm.shutdown", "vm.reboot", "vm.power-button", "vm.snapshot"} and self.state in {
            "Created",
            "Shutdown",
        }:
            raise Fault(405, f"{action} failed", "VM is not running")
        return self._on_machine(action, body)

    def _on_machine(self, action: str, body: Any) -> Any:
        match action:
            case "vm.info":
                return {"config": self.config, "state": self.state, "memory_actual_size": self.config["memory"]["size"]}
            case "vm.counters":
                return {"disk": {"read_bytes": 0}}
            case "vm.boot":
                if self.state not in {"Created", "Shutdown"}:
                    raise Fault(404, "The VM could not boot", "Invalid VM state transition")
                self._boot()
            case "vm.pause":
                if self.state != "Running":
                    raise Fault(405, "The VM could not be paused", f"Invalid VM state transition from {self.state} to Paused")
                self.state = "Paused"
                if self.guest is not None:
                    self.guest.pause()
            case "vm.resume":
                if self.state != "Paused":
                    raise Fault(405, "The VM could not resume", f"Invalid VM state transition from {self.state} to Running")
                self.state = "Running"
                if self.guest is not None:
                    self.guest.resume()
            case "vm.add-device":
                return self._add_device(body)
            case "vm.remove-device":
                if body.get("id") not in self.devices:
                    raise Fault(404, "The device could not be removed from the VM", "Missing device")
                self.devices.remove(body["id"])
            case "vm.resize":
                if body.get("desired_vcpus", 1) > self.config["cpus"]["max_vcpus"]:
                    raise Fault(429, "The VM could not be resized", "Desired vCPUs exceed the maximum")
            case "vm.snapshot":
                self._snapshot(body)
            case "vm.shutdown" | "vm.delete":
                if self.guest is not None:
                    self.guest.stop()
                self.state = "Shutdown" if action == "vm.shutdown" else ""
            case "vm.power-button":
                asyncio.get_running_loop().call_later(0.01, self._stop)
            case _:
                raise Fault(404, f"{action} failed", "the stand-in does not do it")
        return None

    def _stop(self) -> None:
        if self.guest is not None:
            self.guest.stop()
        self.end()

    def _create(self, body: Any) -> None:
        if self.state:
            raise Fault(500, "The VM could not be created", "VM is already created")
        for disk in body.get("disks", ()):
            if not os.access(disk["path"], os.R_OK if disk.get("readonly") else os.R_OK | os.W_OK):
                raise Fault(500, "The VM could not be created", f"Error opening disk path {disk['path']}")
        payload = body["payload"]
        if "kernel" in payload and not os.access(payload["kernel"], os.R_OK):
            raise Fault(500, "The VM could not be created", "Cannot open kernel file")
        for card in body.get("net", ()):
            if card.get("vhost_user"):
                if not body["memory"].get("shared") or not os.path.exists(card["vhost_socket"]):  # noqa: PTH110
                    raise Fault(500, "The VM could not be created", "Using vhost-user requires using shared memory or huge pages")
            else:
                if not os.path.isdir(f"/sys/class/net/{card['tap']}"):  # noqa: PTH112
                    raise Fault(500, "The VM could not be created", "Setting tap IP and/or netmask failed: Operation not permitted")
                try:
                    self.taps.append(open_tap(card["tap"]))
                except OSError as error:
                    raise Fault(500, "The VM could not be created", f"Open tap device failed: {error.strerror}") from None
        if not os.access(body.get("rng", {}).get("src", "/dev/urandom"), os.R_OK):
            raise Fault(500, "The VM could not be created", "Failed to open the entropy source")
        self.config = body
        self.state = "Created"

    def _boot(self) -> None:
        if not os.access("/dev/kvm", os.F_OK):
            raise Fault(404, "The VM could not boot", "Cannot open /dev/kvm")
        self.check_boot()
        vsock = self.config.get("vsock")
        disk = next((disk["path"] for disk in self.config.get("disks", ()) if not disk.get("readonly")), None)
        if vsock and disk:
            if self._vsock is None:
                self.make_vsock(vsock["socket"])
            self.boot_guest(disk)
        self.state = "Running"

    def _add_device(self, body: Any) -> Any:
        if body["id"] in self.devices:
            raise Fault(409, "The device could not be added to the VM", "Identifier is not unique")
        if not os.path.isdir(body["path"]):  # noqa: PTH112
            raise Fault(404, "The device could not be added to the VM", f"No such device: {body['path']}")
        self.devices.append(body["id"])
        return None if self.state == "Created" else {"id": body["id"], "bdf": f"0000:00:{len(self.devices):02x}.0"}

    def _snapshot(self, body: Any) -> None:
        place = Path(body["destination_url"].removeprefix("file://"))
        if self.state != "Paused" or not place.is_dir():
            raise Fault(405, "The VM could not be snapshotted", "VM is not paused, or there is no such directory")
        (place / "config.json").write_text(json.dumps(self.config))
        (place / "state.json").write_text("{}")
        with (place / "memory-ranges").open("wb") as file:
            file.truncate(self.config["memory"]["size"])

    def _restore(self, body: Any) -> None:
        if self.state:
            raise Fault(404, "The VM could not be restored", "VM is already created")
        if self.trouble == "whole" and "memory_restore_mode" in body:
            raise Fault(400, "The VM could not be restored", "unknown field `memory_restore_mode`")
        place = Path(body["source_url"].removeprefix("file://"))
        try:
            self.config = json.loads((place / "config.json").read_text())
            json.loads((place / "state.json").read_text())
            (place / "memory-ranges").open("rb").close()
        except (OSError, ValueError):
            raise Fault(400, "The VM could not be restored", "Error opening the snapshot's configuration") from None
        self.state = "Paused"
        if body.get("resume"):
            self._boot()


def read_pages(memory: Path) -> list[bytes]:
    """Return what is written in a guest's memory."""
    found = []
    with memory.open("rb") as file:
        while page := file.read(64).rstrip(b"\0"):
            found.append(page)
            file.seek(len(found) * MEMORY_STEP)
    return found


def _merged(old: Any, new: Any) -> Any:
    """RFC 7396."""
    if not isinstance(new, dict):
        return new
    found = dict(old) if isinstance(old, dict) else {}
    for key, value in new.items():
        if value is None:
            found.pop(key, None)
        else:
            found[key] = _merged(found.get(key), value)
    return found


def open_tap(name: str) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", name.encode(), 0x0002 | 0x1000 | 0x4000))
    return fd


# the jailer


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)


def _mount(source: str, place: str, flags: int) -> None:
    _check(_libc.mount(source.encode(), place.encode(), None, flags, None), place)


def jail(argv: list[str], *, layer: Path, server: Path, probe: Path, trouble: str) -> NoReturn:
    """Do as the jailer does, in its order; instead of executing Firecracker, become its stand-in."""
    own, separator, extra = argv, len(argv), []
    if "--" in argv:
        separator = argv.index("--")
        own, extra = argv[:separator], argv[separator + 1 :]
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("id", "exec-file", "uid", "gid"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--parent-cgroup")
    parser.add_argument("--cgroup-version", default="1", choices=("1", "2"))
    parser.add_argument("--cgroup", action="append", default=[])
    parser.add_argument("--chroot-base-dir", default="/srv/jailer")
    parser.add_argument("--netns")
    parser.add_argument("--resource-limit", action="append", default=[])
    parser.add_argument("--daemonize", action="store_true")
    parser.add_argument("--new-pid-ns", action="store_true")
    given = parser.parse_args(own)
    if not re.fullmatch(r"[A-Za-z0-9-]{1,64}", given.id):
        sys.exit(f"Jailer error: Invalid instance ID: {given.id}")
    executable = Path(given.exec_file)
    if not executable.is_file() or "firecracker" not in executable.name:
        sys.exit(f"Jailer error: Invalid exec file: {executable}")
    root = Path(given.chroot_base_dir).resolve() / executable.name / given.id / "root"
    root.mkdir(parents=True, exist_ok=True)
    shutil.copy(executable, root / executable.name)
    uid, gid = int(given.uid), int(given.gid)
    monitor = asyncio.new_event_loop()  # nothing is imported below
    stand_in = Firecracker(server=Path("/atoll-guest"), id=given.id)
    stand_in.trouble = trouble
    limits = {"no-file": resource.RLIMIT_NOFILE, "fsize": resource.RLIMIT_FSIZE}
    for limit in given.resource_limit or ["no-file=2048"]:
        name, value = limit.split("=")
        resource.setrlimit(limits[name], (int(value), int(value)))
    if given.cgroup_version == "2" and given.parent_cgroup:
        (Path("/sys/fs/cgroup") / given.parent_cgroup / "cgroup.procs").write_text(str(os.getpid()))
    _check(_libc.unshare(CLONE_NEWNS), "unshare")
    _mount("none", "/", MS_REC | MS_PRIVATE)
    for source, name in (
        (layer / "bin", "bin"),
        (server, "atoll-guest"),
        (probe, "probe"),
    ):  # the stand-in's guest has no disk to run from
        place = root / name
        place.mkdir(exist_ok=True) if source.is_dir() else place.touch()
        _mount(str(source), str(place), MS_BIND)
    netns = os.open(given.netns, os.O_RDONLY | os.O_CLOEXEC) if given.netns else -1
    os.chdir(root)
    os.chroot(root)
    for path, minor in (("/dev/net/tun", 200), ("/dev/kvm", 232)):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        os.mknod(path, 0o20600, os.makedev(10, minor))
        os.chown(path, uid, gid)
    os.mknod("/dev/null", 0o20666, os.makedev(1, 3))
    os.chmod("/dev/null", 0o666)  # noqa: PTH101
    os.chown("/", uid, gid)
    if netns >= 0:
        _check(_libc.setns(netns, CLONE_NEWNET), "netns")
    if given.new_pid_ns:
        _check(_libc.unshare(CLONE_NEWPID), "unshare")
        child = os.fork()
        if child:
            Path(f"/{executable.name}.pid").write_text(str(child))
            os._exit(0)
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    asyncio.set_event_loop(monitor)
    run_firecracker(["--id", given.id, "--start-time-us", "1", "--start-time-cpu-us", "1", *extra], stand_in, monitor)


def run_firecracker(argv: list[str], stand_in: Firecracker, loop: asyncio.AbstractEventLoop) -> NoReturn:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--api-sock", default="/run/firecracker.socket")
    for name in ("id", "start-time-us", "start-time-cpu-us"):
        parser.add_argument(f"--{name}")
    code = 0
    try:
        loop.run_until_complete(stand_in.run(parser.parse_args(argv).api_sock))
    except Exception:  # noqa: BLE001 - said, and the process ends
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)


def run_cloud_hypervisor(argv: list[str], server: Path, trouble: str) -> NoReturn:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--api-socket", required=True)
    parser.add_argument("--seccomp", choices=("true", "false", "log"), default="true")
    parser.add_argument("--landlock", action="store_true")
    stand_in = CloudHypervisor(server=server)
    stand_in.trouble = trouble
    asyncio.run(stand_in.run(parser.parse_args(argv).api_socket.removeprefix("path=")))
    sys.stderr.flush()
    os._exit(0)


def main(kind: str, argv: list[str], *, layer: Path, server: Path, probe: Path, trouble: str = "") -> None:
    """Be the program `kind` with the arguments `argv`. A guest has the programs of `layer`, and what a driver probes with."""
    if argv == ["--version"]:
        print(f"{kind.title()} v{'0.9.1' if trouble == 'old' else VERSIONS[kind]}")
    elif kind == "jailer":
        jail(argv, layer=layer, server=server, probe=probe, trouble=trouble)
    elif kind == "cloud-hypervisor":
        run_cloud_hypervisor(argv, server, trouble)
    else:
        sys.exit("the stand-in for firecracker is started by its jailer's")
