"""Where the agent keeps what on disk, below its data directory (mode 0700: nobody else of the machine may look in)."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from atoll.model.errors import Exhausted, Unavailable
from atoll.model.ports.runtime import Mount
from atoll.model.records import Assignment, OwnerKind
from atoll.model.spec import CALLER_CA, CALLER_CA_DIRECTORY
from atoll.node.compose import knows_callers

JOBS = "@jobs"
VOLUME_MODE = 0o777
"""Any user inside may write; outside, the parents' mode keeps everybody but root away. Directories belong to root,
which is the instance's root too: the runtime maps its ids."""


class Directories:
    def __init__(self, data: Path) -> None:
        self.data = data
        self.instances = data / "instances"
        self.volumes = data / "volumes"
        self.logs = data / "logs"
        self.snapshots = data / "snapshots"

    @property
    def record(self) -> Path:
        return self.data / "record.db"

    @property
    def contact(self) -> Path:
        """When the leader was last known to have heard of this node."""
        return self.data / "contact"

    @property
    def gpus(self) -> Path:
        """The devices as they were last known."""
        return self.data / "gpus.json"

    def make(self) -> None:
        for path in (self.data, self.instances, self.volumes, self.logs, self.snapshots):
            path.mkdir(parents=True, exist_ok=True, mode=0o700)

    def box(self, id: str) -> Path:
        """The runtime's own directory of an instance."""
        return self.instances / id / "box"

    def make_volumes(self, assignment: Assignment, shown: Mapping[str, Path]) -> list[Mount]:
        """Make the directories of the workload's volumes where they are not there yet. Raises Exhausted on a full disk.

        An app's are `PROJECT/APP/NAME`; a job of the same name has its own, below a name that no app can have. Those in `shown`
        (volume → directory) show an image's files instead.
        """
        instance = assignment.instance
        project = self.volumes / instance.project
        owner = project / instance.owner if instance.owner_kind is OwnerKind.APP else project / JOBS / instance.owner
        mounts = []
        for volume in assignment.workload.volumes:
            if volume.image is not None:
                mounts.append(Mount(shown[volume.name], volume.path, read_only=True))
                continue
            source = owner / volume.name
            try:
                source.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                with contextlib.suppress(FileExistsError):
                    source.mkdir()
                    source.chmod(VOLUME_MODE)
            except OSError as error:
                raise Exhausted(f"cannot make volume {volume.name}: {error.strerror}", mend="free some disk space") from None
            mounts.append(Mount(source, volume.path, bool(volume.read_only)))
        return mounts

    def make_trust(self, assignment: Assignment) -> list[Mount]:
        """Make the file by which an app's instances know the ingresses that call them; nothing where the app asks for none.

        Raises Unavailable: the control plane has not told of the authority. Exhausted on a full disk.
        """
        if not knows_callers(assignment.workload):
            return []
        if not assignment.caller_ca:
            mend = "a server of the agent's version tells of it"
            raise Unavailable("the authority that ingresses show themselves by has not been told of yet", mend=mend)
        directory = self.instances / assignment.instance.id / "callers"
        file = directory / CALLER_CA.rpartition("/")[2]
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o755)
            file.write_text(assignment.caller_ca)
            file.chmod(0o644)
        except OSError as error:
            raise Exhausted(f"cannot write {file.name}: {error.strerror}", mend="free some disk space") from None
        return [Mount(directory, CALLER_CA_DIRECTORY, read_only=True)]

    def remove_instance(self, id: str) -> None:
        """Remove what is left of an instance's directory. The runtime must have let go of it before."""
        shutil.rmtree(self.instances / id, ignore_errors=True)

    def strangers(self, known: Iterable[str]) -> list[str]:
        """Return the ids that have a directory here but are not among `known`."""
        if not self.instances.is_dir():
            return []
        return sorted({path.name for path in self.instances.iterdir()} - set(known))
