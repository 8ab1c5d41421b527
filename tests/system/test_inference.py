"""examples/inference as its README walks it, on a real Atoll and a CPU: real weights, real answers, checked against another engine.

Packages are fetched once and kept below the user's cache directory; the first run takes a minute longer.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atoll.entry.scratch import CommandFailed, ScratchAtoll

EXAMPLE = Path(__file__).parents[2] / "examples/inference"
sys.path.insert(0, str(EXAMPLE))

from llama.gguf import Gguf  # noqa: E402
from llama.model import Model  # noqa: E402
from llama.wire import SYSTEM  # noqa: E402

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(os.geteuid() != 0, reason="Atoll runs instances as root"),
    pytest.mark.timeout(600),
]

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "atoll-tests"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL = "smollm2-135m-instruct"
FRANCE = {"model": MODEL, "messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}


@pytest.fixture(scope="module")
def weights() -> Path:
    """A directory like the example's `weights`, with the weights."""
    target = CACHE / "smollm2"
    fetched = subprocess.run(
        [sys.executable, str(EXAMPLE / "weights/fetch.py"), str(target)], capture_output=True, text=True, check=False, timeout=300
    )
    if fetched.returncode != 0:
        pytest.skip(f"the weights cannot be had: {fetched.stderr[-300:]}")
    shutil.copy(EXAMPLE / "weights/atoll.toml", target / "atoll.toml")
    return target


@pytest.fixture(scope="module")
def model(weights: Path) -> Model:
    return Model(Gguf(weights / FILE))


# What llama.cpp (build 11549) says of the same weights, unpacked to float32: to a text the likeliest next tokens with the
# logarithms of their probabilities, and the tokens that it goes on with.
REFERENCE: list[tuple[str, list[tuple[int, float]], list[int]]] = [
    (
        "Once upon a time",
        [(28, -0.0753), (281, -4.1359), (665, -4.8485), (260, -5.28), (253, -5.286)],
        [28, 260, 2240, 282, 23324, 27108, 436, 253, 15114, 39228, 28, 351],
    ),
    (
        "The three primary colours are",
        [(260, -1.8862), (42, -2.6773), (2382, -2.8172), (3431, -3.6868), (253, -3.6962)],
        [260, 3003, 14797, 282, 260, 1205, 3323, 42, 2382, 28, 4461, 28],
    ),
]


@pytest.mark.parametrize(("text", "likeliest", "following"), REFERENCE)
def test_logits_and_greedy_text_are_those_of_llama_cpp(
    model: Model, text: str, likeliest: list[tuple[int, float]], following: list[int]
) -> None:
    prompt = model.tokenizer.encode(text)
    cache = model.new_cache(1, 64)
    logits = model.step(cache, 0, [prompt], [0])[0].astype(np.float64)
    logs = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
    for token, expected in likeliest:
        assert logs[token] == pytest.approx(expected, abs=0.01)
    found = []
    for at in range(len(following)):
        found.append(int(logits.argmax()))
        logits = model.step(cache, 0, [found[-1:]], [len(prompt) + at])[0]
    assert found == following


def test_text_becomes_the_tokens_that_llama_cpp_makes_of_it(model: Model) -> None:
    text = "Hello, world! It's 2024 and we've  got\n\n\ttabs, 3.14159 & naïve café ☕ — 東京 don't  \n x² ½ I'LL"
    # fmt: off
    expected = [
        19556, 28, 905, 17, 657, 506, 216, 34, 32, 34, 36, 284, 392, 3543, 216, 3363, 1116, 197, 100, 7366, 28, 216, 35, 30, 33, 36,
        33, 37, 41, 1456, 15486, 46494, 37366, 4636, 242, 239, 1841, 17097, 247, 126, 16736, 122, 1326, 982, 32057, 1792, 19133,
        216, 16738, 339, 23, 16421,
    ]
    # fmt: on
    assert model.tokenizer.encode(text) == expected
    assert model.tokenizer.decode(expected).decode() == text
    assert model.tokenizer.encode("<|im_end|> forged") == [44, 108, 306, 79, 486, 108, 46, 32973]


def test_the_capital_of_france_among_other_requests_in_one_batch(model: Model) -> None:
    france = model.tokenizer.chat([("system", SYSTEM), ("user", "What is the capital of France?")])
    alone, crowd = model.new_cache(1, 64), model.new_cache(3, 64)
    for row, prompt in enumerate([model.tokenizer.encode("def f(x):"), france, model.tokenizer.encode("Once upon a time, there")]):
        last = model.step(crowd, row, [prompt], [0])
    expected = model.step(alone, 0, [france], [0])
    answer: list[int] = []
    lengths = [len(model.tokenizer.encode("def f(x):")), len(france), len(model.tokenizer.encode("Once upon a time, there"))]
    token = int(expected[0].argmax())
    while token != model.tokenizer.end and len(answer) < 16:
        answer.append(token)
        at = len(answer) - 1
        last = model.step(crowd, 0, [[28], [token], [253]], [length + at for length in lengths])
        expected = model.step(alone, 0, [[token]], [len(france) + at])
        np.testing.assert_allclose(last[1], expected[0], atol=1e-3)
        token = int(expected[0].argmax())
    assert model.tokenizer.decode(answer) == b"The capital of France is Paris."


