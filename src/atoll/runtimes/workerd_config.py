"""workerd's configuration of one worker, in Cap'n Proto's text form. Pure; the schema is `workerd.capnp` of the npm package.

Modules are embedded by path, so that workerd itself reads them, inside its jail. Secrets are not in here: they are variables of
the process, bound by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

from msgspec import Struct

from atoll.model.errors import Invalid
from atoll.model.ports.runtime import WorkerCode
from atoll.model.worker import KV_KEY, MODULES, SERVICE_HEADER, SERVICES_SOCKET, STATE

CONFIG = "worker.capnp"
"""At the root, beside `MODULES`: embedded paths are told from where it lies."""
VARIABLE = "ATOLL_B_"
"""What the process's variables are called: none of a tenant's own names means anything to the loader or the C library."""
SERVICES = "/run/services"
"""Where the ingress's socket for service bindings is shown."""
HEAP_BESIDE_BYTES = 40 << 20
"""What of an instance's memory is not V8's heap: the process itself, buffers, stacks."""
HEAP_MIB_MIN = 16
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


def configuration(code: WorkerCode, modules: Iterable[Module], *, memory_bytes: int) -> str:
    """Return the configuration. Raises Invalid: the main module is not among `modules`, or they are too many or too large."""
    worker = code.worker
    services = [_service("main", f"worker = {_main(code, _ordered(worker.main, modules))}"), _internet(worker.egress)]
    for binding in worker.services:
        target = f"{code.project}/{binding.app}/{binding.port}"
        header = f"(name = {quoted(SERVICE_HEADER)}, value = {quoted(target)})"
        address = quoted(f"unix:{SERVICES}/{SERVICES_SOCKET}")
        services.append(
            _service(f"service-{binding.binding}", f"external = (address = {address}, http = (injectRequestHeaders = [{header}]))")
        )
    if worker.stateful:
        services.append(_service("state", f"disk = (path = {quoted(STATE)}, writable = true)"))
    if worker.kv:
        services.append(_kv())
    sockets = [f'(name = "http", address = "*:{code.port}", http = (forwardedProtoHeader = "x-forwarded-proto"), service = "main")']
    if code.alive_port is not None:
        services.append(_service("alive", f"worker = {_inner('alive.js', _ALIVE_CODE)}"))
        sockets.append(f'(name = "alive", address = "*:{code.alive_port}", http = (), service = "alive")')
    heap_mib = max(HEAP_MIB_MIN, (memory_bytes - HEAP_BESIDE_BYTES) >> 20)
    return "\n".join(
        (
            'using Workerd = import "/workerd/workerd.capnp";',
            "const config :Workerd.Config = (",
            _list("services", services),
            _list("sockets", sockets),
            f'  v8Flags = ["--max-heap-size={heap_mib}"],',
            '  logging = (stdoutPrefix = "", stderrPrefix = ""),',
            ");",
            "",
        )
    )


