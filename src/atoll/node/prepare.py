"""Everything that must be there before a process can start: image, link, secrets, GPUs side by side; then the root."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

import structlog

from atoll.model.errors import AtollError, Invalid, Retry, Unavailable, Unsupported
from atoll.model.ports.devices import Edits
from atoll.model.ports.images import Image, PullProgress
from atoll.model.ports.network import Link
from atoll.model.ports.runtime import Box, Runtime
from atoll.model.records import Assignment
from atoll.model.spec import JobSpec
from atoll.model.units import format_bytes, format_seconds
from atoll.node.compose import compose, ports_of, stop_signal_of
from atoll.node.image_choice import choose_image
from atoll.node.snapshots import Snapshots
from atoll.node.tools import Tools
from atoll.node.transitions import Happening, Prepared, PrepareFailed, Progressed
from atoll.node.volumes import show_images

PREPARE_S = 1_800.0
"""Deadline of it all; most of it is for a large image over a slow line."""
SECRETS_S = 10.0
"""Deadline of asking for secrets."""
SECRETS_KNOWN_S = 2.0
"""The same where the last known ones can stand in."""
PROGRESS_S = 0.25
"""Shortest time between two words on a pull's progress."""

log = structlog.get_logger()


def in_words(error: AtollError) -> str:
    """Return an error and its mend as one message for a status."""
    return f"{error} ({error.mend})" if error.mend else str(error)


