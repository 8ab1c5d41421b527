"""A TCP and a UDP port of the ingress on a real `atoll up`: from the spec to the instance's own network."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
from test_up import wait_for

from atoll.entry.scratch import CommandFailed, ScratchAtoll, free_port
from atoll.images.minimal import docker_archive

pytestmark = [
    pytest.mark.system,
    pytest.mark.timeout(240),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes namespaces, mounts and cgroups"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc"),
]
PROGRAM = r"""
#include <arpa/inet.h>
#include <poll.h>
#include <unistd.h>
int main(void) {
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(5432)}, from;
    int tcp = socket(AF_INET, SOCK_STREAM, 0), udp = socket(AF_INET, SOCK_DGRAM, 0), one = 1;
    setsockopt(tcp, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(tcp, (void *)&at, sizeof at) || listen(tcp, 16)) return 1;
    at.sin_port = htons(5353);
    if (bind(udp, (void *)&at, sizeof at)) return 2;
    struct pollfd both[2] = {{.fd = tcp, .events = POLLIN}, {.fd = udp, .events = POLLIN}};
    for (char text[2048];;) {
        poll(both, 2, -1);
        if (both[0].revents) {
            int client = accept(tcp, 0, 0);
            if (write(client, "here", 4) != 4) return 3;
            close(client);
        }
        if (both[1].revents) {
            socklen_t size = sizeof from;
            ssize_t got = recvfrom(udp, text, sizeof text, 0, (void *)&from, &size);
            if (got > 0) sendto(udp, text, got, 0, (void *)&from, size);
        }
    }
}
"""
"""Says `here` to who connects at 5432, and sends back what comes by UDP at 5353."""


def program(directory: Path) -> Path:
    source, made = directory / "line.c", directory / "line"
    source.write_text(PROGRAM)
    subprocess.run(["gcc", "-O1", "-static", "-o", str(made), str(source)], check=True, timeout=60)
    return made


def spec(image: str, tcp: int, udp: int) -> str:
    return f"""
name = "line"
image = "{image}"
command = ["/bin/line"]
resources = {{ memory = "32MiB" }}
stop = {{ grace = "1s" }}
[[ports]]
name = "db"
port = 5432
protocol = "tcp"
[[ports]]
name = "echo"
port = 5353
protocol = "udp"
[health]
kind = "tcp"
port = "db"
[ingress]
ports = [{{ public = {tcp}, port = "db" }}, {{ public = {udp}, port = "echo" }}]
"""


def said_by_tcp(port: int) -> bytes:
    try:
        with socket.create_connection(("127.0.0.1", port), 5) as client:
            found = b""
            while data := client.recv(4096):
                found += data
            return found
    except OSError:
        return b""


def echoed_by_udp(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(1)
        client.connect(("127.0.0.1", port))
        try:
            client.send(b"hello")
            return client.recv(100) == b"hello"
        except OSError:
            return False


def test_tcp_and_udp_reach_an_instance_by_the_ports_that_its_project_may_have(tmp_path: Path) -> None:
    with ScratchAtoll("atoll-test-") as atoll:
        archive = docker_archive(tmp_path / "line.tar", "line:1", program=program(tmp_path), target="/bin/line")
        image = atoll.atoll_json("image", "import", str(archive), "--name", "line", "--tag", "1")["image"]
        tcp, udp = free_port(), free_port()
        file = tmp_path / "line.toml"
        file.write_text(spec(image, tcp, udp))
        with pytest.raises(CommandFailed, match="--public-ports"):
            atoll.atoll("deploy", "-f", str(file))
        low, high = sorted((tcp, udp))
        atoll.atoll("projects", "quota", "default", "--public-ports", f"{low}-{high}")
        atoll.atoll("deploy", "-f", str(file))
        wait_for(lambda: said_by_tcp(tcp) == b"here", "an answer by TCP")
        wait_for(lambda: echoed_by_udp(udp), "an answer by UDP")
        with socket.create_server(("0.0.0.0", 0)) as other:
            taken = other.getsockname()[1]
            atoll.atoll("projects", "quota", "default", "--public-ports", f"{min(low, taken)}-{max(high, taken)}")
            file.write_text(spec(image, taken, udp))
            (words,) = atoll.atoll_json("deploy", "-f", str(file))["refused"].values()
            assert str(taken) in words
            assert str(taken) in atoll.atoll("status", "line")
            assert echoed_by_udp(udp), "its other port is served"
        file.write_text(spec(image, tcp, udp))
        assert atoll.atoll_json("deploy", "-f", str(file))["app"]["release"] == 1, "the ports at ingresses are in no release"
        wait_for(lambda: said_by_tcp(tcp) == b"here", "an answer by TCP again")
        wait_for(lambda: atoll.atoll_json("status", "line")["app"]["refused"] == {}, "nothing to be left out any more")
        atoll.atoll("delete", "line", "--yes")
        wait_for(lambda: said_by_tcp(tcp) == b"", "the port to be closed")