def variables(code: WorkerCode, env: Sequence[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """Return the environment of the process: what the worker is bound to, and nothing else."""
    values = dict(env)
    return tuple((VARIABLE + name, values[name]) for name in code.bindings if name in values)


def experimental(code: WorkerCode) -> bool:
    """Whether workerd must be told to allow what may still change."""
    return bool(code.worker.kv)


def quoted(text: str) -> str:
    """Return `text` as a literal of Cap'n Proto's text form."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + re.sub(r"[\x00-\x1f\x7f]", lambda found: f"\\x{ord(found[0]):02x}", escaped) + '"'


def _ordered(main: str, modules: Iterable[Module]) -> list[Module]:
    """Return what can be imported, the main module first, as workerd wants it."""
    name = main.removeprefix("./")
    found = sorted(module for module in modules if module.kind is not None)
    if len(found) > MODULES_MAX or sum(module.size_bytes for module in found) > MODULES_BYTES_MAX:
        raise Invalid(
            f"worker.files: more than {MODULES_MAX} modules or {MODULES_BYTES_MAX >> 20} MiB of them",
            field="worker.files",
            mend="name only what the worker imports, or bundle it",
        )
    first = [module for module in found if module.path == name]
    if not first:
        raise Invalid(f"worker.main: the image has no {MODULES}/{name}", field="worker.main", mend="is it among worker.files?")
    return first + [module for module in found if module.path != name]


def _main(code: WorkerCode, modules: Sequence[Module]) -> str:
    worker = code.worker
    bindings = [f"(name = {quoted(name)}, fromEnvironment = {quoted(VARIABLE + name)})" for name in code.bindings]
    for name, value in worker.vars.items():
        kind = ("text", value) if isinstance(value, str) else ("json", json.dumps(value, ensure_ascii=False, default=str))
        bindings.append(f"(name = {quoted(name)}, {kind[0]} = {quoted(kind[1])})")
    bindings += [f"(name = {quoted(each.binding)}, service = {quoted(f'service-{each.binding}')})" for each in worker.services]
    bindings += [
        f"(name = {quoted(each.binding)}, durableObjectNamespace = {quoted(each.class_name)})" for each in worker.durable_objects
    ]
    for namespace in worker.kv:
        props = quoted(json.dumps({"namespace": namespace.id or namespace.binding}))
        bindings.append(f'(name = {quoted(namespace.binding)}, kvNamespace = (name = "kv", props = (json = {props})))')
    lines = [
        _list("modules", [f"(name = {quoted(m.path)}, {m.kind} = embed {quoted(f'{MODULES[1:]}/{m.path}')})" for m in modules]),
        f"  compatibilityDate = {quoted(worker.compatibility_date)},",
        f"  compatibilityFlags = [{', '.join(quoted(flag) for flag in worker.compatibility_flags)}],",
        _list("bindings", bindings),
        '  globalOutbound = "internet",',
    ]
    if worker.durable_objects:
        objects = [
            f"(className = {quoted(each.class_name)}, uniqueKey = {quoted(each.key or each.class_name)}, "
            f"enableSql = {'true' if each.sql else 'false'})"
            for each in worker.durable_objects
        ]
        lines += [_list("durableObjectNamespaces", objects), '  durableObjectStorage = (localDisk = "state"),']
    return "(\n" + "\n".join(lines) + "\n)"


def _internet(egress: Sequence[str]) -> str:
    """Return where `fetch` goes. Unix sockets, and with them other apps by another's name, are in none of these networks."""
    if not egress:
        return _service("internet", f"worker = {_inner('closed.js', _CLOSED_CODE)}")
    allow = ", ".join(quoted(text) for text in egress)
    return _service("internet", f"network = (allow = [{allow}], tlsOptions = (trustBrowserCas = true))")


def _kv() -> str:
    """Return workerd's own KV, which keeps its namespaces in durable objects of its own and large values as files."""
    lines = [
        '  modules = [(name = "kv.js", bundled = "/workerd/kv.js")],',
        f"  compatibilityDate = {quoted(_INNER_DATE)},",
        '  bindings = [(name = "SHARD", durableObjectNamespace = "KVNamespace"), (name = "BLOBS", service = "state")],',
        f'  durableObjectNamespaces = [(className = "KVNamespace", uniqueKey = {quoted(KV_KEY)}, enableSql = true)],',
        '  durableObjectStorage = (localDisk = "state"),',
    ]
    return _service("kv", "worker = (\n" + "\n".join(lines) + "\n)")


def _inner(name: str, code: str) -> str:
    return f'(modules = [(name = "{name}", esModule = {quoted(code)})], compatibilityDate = "{_INNER_DATE}")'


def _service(name: str, what: str) -> str:
    return f"(name = {quoted(name)}, {what})"


def _list(name: str, items: Sequence[str]) -> str:
    return f"  {name} = [\n    " + ",\n    ".join(items) + "\n  ]," if items else f"  {name} = [],"
