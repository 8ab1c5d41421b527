"""Write docs/spec.md from the JSON Schema of the specs: `python scripts/spec_reference.py`.

Type, bounds and default come from the schema, which is made from the code; meaning and example stand here, one for every key,
so that a key without a word of explanation, or a word about a key that is gone, fails the test that compares the page.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from atoll.model.codec import json_schema
from atoll.model.spec import AppSpec, JobSpec

PAGE = Path(__file__).parents[1] / "docs" / "spec.md"
HINTS = {
    "bytes, or e.g. '256MiB'": "size",
    "seconds, or e.g. '1m30s'": "duration",
    "cores": "cores",
    "lower-case letters, digits and '-', at most 40, a letter first and no '-' last": "name",
}
MEANING: dict[str, tuple[str, str]] = {
    "Workload.name": ("What it is called in its project; part of its hostname and of its instances' ids.", 'name = "web"'),
    "Workload.project": ("The tenant it belongs to. `--project` on the command line goes before it.", 'project = "shop"'),
    "Workload.image": (
        "What to run; see [images.md](images.md). This, `[build]` or `[worker]` is needed.",
        'image = "registry.example/web:1.4"',
    ),
    "Workload.build": ("How to make the image from this directory; the table below.", "[build]"),
    "Workload.command": (
        "Replaces the image's entry point and arguments; empty keeps them.",
        'command = ["./web", "--port", "80"]',
    ),
    "Workload.env": ("Environment variables. Not for secrets: specs are stored and shown.", 'env = { LOG = "info" }'),
    "Workload.secrets": ("Variable → name of a secret of the project (`atoll secrets set`).", 'secrets = { DB_PASSWORD = "db" }'),
    "Workload.workdir": ("Directory that the command starts in; else the image's.", 'workdir = "/srv"'),
    "Workload.user": ("`USER`, `UID`, `USER:GROUP` or `UID:GID`, looked up in the image; else the image's.", 'user = "1000:1000"'),
    "Workload.resources": ("What each instance may use; the table below.", "[resources]"),
    "Workload.isolation": (
        "How much stands between it and its neighbours. `isolate` is for workers.",
        'isolation = "container"',
    ),
    "Workload.runtime": (
        "Pins one runtime of that isolation. It runs on the nodes that offer it (`atoll runtimes`).",
        'runtime = "runc"',
    ),
    "Workload.placement": ("Where it may and should run; the table below.", "[placement]"),
    "Workload.stop": ("How it is told to end; the table below.", "[stop]"),
    "Workload.lost": ("What happens when its node is lost; the table below.", "[lost]"),
    "Workload.volumes": ("Directories that outlive instances; the table below.", "[[volumes]]"),
    "Workload.network": ("What it may send and be sent; the table below, and [network.md](network.md).", "[network]"),
    "NetworkRules.ingress": (
        "Who may come to its declared ports, beside the ingresses. Left out: its project, and whom a published port lets in.",
        'ingress = [{ app = "web" }]',
    ),
    "NetworkRules.egress": (
        "Where it may go. Left out: to its project and the world outside. Name servers can always be asked.",
        'egress = [{ cidr = "192.0.2.0/24", ports = [443] }]',
    ),
    "NetworkRules.bandwidth": (
        "Bytes per second that each instance may send, and as many that it may be sent; what is more is dropped. 8KiB or more.",
        'bandwidth = "10MiB"',
    ),
    "NetworkRules.packets": ("Packets per second, likewise.", "packets = 20000"),
    "Allow.app": ("Instances of this app or job of the project. One of `app`, `cidr` and `host`.", 'app = "db"'),
    "Allow.cidr": ("IPv4 addresses, or IPv6 ones (`::/0` is all of those).", 'cidr = "192.0.2.0/24"'),
    "Allow.host": (
        "The addresses that the node's name servers say for this name; `*.` means every name below it. Only in `egress`.",
        'host = "*.example.org"',
    ),
    "Allow.ports": ("Only these; of the instance itself in `ingress`, of where it goes in `egress`.", "ports = [443]"),
    "Allow.protocol": ("`tcp` (which `http` means too) or `udp`; both where it is left out.", 'protocol = "tcp"'),
    "Workload.read_only_root": ("The root is read-only; volumes, /dev/shm and /dev stay writable.", "read_only_root = true"),
    "Workload.labels": ("Your own words on it; kept, and used by nothing yet.", 'labels = { team = "web" }'),
    "AppSpec.kind": ("Says that this is an app's spec; may be left out.", 'kind = "app"'),
    "AppSpec.ports": ("What it listens on. Nothing else of it can be reached. The first one is in `$PORT`.", "[[ports]]"),
    "AppSpec.routes": ("Hostnames beside the default one; the table below.", "[[routes]]"),
    "AppSpec.ingress": ("How the ingress treats its requests; the table below, and [ingress.md](ingress.md).", "[ingress]"),
    "AppSpec.health": ("When it counts as ready; without it, once its first port accepts a connection.", "[health]"),
    "AppSpec.metrics": ("Where its node asks for its own metrics; see [autoscaling.md](autoscaling.md).", "[metrics]"),
    "AppSpec.scale": ("How many instances; left out, a deploy keeps the number that runs (1 at first).", "[scale]"),
    "AppSpec.restart": ("What its node does when the process ends; the table below.", "[restart]"),
    "AppSpec.rollout": ("How a new release replaces the old one; the table below.", "[rollout]"),
    "AppSpec.disruption": (
        "How many may be away for others' sake; the table below. Else as many as `rollout.max_unavailable`, and one at least.",
        "[disruption]",
    ),
    "AppSpec.depends_on": (
        "Apps of the project that must be ready at their wanted release before this one starts or rolls; [control.md](control.md).",
        'depends_on = ["db"]',
    ),
    "Disruption.max_unavailable": (
        "So many of those that are wanted may be away, or so many of a hundred, rounded up.",
        'max_unavailable = "10%"',
    ),
    "Disruption.min_ready": (
        "At least so many stay ready, or so many of a hundred of those that are wanted, rounded up.",
        "min_ready = 3",
    ),
    "AppSpec.worker": ("Modules that workerd runs; the table below, and [workers.md](workers.md).", "[worker]"),
    "Worker.main": ("The module with the handlers, an ES module below this directory.", 'main = "src/index.js"'),
    "Worker.files": ("Paths below this directory where its modules are.", 'files = ["src"]'),
    "Worker.ignore": ("Patterns that are left out, by name or by path.", 'ignore = ["*.test.js"]'),
    "Worker.compatibility_date": ("workerd behaves as it did on that day.", 'compatibility_date = "2026-11-01"'),
    "Worker.compatibility_flags": ("workerd's own switches.", 'compatibility_flags = ["nodejs_compat"]'),
    "Worker.vars": (
        "Bindings of any value; `env` and `secrets` of the spec are bindings too, of text.",
        "vars = { LIMITS = [1, 2] }",
    ),
    "Worker.services": ("Bindings to other apps of the project.", "[[worker.services]]"),
    "Worker.durable_objects": ("Classes whose objects keep state.", "[[worker.durable_objects]]"),
    "Worker.assets": ("Files that are served as they are; the table below.", "[worker.assets]"),
    "Assets.directory": ("Where they are, below the app's directory. None of them is a module.", 'directory = "public"'),
    "Assets.binding": ("`env.BINDING.fetch(request)` answers with a file.", 'binding = "ASSETS"'),
    "Assets.html": ("What becomes of `.html` and a slash at the end of a path.", 'html = "none"'),
    "Assets.not_found": (
        "What answers for a path that is no file: the worker, `404.html`, or `index.html`.",
        'not_found = "single-page-application"',
    ),
    "Assets.worker_first": ("Paths for which the worker is asked although there is a file.", 'worker_first = ["/api/*"]'),
    "Worker.queues": ("Messages to itself, delivered in batches; the table below.", "[[worker.queues]]"),
    "Worker.crons": (
        "When `scheduled()` is called: minute, hour, day, month, weekday (1 to 7 from Sunday), in UTC, in the dialect of workerd.",
        'crons = ["*/5 * * * *"]',
    ),
    "Worker.kv": ("Keys and values on the node's disk.", "[[worker.kv]]"),
    "Worker.egress": ("Where `fetch` may go: `public`, or networks; `[]` for nowhere.", 'egress = ["203.0.113.0/24"]'),
    "Worker.shared": (
        "Share one process with the other such workers of the project on the node: [workers.md](workers.md).",
        "shared = true",
    ),
    "ServiceBinding.binding": ("`env.BINDING.fetch(request)` calls it.", 'binding = "AUTH"'),
    "ServiceBinding.app": ("The app; a worker or any other that serves HTTP.", 'app = "auth"'),
    "ServiceBinding.port": ("The number of the port that it listens on.", "port = 8000"),
    "DurableObject.binding": ("What the worker calls the namespace.", 'binding = "COUNTERS"'),
    "DurableObject.class_name": ("The class that the main module exports.", 'class_name = "Counter"'),
    "DurableObject.key": ("The name of the state on disk, to keep when the class is renamed; else the class's.", 'key = "Counter"'),
    "DurableObject.sql": ("`ctx.storage.sql` is there.", "sql = false"),
    "Queue.queue": ("Its name, as the handler `queue` is told it.", 'queue = "mails"'),
    "Queue.binding": ("`env.BINDING.send(message)`; none for one that only gets what another gave up.", 'binding = "MAILS"'),
    "Queue.batch_size": ("Messages in a batch.", "batch_size = 100"),
    "Queue.batch_wait": ("How long a batch waits to be full; at most a minute.", 'batch_wait = "1s"'),
    "Queue.retries": ("How often a message is tried again.", "retries = 10"),
    "Queue.retry_delay": ("How long it waits before that.", 'retry_delay = "30s"'),
    "Queue.dead_letter": (
        "Another of the worker's queues for what was tried in vain; else it is dropped.",
        'dead_letter = "failed"',
    ),
    "Queue.concurrency": ("Batches under way at once; 0 for no limit.", "concurrency = 1"),
    "KvNamespace.binding": ("What the worker calls the namespace.", 'binding = "CACHE"'),
    "KvNamespace.id": ("Which of the worker's namespaces; the binding's name where left out.", 'id = "cache"'),
    "JobSpec.kind": ("Says that this is a job's spec; may be left out.", 'kind = "job"'),
    "JobSpec.completions": ("Indices that must each succeed once; the process sees its own as `ATOLL_INDEX`.", "completions = 100"),
    "JobSpec.parallelism": ("Instances that run at a time.", "parallelism = 8"),
    "JobSpec.retries": ("New tries of each index after a failure; the delay doubles from 1 s to 60 s.", "retries = 3"),
    "JobSpec.deadline": ("From the job's creation; what still runs then is stopped, and the job has failed.", 'deadline = "1h"'),
    "JobSpec.keep": ("How long a finished job, its instances' records and their logs are kept.", 'keep = "1d"'),
    "JobSpec.schedule": (
        "Minute, hour, day, month, weekday, or `@hourly`, `@daily`: at each such time a run is made, a job of its own.",
        'schedule = "*/5 * * * *"',
    ),
    "JobSpec.timezone": ("In which `schedule` is read.", 'timezone = "Europe/Berlin"'),
    "JobSpec.overlap": (
        "While the run before still runs, a time is left out, or runs beside it, or cancels it and begins when it has ended.",
        'overlap = "replace"',
    ),
    "JobSpec.starting_deadline": (
        "What could not begin so soon is missed. Of several times that nobody saw come, only the last is run, and only once.",
        'starting_deadline = "10m"',
    ),
    "JobSpec.runs_kept": ("Finished runs that are kept, whatever `keep` says.", "runs_kept = 10"),
    "JobSpec.sandbox": (
        "It is a sandbox, made to be worked in (docs/sandboxes.md); `deadline` is its time limit.",
        "sandbox = true",
    ),
    "JobSpec.snapshot": (
        "Of a sandbox: the snapshot that it goes on from; a constraint names the node that has it.",
        'snapshot = "sha256:' + "0" * 64 + '"',
    ),
    "JobSpec.idle_limit": (
        "Of a sandbox: ended, with that reason, when no command and no copy was under way in it for so long. At least 1 s.",
        'idle_limit = "10m"',
    ),
    "JobSpec.pool": (
        "It is a template of sandboxes: so many are kept running, to be taken by name (docs/sandboxes.md).",
        "pool = 4",
    ),
    "Build.base": ("Debian release that the image begins with; `scratch` for files alone.", 'base = "debian:bookworm"'),
    "Build.apt": (
        "Debian packages. A Python app needs `python3` (`python3-minimal` lacks most of the library).",
        'apt = ["python3"]',
    ),
    "Build.pip": ("Python packages, as pip takes them; python3 is added.", 'pip = ["flask==3.0.3"]'),
    "Build.files": ("Paths below the app's directory that go into `workdir`.", 'files = ["app.py", "static"]'),
    "Build.ignore": (
        "Patterns that are left out, by name or by path; a list of one's own replaces the whole default.",
        'ignore = ["*.log", "tests", ".git", "atoll.toml"]',
    ),
    "Build.workdir": ("Where the files go, and the directory that the command starts in.", 'workdir = "/app"'),
    "Build.command": ("The image's command.", 'command = ["python3", "/app/app.py"]'),
    "Build.user": ("The image's user; root where absent.", 'user = "65534:65534"'),
    "Build.env": ("The image's environment, beside PATH and LANG.", 'env = { TZ = "UTC" }'),
    "Resources.cpu": ("Limit, and what placement reserves. To a thousandth of a core.", "cpu = 0.5"),
    "Resources.memory": (
        "Limit, and what placement reserves; beyond it the kernel ends it (`oom`). At least 4MiB; `sandbox` 48MiB.",
        'memory = "256MiB"',
    ),
    "Resources.disk": ("Writable space of the root; a hard bound (ENOSPC), not reserved: disks are sparse.", 'disk = "2GiB"'),
    "Resources.pids": ("Processes and threads at most. Below 32 the limit is set only after the start.", "pids = 256"),
    "Resources.gpu": ("GPUs; the table below, and [gpu.md](gpu.md).", "[resources.gpu]"),
    "Resources.devices": (
        "Devices of the node's CDI specs that its operator allowed ([gpu.md](gpu.md#other-devices-cdi)).",
        'devices = ["vendor.com/class=name"]',
    ),
    "Gpu.model": ("Words of the device's name, whatever their case.", 'model = "h200"'),
    "Gpu.vendor": ("Whose device it must be.", 'vendor = "nvidia"'),
    "Gpu.count": ("Whole devices; below 1 a share of one; with `profile` how many partitions.", "count = 1"),
    "Gpu.memory": ("What each device or partition must have; of a share, what is set aside for it.", 'memory = "40GiB"'),
    "Gpu.profile": ("A MIG partition, on a device in MIG mode.", 'profile = "1g.10gb"'),
    "Gpu.sharing": ("How a share is held to its size; `time-slice` where absent.", 'sharing = "mps"'),
    "Gpu.topology": ("How near two whole devices or more must be to each other.", 'topology = "nvlink"'),
    "Gpu.driver": ("The oldest version of the driver that will do.", 'driver = "550"'),
    "Gpu.capabilities": ("Which of the driver's libraries it gets to see.", 'capabilities = ["compute", "video"]'),
    "Port.name": ("What routes and health checks call it.", 'name = "http"'),
    "Port.port": ("The number it listens on. Below 1024 needs no root inside.", "port = 8000"),
    "Port.protocol": (
        "`http` is served by the ingress, by hostname; `tcp` and `udp` at the ports that `[[ingress.ports]]` names.",
        'protocol = "http"',
    ),
    "Port.http2": ("The instance speaks HTTP/2 without TLS (gRPC).", "http2 = true"),
    "Port.host": (
        "The port of its node, on all addresses but loopback, of IPv4 and IPv6, that leads here. One instance can have it. "
        "Below 1024 only where the project's quota allows it (`host_port_min`).",
        "host = 8053",
    ),
    "Route.host": ("A hostname, or `*.` and one. One owner in the cell.", 'host = "www.example.com"'),
    "Route.path": ("Path prefix; the longest that matches wins. `/api` does not match `/apis`.", 'path = "/api"'),
    "Route.port": ("The name of an `http` port; the first where absent.", 'port = "http"'),
    "Route.headers": (
        "Only requests with all of these headers; `*` for any value. Of one place the route with most of them wins.",
        'headers = { x-beta = "1" }',
    ),
    "Route.timeout": ("Instead of `ingress.timeout`.", 'timeout = "5s"'),
    "Route.retries": ("Instead of `ingress.retries`.", "retries = 1"),
    "Route.request_headers": ("Changed after those of `[ingress]`.", 'request_headers = { set = { x-part = "api" } }'),
    "Route.response_headers": ("Changed after those of `[ingress]`.", 'response_headers = { remove = ["server"] }'),
    "IngressRules.certificate": (
        "Who signs for its hostnames that have no certificate: `own` or `acme`; see [certificates.md](certificates.md).",
        'certificate = "acme"',
    ),
    "IngressRules.https_only": (
        "What comes without TLS is led to the same URL with it (308); 503 while there is no certificate.",
        "https_only = true",
    ),
    "IngressRules.http3": (
        "HTTP/3, too, for its hostnames that have a certificate: over UDP at the ingress's TLS port.",
        "http3 = true",
    ),
    "IngressRules.instance_tls": (
        "The instances speak TLS themselves, and are known by this; the table below. Else plainly.",
        "[ingress.instance_tls]",
    ),
    "IngressRules.timeout": (
        "From the whole request to the whole answer, then 504. Left out: while something moves. Ends streams, too.",
        'timeout = "30s"',
    ),
    "IngressRules.retries": ("How often another instance is asked what none has begun to work on.", "retries = 2"),
    "IngressRules.retry_statuses": (
        "Answers (500 to 599) after which another instance is asked, whatever the method: only where doing it twice does no harm.",
        "retry_statuses = [502, 503]",
    ),
    "IngressRules.try_timeout": (
        "Of each try; then another instance is asked, if the method is a safe one (GET, HEAD, OPTIONS).",
        'try_timeout = "5s"',
    ),
    "IngressRules.body_max": (
        "A larger request body is answered 413. What does not say its length is held back until it is whole, streams of gRPC too.",
        'body_max = "10MiB"',
    ),
    "IngressRules.rate": ("How many requests; the table below. More are answered 429.", "[ingress.rate]"),
    "IngressRules.limits": ("How much at a time; the table below. More is answered 503.", "[ingress.limits]"),
    "IngressRules.outliers": ("When an instance that fails is left out; the table below.", "[ingress.outliers]"),
    "IngressRules.spill": (
        "Requests under way for each instance of the nearest site, beyond which the next site gets some, too.",
        "spill = 50",
    ),
    "IngressRules.sticky": ("A cookie that brings a client back to its instance; the table below.", "[ingress.sticky]"),
    "IngressRules.request_headers": (
        "Set and taken away before the instance sees the request.",
        'request_headers = { set = { x-env = "prod" }, remove = ["x-debug"] }',
    ),
    "IngressRules.response_headers": ("The same of answers.", 'response_headers = { set = { x-frame-options = "DENY" } }'),
    "IngressRules.canary": (
        "Requests that go to the new release while a canary rollout is under way, whatever its share; the table below.",
        "[ingress.canary]",
    ),
    "CanaryChoice.header": ("A header; this or `cookie` is needed.", 'header = "x-canary"'),
    "CanaryChoice.cookie": ("A cookie, by which a browser stays with the release.", 'cookie = "canary"'),
    "CanaryChoice.value": ("What it must be.", 'value = "always"'),
    "IngressRules.ports": (
        "Where `tcp` and `udp` ports are reached from outside, at every ingress; the table below.",
        "[[ingress.ports]]",
    ),
    "PublicPort.public": (
        "The port of every ingress; of the cell one app has it. Only what the project's quota allows (`public_ports`).",
        "public = 5432",
    ),
    "PublicPort.port": ("The name of the app's `tcp` or `udp` port that it leads to.", 'port = "db"'),
    "Rate.requests": ("A second, at each ingress.", "requests = 100"),
    "Rate.burst": ("At once after a quiet time; at least `requests`, which it is where absent.", "burst = 200"),
    "Limits.connections": ("To all instances, from each ingress.", "connections = 500"),
    "Limits.requests": ("Under way at a time; of HTTP/2 ports, where one connection carries many.", "requests = 1000"),
    "Limits.pending": ("Requests that wait for a connection.", "pending = 100"),
    "Outliers.failures": ("Answers of 500 to 599 in a row, or as many connections that fail.", "failures = 5"),
    "Outliers.eject": (
        "How long the first time, 1 s to 5 min; each further time as much longer, to 5 min.",
        'eject = "30s"',
    ),
    "Outliers.share": ("Percent of the instances that may be left out at a time, but always one of several.", "share = 50"),
    "InstanceTls.ca": (
        "Who must have signed the instance's certificate (PEM). This or `pins` is needed.",
        """[ingress.instance_tls] with ca = '''PEM'''""",
    ),
    "InstanceTls.name": ("With `ca`: a name that the certificate must have.", 'name = "web.internal"'),
    "InstanceTls.mutual": (
        "The ingress shows a certificate, too, by the authority in `/etc/atoll/ingress/ca.pem` of each instance; "
        "with `ca` and no `name`, the instance's must be for `APP.PROJECT.internal`.",
        "mutual = true",
    ),
    "InstanceTls.pins": (
        "SHA-256 of public keys (SubjectPublicKeyInfo) in base64, one of which the instance must have.",
        'pins = ["k2oYXKqiZrucvpgengXLeM1zKwsygOuURBK7b4+PB68="]',
    ),
    "Sticky.cookie": ("Its name.", 'cookie = "session-at"'),
    "Sticky.ttl": ("How long the client keeps it; left out, until the browser is closed.", 'ttl = "1h"'),
    "HeaderEdit.set": ("Name → value, in place of what is there; at most 32.", 'set = { x-env = "prod" }'),
    "HeaderEdit.remove": ("Names.", 'remove = ["x-debug"]'),
    "Health.kind": ("`http`: 200-399 to a GET; `tcp`: it accepts; `exec`: exit status 0.", 'kind = "http"'),
    "Health.port": ("The name of the port; the first where absent.", 'port = "http"'),
    "Health.path": ("What is asked for by `http`.", 'path = "/healthz"'),
    "Health.command": ("What is run inside by `exec`.", 'command = ["pg_isready"]'),
    "Health.start": ("How long until the first success failures do not count.", 'start = "2m"'),
    "Health.interval": ("Between two checks. Until the first success they come faster.", 'interval = "5s"'),
    "Health.timeout": ("Of one check.", 'timeout = "2s"'),
    "Health.retries": ("Failures in a row after which it is ended and started again.", "retries = 3"),
    "Metrics.port": ("The name of an `http` port (without `http2`); the first where absent.", 'port = "http"'),
    "Metrics.path": ("Answers a GET with Prometheus' text format, at most 256 KiB.", 'path = "/metrics"'),
    "Metrics.names": (
        "Those that are shown and kept beside the one that `scale` names; samples of one name are summed up.",
        'names = ["tokens_per_second"]',
    ),
    "Scale.replicas": (
        "Instances; 0 stops the app and keeps it. With `max` the least, and 0 lets it sleep: [autoscaling.md](autoscaling.md).",
        "replicas = 3",
    ),
    "Scale.max": (
        "The most that its sources (`metric` with `target`, and the keys from `concurrency` to `prometheus`) may ask for; the "
        "largest counts. 1 with `replicas = 0` and no source.",
        "max = 4",
    ),
    "Scale.metric": ("The metric that says how much there is to do, such as a queue's depth.", 'metric = "queue_depth"'),
    "Scale.target": ("As many instances are wanted as bring the metric down to this for each of them.", "target = 8"),
    "Scale.concurrency": ("Requests under way that each instance is to have on average.", "concurrency = 20"),
    "Scale.rps": ("Requests per second that each instance is to have on average.", "rps = 100"),
    "Scale.stable": (
        "Over so long these two are averaged; a tenth of it is the panic window. From 6 s to 1 h.",
        'stable = "1m"',
    ),
    "Scale.cpu": ("Share of `resources.cpu` that each instance is to use.", "cpu = 0.7"),
    "Scale.memory": ("Share of `resources.memory` that each is to use.", "memory = 0.8"),
    "Scale.gpu": ("Share of the time in which each one's GPUs are to be at work.", "gpu = 0.8"),
    "Scale.windows": ("Times in which there are at least so many; the table below.", "[[scale.windows]]"),
    "Scale.prometheus": ("What a Prometheus server says; the table below.", "[scale.prometheus]"),
    "Scale.idle": (
        "`predict`: asleep and awake by the app's own history; `idle_after` is then what one cold start is worth.",
        'idle = "predict"',
    ),
    "ScaleWindow.start": ("When it begins: minute, hour, day, month, weekday.", 'start = "0 8 * * 1-5"'),
    "ScaleWindow.end": ("When it ends.", 'end = "0 18 * * 1-5"'),
    "ScaleWindow.timezone": ("Of the two.", 'timezone = "Europe/Berlin"'),
    "ScaleWindow.replicas": ("The least in that time.", "replicas = 3"),
    "PrometheusQuery.url": (
        "The server, without `/api/v1/query` and user. Only hosts that the operator allows: `atoll up --prometheus HOST:PORT`.",
        'url = "http://prometheus.example:9090"',
    ),
    "PrometheusQuery.query": ("PromQL; its answer is one number, or one series.", 'query = "sum(queue_depth)"'),
    "PrometheusQuery.target": ("As many instances are wanted as bring the answer down to this for each of them.", "target = 50"),
    "Scale.down": ("How long fewer must have been enough before an instance is taken away.", 'down = "1m"'),
    "Scale.idle_after": (
        "With `replicas = 0` and `max`: after so long without a request the last instance is taken away. At least 5 s.",
        'idle_after = "5m"',
    ),
    "Scale.standby": (
        "So many more are started and then parked, to take the place of one that is missing; see [autoscaling.md](autoscaling.md).",
        "standby = 1",
    ),
    "Placement.regions": (
        "Regions it may run in, preferred first; `any` stands for all others; empty is all.",
        'regions = ["weur", "any"]',
    ),
    "Placement.near": (
        "The nearest site that fits: `users` (where its requests come from), `app:NAME`, `site:NAME` or coordinates; "
        "see [placement.md](placement.md).",
        'near = "users"',
    ),
    "Placement.latency_max": ("A rule: the round trip to what `near` names takes no longer.", 'latency_max = "50ms"'),
    "Placement.residency": (
        "A rule: only at sites in these countries (`DE`), groups of them (`eu`, `eea`) or regions.",
        'residency = ["eu", "CH"]',
    ),
    "Placement.constraints": ("Hard rules on nodes' labels; the table below.", "[[placement.constraints]]"),
    "Placement.affinity": ("Beside the instances of an app or job of the project; the table below.", "[[placement.affinity]]"),
    "Placement.anti_affinity": ("Away from them; the same table.", "[[placement.anti_affinity]]"),
    "Placement.max_skew": ("Makes `spread` a rule: nowhere more above the place with fewest than this.", "max_skew = 1"),
    "Placement.gang": ("Those that wait are placed all at once or not at all, at most 500: a job's `parallelism`.", "gang = true"),
    "Placement.together": (
        "With `gang`, all in one place by this label; `nvlink`: one node, every two of all their GPUs joined.",
        'together = "site"',
    ),
    "Placement.cost": ("How much a cheap node is wished for, by the nodes' label `price`; 0 for not at all.", "cost = 20"),
    "Placement.follow_volumes": (
        "It goes only where its volumes are, until each such node has one of the release.",
        "follow_volumes = false",
    ),
    "Placement.spread": ("What instances are spread over.", 'spread = "site"'),
    "Placement.tolerations": (
        "Taints of nodes that it accepts: `KEY`, `KEY=VALUE`, each with `:EFFECT` for that alone; `*` for all.",
        'tolerations = ["spot"]',
    ),
    "Placement.priority": (
        "Who is placed first; what fits nowhere takes the place of apps' instances of lower priority.",
        "priority = 80",
    ),
    "Constraint.label": ("A node's label; `node`, `site`, `region` and `arch` are always there.", 'label = "disk"'),
    "Constraint.operator": ("How label and value are compared.", 'operator = "in"'),
    "Constraint.value": (
        "One value, or for `in` and `not in` a list; see [scheduling.md](scheduling.md).",
        'value = ["ssd", "nvme"]',
    ),
    "Affinity.app": ("Whose instances; its own name means its own.", 'app = "db"'),
    "Affinity.by": ("The label whose equal value makes two nodes one place.", 'by = "site"'),
    "Affinity.weight": ("How strong the wish is; left out, it is a rule that must hold.", "weight = 50"),
    "Stop.signal": (
        "What it is told by; an image's own stop signal counts where this is left at its default.",
        'signal = "SIGINT"',
    ),
    "Stop.grace": ("From the signal to SIGKILL. A PID 1 without a handler ignores SIGTERM and waits it out.", 'grace = "30s"'),
    "Lost.replace": (
        "`at-once`, `wait` or `never`. Left out: at once; with volumes of its node never, a job without `retries` waits.",
        'replace = "wait"',
    ),
    "Lost.wait": ("How long a lost node may take to come back, with `wait`.", 'wait = "5m"'),
    "Lost.stop_after_disconnect": (
        "Its node stops it after so long without contact, and only then is it replaced: never two at once. 5 s or more.",
        'stop_after_disconnect = "30s"',
    ),
    "Volume.name": ("Its name within the app or job.", 'name = "data"'),
    "Volume.path": ("Where it is seen inside; not `/`, nor below /proc, /sys, /dev.", 'path = "/var/lib/db"'),
    "Volume.read_only": ("It cannot be written to. False where left out, and with `image` true.", "read_only = true"),
    "Volume.image": (
        "Shows the files of this image, read-only: a model's weights, say; one copy per node.",
        'image = "registry.example/weights:1"',
    ),
    "Restart.policy": ("`always`, `on-failure` (exit status other than 0), `never`. See [node.md](node.md).", 'policy = "always"'),
    "Restart.delay": ("Before the first new start.", 'delay = "200ms"'),
    "Restart.factor": ("What the delay grows by with each end in a row.", "factor = 2.0"),
    "Restart.delay_max": ("What it grows to at most.", 'delay_max = "1m"'),
    "Restart.reset": ("After so long a run the delay is the first one again.", 'reset = "1m"'),
    "Rollout.strategy": (
        "`rolling`: instance by instance; `canary`: by shares of the requests; `blue-green`: a whole set, then all at once. See "
        "[rollouts.md](rollouts.md).",
        'strategy = "canary"',
    ),
    "Rollout.max_surge": ("Instances above `replicas` at a time; a blue-green rollout has twice `replicas`.", "max_surge = 1"),
    "Rollout.max_unavailable": (
        "Ready instances below `replicas` at a time. Not 0 together with `max_surge` 0.",
        "max_unavailable = 0",
    ),
    "Rollout.drain": ("The longest wait for active requests before an instance is told to stop.", 'drain = "30s"'),
    "Rollout.deadline": (
        "Without progress for so long the rollout has failed, and the old release keeps serving.",
        'deadline = "5m"',
    ),
    "Rollout.steps": ("Of a canary; the table below.", "[[rollout.steps]]"),
    "Rollout.analysis": ("When the new release is too bad to go on with; the table below.", "[rollout.analysis]"),
    "Rollout.auto_revert": (
        "Goes back to the last good release by itself when it fails; where absent true of `canary` and `blue-green`.",
        "auto_revert = true",
    ),
    "Rollout.promote_after": (
        "Of `blue-green`: the new set gets the requests when it was ready for so long; without it when a person promotes it.",
        'promote_after = "2m"',
    ),
    "Rollout.keep_old": ("Of `blue-green`: how long the old set is kept, to switch back at once.", 'keep_old = "10m"'),
    "CanaryStep.weight": ("Percent of the requests to the new release, however many instances it has. Rises.", "weight = 5"),
    "CanaryStep.pause": ("How long the step lasts; without it until `atoll rollout resume`.", 'pause = "60s"'),
    "Analysis.error_rate_max": ("Share of requests answered with 500 to 599 that is too much when above.", "error_rate_max = 0.01"),
    "Analysis.latency_p99_max": ("The 99th percentile that is too slow when above.", 'latency_p99_max = "300ms"'),
    "Analysis.requests_min": ("With fewer requests to the new release there is no verdict.", "requests_min = 100"),
    "Analysis.interval": ("How often there is a verdict; at least 1 s.", 'interval = "10s"'),
    "Analysis.failures_max": ("Bad intervals of a step that are forgiven.", "failures_max = 2"),
}
SHARED = {key.partition(".")[2] for key in MEANING if key.startswith("Workload.")}
SECTIONS = (
    ("AppSpec", "An app: `atoll.toml`", "Keys that apps and jobs share, and the app's own.", "AppSpec"),
    ("JobSpec", "A job: `atoll jobs run -f job.toml`", "All shared keys above, and these.", "JobSpec"),
    ("Build", "`[build]`", "", "AppSpec"),
    ("Resources", "`[resources]`", "All are limits of each instance.", "AppSpec"),
    ("Gpu", "`[resources.gpu]`", "", "AppSpec"),
    ("Port", "`[[ports]]` (apps, at most 32)", "", "AppSpec"),
    (
        "Route",
        "`[[routes]]` (apps, at most 256)",
        "An app with an `http` port also has `APP.DOMAIN`, or `APP.PROJECT.DOMAIN`.",
        "AppSpec",
    ),
    ("IngressRules", "`[ingress]` (apps)", "Of each ingress by itself. Changing it makes no release.", "AppSpec"),
    ("CanaryChoice", "`[ingress.canary]`", "", "AppSpec"),
    ("PublicPort", "`[[ingress.ports]]` (at most 32)", "", "AppSpec"),
    ("Rate", "`[ingress.rate]`", "", "AppSpec"),
    ("Limits", "`[ingress.limits]`", "", "AppSpec"),
    ("Outliers", "`[ingress.outliers]`", "", "AppSpec"),
    ("Sticky", "`[ingress.sticky]`", "", "AppSpec"),
    ("InstanceTls", "`[ingress.instance_tls]`", "Of all `http` ports of the app. Its health check is by `tcp` then.", "AppSpec"),
    ("HeaderEdit", "`[ingress.request_headers]`, `[ingress.response_headers]`, and those of a route", "", "AppSpec"),
    ("Health", "`[health]` (apps)", "", "AppSpec"),
    ("Scale", "`[scale]` (apps)", "", "AppSpec"),
    ("ScaleWindow", "`[[scale.windows]]` (at most 16)", "", "AppSpec"),
    ("PrometheusQuery", "`[scale.prometheus]`", "", "AppSpec"),
    ("Metrics", "`[metrics]` (apps)", "", "AppSpec"),
    (
        "Worker",
        "`[worker]` (apps)",
        "Makes the app a worker: no `image`, `build` or `command`, and `isolation` is `isolate`.",
        "AppSpec",
    ),
    ("ServiceBinding", "`[[worker.services]]` (at most 64)", "", "AppSpec"),
    ("DurableObject", "`[[worker.durable_objects]]` (at most 64)", "With any of these, or of KV, a worker runs once.", "AppSpec"),
    ("KvNamespace", "`[[worker.kv]]` (at most 64)", "", "AppSpec"),
    ("Assets", "`[worker.assets]`", "`_headers` and `_redirects` among them are rules, as wrangler has them.", "AppSpec"),
    ("Queue", "`[[worker.queues]]` (at most 64)", "Kept on the node's disk; each message is delivered at least once.", "AppSpec"),
    ("Restart", "`[restart]` (apps)", "After the n-th end in a row: `delay * factor**n`, at most `delay_max`.", "AppSpec"),
    ("Rollout", "`[rollout]` (apps)", "", "AppSpec"),
    (
        "Disruption",
        "`[disruption]` (apps)",
        "Drains, maintenance, preemption, sick GPUs and rollouts keep it together. One of the two. Changing it makes no release.",
        "AppSpec",
    ),
    ("CanaryStep", "`[[rollout.steps]]` (at most 20)", "", "AppSpec"),
    (
        "Analysis",
        "`[rollout.analysis]`",
        "Of what the ingress counts, the old release at the same time beside it. One of the first two is needed.",
        "AppSpec",
    ),
    ("Stop", "`[stop]`", "", "AppSpec"),
    ("Lost", "`[lost]`", "What the node and the leader do when they lose each other; see [detection.md](detection.md).", "AppSpec"),
    ("Placement", "`[placement]`", "", "AppSpec"),
    ("Constraint", "`[[placement.constraints]]`", "", "AppSpec"),
    ("Affinity", "`[[placement.affinity]]`, `[[placement.anti_affinity]]`", "", "AppSpec"),
    ("NetworkRules", "`[network]`", "", "AppSpec"),
    ("Allow", "`[[network.ingress]]`, `[[network.egress]]` (at most 32 each)", "", "AppSpec"),
    ("Volume", "`[[volumes]]` (at most 32)", "A directory of the node, shared by the app's instances there.", "AppSpec"),
)
INTRO = """# The spec: every key