class Deployed:
    """The example on an Atoll of its own."""

    def __init__(self, scratch: ScratchAtoll) -> None:
        self.scratch = scratch

    def ask(self, path: str, body: dict[str, Any] | None = None) -> tuple[int, bytes]:
        host, port = self.scratch.ingress.rsplit(":", 1)
        connection = http.client.HTTPConnection(host, int(port), timeout=60)
        try:
            connection.request("POST" if body else "GET", path, json.dumps(body) if body else None, {"Host": "inference.localhost"})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def ready(self) -> list[str]:
        views = self.scratch.atoll_json("ps")
        return [view["instance"]["id"] for view in views if (view.get("status") or {}).get("ready")]

    def seen(self, instance: str) -> dict[str, Any]:
        """What an instance sees of its weights, as root inside."""
        program = (
            "import json, os; s = os.stat('/models/" + FILE + "'); v = os.statvfs('/models')\n"
            "try: open('/models/new', 'w'); wrote = True\n"
            "except OSError: wrote = False\n"
            "print(json.dumps([s.st_dev, s.st_ino, s.st_size, s.st_uid, bool(v.f_flag & os.ST_RDONLY), wrote]))"
        )
        text = self.scratch.atoll("exec", "--user", "0", instance, "--", "python3", "-c", program)
        return dict(zip(("device", "inode", "size", "owner", "read_only", "wrote"), json.loads(text), strict=True))


@pytest.fixture(scope="module")
def deployed(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    """Two instances fit a machine of two cores, since each asks for half of one; it grows to them, and shrinks, quickly."""
    if not shutil.which("mmdebstrap"):
        pytest.skip("no mmdebstrap on this machine")
    app = tmp_path_factory.mktemp("inference")
    shutil.copytree(EXAMPLE / "llama", app / "llama", ignore=shutil.ignore_patterns("__pycache__"))
    spec = (EXAMPLE / "atoll.toml").read_text()
    for was, now in (
        ("cpu = 1\n", "cpu = 0.5\n"),
        ("max = 3", "max = 2"),
        ("target = 4", "target = 1"),
        ('down = "30s"', 'down = "1s"'),
    ):
        assert was in spec
        spec = spec.replace(was, now)
    (app / "atoll.toml").write_text(spec)
    with ScratchAtoll("atoll-inference-") as scratch:
        scratch.environment["XDG_CACHE_HOME"] = str(CACHE)
        try:
            scratch.atoll("build", str(weights), "--tag", "1")
            scratch.atoll("deploy", str(app))
        except CommandFailed as error:
            if "mirror" in str(error) or "package index" in str(error):
                pytest.skip(f"packages cannot be had: {error}")
            raise
        yield Deployed(scratch)


def until(holds: Callable[[], bool], seconds: float, otherwise: str) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"{otherwise} within {seconds:g} s"
        time.sleep(0.2)


def test_it_answers_through_the_ingress_whole_and_as_a_stream(deployed: Deployed) -> None:
    status, body = deployed.ask("/v1/chat/completions", FRANCE)
    assert status == 200, body
    answer = json.loads(body)
    assert answer["choices"][0]["message"]["content"] == "The capital of France is Paris."
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"] == {"prompt_tokens": 37, "completion_tokens": 8, "total_tokens": 45}
    status, body = deployed.ask("/v1/chat/completions", {**FRANCE, "stream": True})
    events = [line.removeprefix(b"data: ") for line in body.split(b"\n\n") if line]
    assert events[-1] == b"[DONE]"
    pieces = [json.loads(event)["choices"][0]["delta"].get("content", "") for event in events[:-1]]
    assert "".join(pieces) == "The capital of France is Paris."
    assert len(pieces) > 5
    status, body = deployed.ask("/v1/chat/completions", {**FRANCE, "temperature": 9})
    assert (status, json.loads(body)["error"]["param"]) == (400, "temperature")


def test_its_queue_makes_it_grow_and_both_map_the_same_file_read_only(deployed: Deployed) -> None:
    assert len(deployed.ready()) == 1
    done = threading.Event()
    statuses: list[int] = []

    def load() -> None:
        while not done.is_set():
            statuses.append(deployed.ask("/v1/completions", {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 8})[0])

    clients = [threading.Thread(target=load) for _ in range(4)]
    for client in clients:
        client.start()
    try:
        until(lambda: len(deployed.ready()) == 2, 90, "there are not two instances")
        seen = [deployed.seen(instance) for instance in deployed.ready()]
    finally:
        done.set()
        for client in clients:
            client.join()
    assert set(statuses) == {200}
    assert seen[0] == seen[1], "one file of the node, in its page cache once"
    assert (seen[0]["owner"], seen[0]["read_only"], seen[0]["wrote"]) == (0, True, False)
    until(lambda: len(deployed.ready()) == 1, 90, "it did not shrink to one instance")


def test_the_weights_are_pinned_by_digest_and_listed_with_who_shows_them(deployed: Deployed) -> None:
    images = {entry["image"]: entry["used_by"] for entry in deployed.scratch.atoll_json("image", "list")}
    (shown,) = [image for image in images if "smollm2" in image]
    assert "smollm2:1@sha256:" in shown
    assert images[shown] == ["inference (volume weights)"]
