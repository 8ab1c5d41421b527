"""workerd's configuration of a process, in Cap'n Proto's text form. Pure; the schema is `workerd.capnp` of the npm package.

Modules are embedded by path, so that workerd itself reads them, inside its jail. Secrets are not in here: they are variables of
the process, bound by name. A process has one worker, or several parts: those have names of their own for all that is theirs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath

from msgspec import Struct

from atoll.model.errors import Invalid
from atoll.model.ports.runtime import WorkerCode
from atoll.model.worker import MODULES, SERVICE_HEADER, SERVICES_SOCKET, STATE, Worker
from atoll.runtimes.workerd_assets import assets_config, assets_directory, is_asset
from atoll.runtimes.workerd_stores import stores
from atoll.runtimes.workerd_text import listed, quoted, service

CONFIG = "worker.capnp"
"""At the root, beside `MODULES`: embedded paths are told from where it lies."""
VARIABLE = "ATOLL_B_"
"""What the process's variables are called: none of a tenant's own names means anything to the loader or the C library."""
WORKERS = "/workers"
"""Where a process that several share has their modules, each in a directory that is called as its instance."""
MARK = "\x01"
SERVICES = "/run/services"
"""Where the ingress's socket for service bindings is shown."""
HEAP_BESIDE_BYTES = 40 << 20
"""What of an instance's memory is not V8's heap: the process itself, buffers, stacks."""
HEAP_MIB_MIN = 16
HEAP_MIB_ROOMY = 256
"""From here on V8 collects before a heap's garbage is as large as its bounds; in a smaller one it must be told to."""
MODULES_MAX = 2_000
MODULES_BYTES_MAX = 64 << 20
_INNER_DATE = "2026-11-01"
"""Of the modules that are ours."""
_MODULE_KINDS = {
    ".js": "esModule",
    ".mjs": "esModule",
    ".cjs": "commonJsModule",
    ".wasm": "wasm",
    ".json": "json",
    ".txt": "text",
    ".html": "text",
    ".css": "text",
    ".sql": "text",
    ".bin": "data",
}
"""As wrangler takes files of these names."""
_ALIVE_CODE = "export default { fetch() { return new Response(null, { status: 204 }); } };"
_TAIL_CODE = """export default { tail(events, env, ctx) {
  for (const { exceptions } of events) for (const { name, message, stack } of exceptions)
    console.error(`\\x01${ctx.props}\\x01Uncaught ${name}: ${message}${stack ? "\\n" + stack : ""}`);
} };"""
_CONSOLE_CODE = """const mark = "\\x01" + NAME + "\\x01";
for (const level of ["debug", "error", "info", "log", "trace", "warn"]) {
  const write = console[level];
  console[level] = (...words) => {
    if (typeof words[0] === "string") words[0] = mark + words[0]; else words.unshift(mark);
    write.apply(console, words);
  };
}"""
_HTTP = 'http = (forwardedProtoHeader = "x-forwarded-proto")'
_CLOSED_CODE = """import { WorkerEntrypoint } from 'cloudflare:workers';
const no = () => { throw new Error('this worker may go nowhere: its spec says worker.egress = []'); };
export default class extends WorkerEntrypoint { fetch() { no(); } connect() { no(); } };"""


class Module(Struct, frozen=True, order=True):
    """A file below `MODULES` that the worker can import; `path` is its name."""

    path: str
    size_bytes: int = 0

    @property
    def kind(self) -> str | None:
        """The field of workerd's schema; None for a file that is no module."""
        return _MODULE_KINDS.get(PurePosixPath(self.path).suffix)


class Part(Struct, frozen=True, kw_only=True):
    """One worker of a process, and what is its own there."""

    code: WorkerCode
    modules: tuple[Module, ...]
    files: Mapping[str, str] = {}
    """The text of those of its assets that say how the others are served, by name."""
    name: str = ""
    """Of one that shares the process: its instance's id."""
    number: int = 0
    """Among those that share it."""

    @property
    def directory(self) -> str:
        """Where its modules are, as `embed` is told."""
        return f"{WORKERS[1:]}/{self.name}" if self.name else MODULES[1:]

    @property
    def front(self) -> str:
        """The service that gets its requests."""
        return self.own("assets" if self.code.worker.assets is not None else "main")

    def own(self, what: str) -> str:
        """Return the name of a service or a socket of its own."""
        return f"{self.name}/{what}" if self.name else what

    def variable(self, name: str) -> str:
        """Return what the process calls its variable `name`."""
        return f"{VARIABLE}{self.number}_{name}" if self.name else VARIABLE + name