<!-- Made by scripts/spec_reference.py from the JSON Schema; tests/unit/test_spec_reference.py holds it current. -->

A spec is TOML (`atoll.toml`), JSON or YAML, with the same keys, at most 1 MiB. `atoll schema app` and `atoll schema job` print the
JSON Schema; `GET /v1/schema/app` serves it. An unknown key is refused by name. A release keeps the whole spec with every default
filled in, so that it keeps its meaning when a later Atoll has other defaults.

A *name* has lower-case letters, digits and `-`, begins with a letter, and has at most 40 characters. A *size* is a number of bytes
or text such as `"256MiB"`, `"1.5GB"`, up to 1 PiB. A *duration* is seconds or text such as `"500ms"`, `"1m30s"`, `"2h"`, up to 366
days. *Cores* go from 0.01 to 4096.
"""


def page() -> str:
    """Return the page. Raises SystemExit when a key lacks its meaning, or a meaning its key."""
    schemas = {"AppSpec": json_schema(AppSpec)["$defs"], "JobSpec": json_schema(JobSpec)["$defs"]}
    parts = [INTRO]
    used: set[str] = set()
    for record, title, text, source in SECTIONS:
        definitions = schemas[source]
        required = set(definitions[record].get("required", ()))
        rows = []
        for key, value in definitions[record]["properties"].items():
            if record == "JobSpec" and key in SHARED:
                continue
            owner = "Workload" if record == "AppSpec" and key in SHARED else record
            used.add(f"{owner}.{key}")
            if f"{owner}.{key}" not in MEANING:
                raise SystemExit(f"scripts/spec_reference.py says nothing of {owner}.{key}")
            meaning, example = MEANING[f"{owner}.{key}"]
            rows.append(
                f"| `{key}` | {kind_of(value, definitions)} | {default_of(key, value, required)} | {meaning} | `{example}` |"
            )
        head = "| key | type | default | meaning | example |\n|---|---|---|---|---|"
        parts.append("\n".join(filter(None, (f"## {title}\n", f"{text}\n" if text else "", head, *rows))) + "\n")
    if surplus := sorted(MEANING.keys() - used):
        raise SystemExit(f"scripts/spec_reference.py speaks of what is not there: {', '.join(surplus)}")
    return "\n".join(parts)


def kind_of(value: dict[str, Any], definitions: dict[str, Any]) -> str:
    """Return a key's type and bounds in words."""
    if (hint := HINTS.get(value.get("description", ""))) is not None:
        return hint
    if "$ref" in value:
        name = value["$ref"].rpartition("/")[2]
        choices = definitions[name].get("enum")
        return ", ".join(f"`{choice}`" for choice in choices) if choices else "table"
    if "enum" in value:
        return ", ".join(f"`{choice}`" for choice in value["enum"])
    if "anyOf" in value:
        return " or ".join(kind_of(part, definitions) for part in value["anyOf"] if part != {"type": "null"})
    kind = value.get("type")
    if kind == "array":
        most = f", at most {value['maxItems']}" if "maxItems" in value else ""
        inner = kind_of(value.get("items", {}), definitions)
        return ("list of tables" if inner == "table" else "list of text") + most
    if kind == "object":
        return "table of text" if "additionalProperties" in value else "table"
    words = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false"}[str(kind)]
    low = value.get("minimum", value.get("exclusiveMinimum"))
    above = "above " if "exclusiveMinimum" in value else ""
    if low is not None and "maximum" in value:
        words += f", {above}{low} to {value['maximum']}"
    return words + (f", at most {value['maxLength']} characters" if "maxLength" in value else "")


def default_of(key: str, value: dict[str, Any], required: set[str]) -> str:
    """Return a key's default as people write it."""
    if key in required:
        return "needed"
    default = value.get("default")
    if default is None or isinstance(default, dict):
        return "–" if not default else "as below"
    hint = HINTS.get(value.get("description", ""))
    if hint == "size":
        return f"{default >> 20} MiB"
    if hint == "duration":
        return f"{default:g} s"
    return f"`{json.dumps(default, ensure_ascii=False)}`".replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.name}", file=sys.stderr)
