"""One program looks around inside of every runtime and tries some forty ways out: system calls, devices, paths, control groups.

The cases of the OCI runtime specification's validation that apply (namespaces, mounts, masked and read-only paths, devices, user,
groups, limits, hostname, directory, descriptors, no new privileges) are among them. Virtual machines: test_runtime_vm.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from probing import INSIDE, PROBE, build_probe, check_findings, read_findings
from runtime_world import REAL, make_layer, real_world

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    layer = make_layer(tmp_path_factory.mktemp("image"))
    build_probe(layer / "bin")
    return layer


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize(("user", "who"), [("", (0, 0, ())), ("app", (1234, 1235, (2000,)))])
async def test_nothing_of_the_node_is_seen_or_reached(
    name: str, user: str, who: tuple[int, int, tuple[int, ...]], tmp_path: Path, layer: Path
) -> None:
    world = real_world(name, tmp_path, layer)
    try:
        code, out, err = await world.run("probe", *PROBE, env=INSIDE, user=user)
        assert (code, err) == (0, "")
        kernel = "gvisor" if name == "gvisor" else "node"
        check_findings(read_findings(out), kernel=kernel, hostname="host-probe", user=who)
    finally:
        await world.close()