def configuration(code: WorkerCode, modules: Iterable[Module], *, memory_bytes: int, files: Mapping[str, str] = {}) -> str:
    """Return that of a process with one worker, which listens by itself.

    Raises Invalid: the main module is not among `modules`, or they are too many or too large.
    """
    part = Part(code=code, modules=_ordered(code.worker, modules), files=files)
    services = _services(part)
    sockets = [f'(name = "http", address = "*:{code.port}", {_HTTP}, service = {quoted(part.front)})']
    if code.alive_port is not None:
        services.append(service("alive", f"worker = {_inner('alive.js', _ALIVE_CODE)}"))
        sockets.append(f'(name = "alive", address = "*:{code.alive_port}", http = (), service = "alive")')
    heap_mib = max(HEAP_MIB_MIN, (memory_bytes - HEAP_BESIDE_BYTES) >> 20)
    return _config(services, sockets, heap_mib, '(stdoutPrefix = "", stderrPrefix = "")')


def part_of(code: WorkerCode, modules: Iterable[Module], *, name: str, number: int, files: Mapping[str, str] = {}) -> Part:
    """Return what a worker is among others. Raises Invalid as `configuration` does."""
    return Part(code=code, modules=_ordered(code.worker, modules), files=files, name=name, number=number)


def shared_configuration(parts: Sequence[Part], *, heap_mib: int) -> str:
    """Return that of a process with several workers, all of whose sockets it is given.

    They are named `watch`, by which the node asks the process, and for each part `ID/http` and `ID/alive`. What a part writes, and
    what it fails to catch, begins with its name between two `MARK`s.
    """
    services = [
        service("alive", f"worker = {_inner('alive.js', _ALIVE_CODE)}"),
        service("tail", f"worker = {_inner('tail.js', _TAIL_CODE)}"),
    ]
    sockets = ['(name = "watch", http = (), service = "alive")']
    for part in parts:
        services += _services(part)
        sockets.append(f"(name = {quoted(part.own('http'))}, {_HTTP}, service = {quoted(part.front)})")
        if part.code.alive_port is not None:
            sockets.append(f'(name = {quoted(part.own("alive"))}, http = (), service = "alive")')
    return _config(
        services, sockets, max(HEAP_MIB_MIN, heap_mib), '(structuredLogging = true, stdoutPrefix = "", stderrPrefix = "")'
    )


def _services(part: Part) -> list[str]:
    code, worker = part.code, part.code.worker
    services = [service(part.own("main"), f"worker = {_main(part)}"), _internet(part.own("internet"), worker.egress)]
    for binding in worker.services:
        target = f"{code.project}/{binding.app}/{binding.port}"
        header = f"(name = {quoted(SERVICE_HEADER)}, value = {quoted(target)})"
        address = quoted(f"unix:{SERVICES}/{SERVICES_SOCKET}")
        name = part.own(f"service-{binding.binding}")
        services.append(service(name, f"external = (address = {address}, http = (injectRequestHeaders = [{header}]))"))
    if worker.assets is not None:
        config = assets_config(worker.assets, part.files)
        path = f"/{part.directory}/{assets_directory(worker.assets)}"
        user = quoted(part.own("main"))
        services.append(
            service(part.own("assets"), f"assets = (path = {quoted(path)}, config = {quoted(config)}, userWorker = {user})")
        )
    if worker.stateful:
        services.append(service("state", f"disk = (path = {quoted(STATE)}, writable = true)"))
    return services + stores(worker)


def _config(services: Sequence[str], sockets: Sequence[str], heap_mib: int, logging: str) -> str:
    return "\n".join(
        (
            'using Workerd = import "/workerd/workerd.capnp";',
            "const config :Workerd.Config = (",
            listed("services", services),
            listed("sockets", sockets),
            listed("v8Flags", [f'"{flag}"' for flag in _heap_flags(heap_mib)]),
            f"  logging = {logging},",
            ");",
            "",
        )
    )


def _heap_flags(heap_mib: int) -> tuple[str, ...]:
    """Return what keeps a heap, and what workerd keeps for its requests until a full collection, within the bounds.

    A request leaves some 9 KB that only a full collection frees, and V8 begins none for the sake of those: a worker that is asked
    without a pause grows until its control group ends it. So each collection of a small heap is a full one, and a roomy one starts
    small, after which V8's own pace holds.
    """
    pace = ("--initial-heap-size=6",) if heap_mib >= HEAP_MIB_ROOMY else ("--gc-global", f"--max-semi-space-size={heap_mib // 8}")
    return f"--max-heap-size={heap_mib}", *pace


def variables(code: WorkerCode, env: Sequence[tuple[str, str]], part: Part | None = None) -> tuple[tuple[str, str], ...]:
    """Return the environment of the process: what the worker is bound to, and nothing else."""
    values = dict(env)
    name_of = part.variable if part else lambda name: VARIABLE + name
    return tuple((name_of(name), values[name]) for name in code.bindings if name in values)


def experimental(code: WorkerCode) -> bool:
    """Whether workerd must be told to allow what may still change."""
    return code.worker.assets is not None or bool(stores(code.worker))