class Preparation:
    """One try. `run` ends with a call of `tell`: Prepared or PrepareFailed; cancelled, it tells nothing."""

    def __init__(
        self,
        assignment: Assignment,
        runtime: Runtime | None,
        tools: Tools,
        secrets: dict[str, str] | None,
        digest: str | None,
        tell: Callable[[Happening], None],
        *,
        volume_digests: dict[str, str] | None = None,
    ) -> None:
        self._assignment = assignment
        self._runtime = runtime
        self._tools = tools
        self._tell = tell
        self._told_at = float("-inf")
        self.secrets = secrets
        self.digest = digest
        """Of the image that it had, or has now."""
        self.volume_digests = dict(volume_digests or {})
        """The same of its volumes that show one."""
        self._shown: Mapping[str, Path] = {}
        self.going_on: tuple[Box, Path] | None = None
        """What goes on from which snapshot, where it is not to be started anew."""

    async def run(self) -> None:
        try:
            async with asyncio.timeout(PREPARE_S):
                outcome = await self._prepare()
        except TimeoutError:
            outcome = PrepareFailed(f"not ready to start within {format_seconds(PREPARE_S)}", passing=True)
        except AtollError as error:
            outcome = PrepareFailed(in_words(error), passing=error.retry is Retry.SAFE)
        except OSError as error:
            outcome = PrepareFailed(f"the node failed: {error}", passing=True)
        except Exception:  # the outer edge of this task: a bug must not end the agent
            log.exception("preparation failed", instance=self._assignment.instance.id)
            outcome = PrepareFailed("internal error while preparing; the agent's log has it", passing=True)
        self._tell(outcome)

    async def _prepare(self) -> Prepared | PrepareFailed:
        instance, workload = self._assignment.instance, self._assignment.workload
        runtime = self._runtime
        if runtime is None:
            wanted = instance.runtime or " or ".join(workload.runtimes)
            raise Unsupported(f"this node cannot run {wanted}", mend="run `atoll doctor` on it")
        self._check_devices()
        stdout, stderr = self._tools.logs.open(instance.project, instance.id)
        image, link, secrets, devices = await _together(
            self._image(),
            self._tools.network.attach(instance.id, project=instance.project, ports=ports_of(workload), rules=workload.network),
            self._fetch_secrets(),
            self._claim(runtime),
        )
        box = compose(
            self._assignment,
            node=self._tools.node,
            directory=self._tools.directories.box(instance.id),
            image=image,
            link=link,
            secrets=secrets,
            mounts=[
                *self._tools.directories.make_volumes(self._assignment, self._shown),
                *self._tools.directories.make_trust(self._assignment),
            ],
            devices=devices,
            stdout=stdout,
            stderr=stderr,
        )
        snapshot = workload.snapshot if isinstance(workload, JobSpec) else None
        if snapshot is None:
            await runtime.create(box)
        else:
            kept = Snapshots(self._tools.directories.snapshots)
            self.going_on = box, await asyncio.to_thread(kept.find, instance.project, snapshot)
        return Prepared(
            image_digest=image.digest,
            address=link.address,
            ipv6=link.ipv6,
            stop_signal=stop_signal_of(image),
            volume_digests=dict(self.volume_digests),
        )

    def _check_devices(self) -> None:
        """Refuse what cannot have its devices, before an image is fetched for it."""
        instance, gpu = self._assignment.instance, self._assignment.workload.resources.gpu
        if gpu is not None and not instance.gpus:
            raise Invalid(
                "resources.gpu: the instance came to this node without a device of it, and is not started without one",
                field="resources.gpu",
                mend="use a server of the agent's version",
            )
        if instance.gpus and self._tools.gpus is None:
            names = ", ".join(grant.device for grant in instance.gpus)
            raise Unsupported(f"this node has no GPU any more; the instance was given {names}", mend="run `atoll doctor` on it")

    async def _claim(self, runtime: Runtime) -> Edits:
        instance, gpu = self._assignment.instance, self._assignment.workload.resources.gpu
        edits = Edits()
        if instance.gpus and gpu is not None and self._tools.gpus is not None:
            edits = await self._tools.gpus.claim(instance, gpu, runtime.name)
        if names := self._assignment.workload.resources.devices:
            if self._tools.foreign is None:
                raise Unsupported(
                    f"resources.devices: this node hands on no device of a CDI spec; the instance asks for {', '.join(names)}",
                    field="resources.devices",
                    mend="start its agent with --cdi-devices",
                )
            edits = await asyncio.to_thread(self._tools.foreign.add, edits, names)
        return edits

    async def _image(self) -> Image:
        reference = self._assignment.workload.image
        if reference is None:
            raise Invalid("the release has no image", field="image")
        async with asyncio.TaskGroup() as group:
            shown = group.create_task(show_images(self._tools, self._assignment, self.volume_digests, self._progress))
            image = await choose_image(self._tools, self._assignment.instance, reference, self.digest, self._progress)
            self.digest = image.digest
        self._shown = shown.result()
        return image

    def _progress(self, progress: PullProgress) -> None:
        now = self._tools.clock.monotonic()
        if now - self._told_at >= PROGRESS_S:
            self._told_at = now
            of = f" of {format_bytes(progress.total_bytes)}" if progress.total_bytes else ""
            self._tell(Progressed(f"image: {progress.phase} {format_bytes(progress.done_bytes)}{of}"))

    async def _fetch_secrets(self) -> dict[str, str]:
        """Return the secrets as they are now, or while the control plane is away as they were."""
        instance, workload = self._assignment.instance, self._assignment.workload
        if not workload.secrets:
            return {}
        known = self.secrets
        try:
            async with asyncio.timeout(SECRETS_S if known is None else SECRETS_KNOWN_S):
                fetched = await self._tools.control.instance_secrets(instance.id)
        except (Unavailable, TimeoutError):
            if known is None:
                raise Unavailable("the control plane does not answer, and this instance needs its secrets") from None
            return known
        if fetched != known:
            self.secrets = fetched
            try:
                self._tools.record.put_secrets(instance.id, fetched)
            except AtollError as error:
                log.error("secrets not recorded", instance=instance.id, error=str(error), mend=error.mend)
        return fetched


async def _together(
    image: Coroutine[Any, Any, Image],
    link: Coroutine[Any, Any, Link],
    secrets: Coroutine[Any, Any, dict[str, str]],
    devices: Coroutine[Any, Any, Edits],
) -> tuple[Image, Link, dict[str, str], Edits]:
    """Await all at once; the first failure cancels the others and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = group.create_task(image), group.create_task(link), group.create_task(secrets), group.create_task(devices)
    except BaseExceptionGroup as errors:
        failure: BaseException = errors
        while isinstance(failure, BaseExceptionGroup):
            failure = failure.exceptions[0]
        raise failure from None
    return tasks[0].result(), tasks[1].result(), tasks[2].result(), tasks[3].result()