def _ordered(worker: Worker, modules: Iterable[Module]) -> tuple[Module, ...]:
    """Return what can be imported, the main module first, as workerd wants it."""
    name = worker.main.removeprefix("./")
    found = sorted(module for module in modules if module.kind is not None and not is_asset(worker, module.path))
    if len(found) > MODULES_MAX or sum(module.size_bytes for module in found) > MODULES_BYTES_MAX:
        raise Invalid(
            f"worker.files: more than {MODULES_MAX} modules or {MODULES_BYTES_MAX >> 20} MiB of them",
            field="worker.files",
            mend="name only what the worker imports, or bundle it",
        )
    first = [module for module in found if module.path == name]
    if not first:
        raise Invalid(f"worker.main: the image has no {MODULES}/{name}", field="worker.main", mend="is it among worker.files?")
    return (*first, *(module for module in found if module.path != name))


def _main(part: Part) -> str:
    worker = part.code.worker
    bindings = [f"(name = {quoted(name)}, fromEnvironment = {quoted(part.variable(name))})" for name in part.code.bindings]
    for name, value in worker.vars.items():
        kind = ("text", value) if isinstance(value, str) else ("json", json.dumps(value, ensure_ascii=False, default=str))
        bindings.append(f"(name = {quoted(name)}, {kind[0]} = {quoted(kind[1])})")
    bindings += [
        f"(name = {quoted(each.binding)}, service = {quoted(part.own(f'service-{each.binding}'))})" for each in worker.services
    ]
    bindings += [
        f"(name = {quoted(each.binding)}, durableObjectNamespace = {quoted(each.class_name)})" for each in worker.durable_objects
    ]
    if worker.assets is not None and worker.assets.binding is not None:
        files = f'(name = {quoted(part.own("assets"))}, entrypoint = "AssetWorker")'
        bindings.append(f"(name = {quoted(worker.assets.binding)}, service = {files})")
    for namespace in worker.kv:
        props = quoted(json.dumps({"namespace": namespace.id or namespace.binding}))
        bindings.append(f'(name = {quoted(namespace.binding)}, kvNamespace = (name = "kv", props = (json = {props})))')
    for queue in worker.queues:
        if queue.binding is not None:
            props = quoted(json.dumps({"queue": queue.queue}))
            bindings.append(f'(name = {quoted(queue.binding)}, queue = (name = "queues", props = (json = {props})))')
    embedded = [f"(name = {quoted(m.path)}, {m.kind} = embed {quoted(f'{part.directory}/{m.path}')})" for m in part.modules]
    lines = [
        listed("modules", [*(_before(part) if part.name else ()), *embedded]),
        f"  compatibilityDate = {quoted(worker.compatibility_date)},",
        f"  compatibilityFlags = [{', '.join(quoted(flag) for flag in worker.compatibility_flags)}],",
        listed("bindings", bindings),
        f"  globalOutbound = {quoted(part.own('internet'))},",
    ]
    if part.name:
        lines.append(f'  tails = [(name = "tail", props = (json = {quoted(json.dumps(part.name))}))],')
    if worker.durable_objects:
        objects = [
            f"(className = {quoted(each.class_name)}, uniqueKey = {quoted(each.key or each.class_name)}, "
            f"enableSql = {'true' if each.sql else 'false'})"
            for each in worker.durable_objects
        ]
        lines += [listed("durableObjectNamespaces", objects), '  durableObjectStorage = (localDisk = "state"),']
    return "(\n" + "\n".join(lines) + "\n)"


def _before(part: Part) -> tuple[str, str]:
    """Return the modules that go before a part's own: the first puts its name before all that it writes, then hands it on."""
    taken = {module.path for module in part.modules}
    names = (f"{name}-{at}.js" for at in range(MODULES_MAX + 2) for name in ("atoll-part", "atoll-console"))
    first, console = [name for name in names if name not in taken][:2]
    main = json.dumps(f"./{part.modules[0].path}")
    code = f"import './{console}'; import * as main from {main}; export * from {main}; export default main.default;"
    marked = _CONSOLE_CODE.replace("NAME", json.dumps(part.name))
    return f"(name = {quoted(first)}, esModule = {quoted(code)})", f"(name = {quoted(console)}, esModule = {quoted(marked)})"


def _internet(name: str, egress: Sequence[str]) -> str:
    """Return where `fetch` goes. Unix sockets, and with them other apps by another's name, are in none of these networks."""
    if not egress:
        return service(name, f"worker = {_inner('closed.js', _CLOSED_CODE)}")
    allow = ", ".join(quoted(text) for text in egress)
    return service(name, f"network = (allow = [{allow}], tlsOptions = (trustBrowserCas = true))")


def _inner(name: str, code: str) -> str:
    return f'(modules = [(name = "{name}", esModule = {quoted(code)})], compatibilityDate = "{_INNER_DATE}")'
