"""Answers many requests at once: each step computes one token of every answer under way, and requests join and leave between steps.

Long prompts are read in pieces, a piece a step, so that the others' answers go on meanwhile.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from llama.model import Model
from llama.sampling import Sampler, Sampling, Text

WARM_UP_TOKENS = 8
RATE_S = 10.0
"""What `tokens_per_second` looks back on."""


class Full(Exception):
    """As many requests wait as may."""


@dataclass(frozen=True)
class Limits:
    rows: int = 8
    """Answers under way at a time."""
    context: int = 1_024
    """Tokens of a prompt and its answer together."""
    waiting: int = 64
    """Requests that wait for a row; more are refused."""
    prompt_piece: int = 128
    """Tokens of a prompt that are read in one step."""


@dataclass(frozen=True)
class Delta:
    """A piece of an answer; the last one has `finish`: `stop`, `length`, or `error`."""

    text: str = ""
    tokens: int = 0
    finish: str | None = None


@dataclass(eq=False)
class Request:
    prompt: Sequence[int]
    tokens_max: int
    deliver: Callable[[Delta], None]
    """Called from the engine's thread, in order."""
    sampling: Sampling = field(default_factory=Sampling)
    stop: Sequence[str] = ()
    cancelled: bool = False
    """Set it, and the request is dropped before the next step. Nothing is delivered any more."""


@dataclass(eq=False)
class _Row:
    """A request that has a row of the cache; the row's number is its place in the list."""

    request: Request
    sampler: Sampler
    text: Text
    read: int = 0
    """Positions of the cache that are filled: of the prompt, then of the answer too."""
    answer: list[int] = field(default_factory=list)


class Engine:
    """`submit` and the counts may be used from any thread; `step` from one."""

    def __init__(self, model: Model, limits: Limits, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.model = model
        self._cache = model.new_cache(limits.rows, limits.context)
        self.limits = limits
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._waiting: deque[Request] = deque()
        self._rows: list[_Row] = []
        """Those that are being answered, then at most one whose prompt is being read."""
        self._reading = False
        self._recent: deque[tuple[float, int]] = deque()
        self.tokens_total = 0
        self.prompt_tokens_total = 0

    @property
    def context(self) -> int:
        return self._cache.context

    @property
    def active(self) -> int:
        """Requests that have a row."""
        return len(self._rows)

    @property
    def depth(self) -> int:
        """Requests taken in and not yet answered: those that wait, and those that are active."""
        with self._lock:
            return len(self._waiting) + len(self._rows)

    @property
    def tokens_per_second(self) -> float:
        """Tokens of answers over the last `RATE_S` seconds."""
        with self._lock:
            since = self._monotonic() - RATE_S
            while self._recent and self._recent[0][0] < since:
                self._recent.popleft()
            return sum(count for _, count in self._recent) / RATE_S

    def warm_up(self) -> None:
        """Compute once for nobody, before the first request: what a GPU compiles at its first use is compiled then, and a device
        that cannot compute is found out before anyone asks. Raises what the device raises."""
        piece = list(range(min(WARM_UP_TOKENS, self.context - 1)))
        self.model.step(self._cache, 0, [piece], [0])
        rows = self._cache.rows
        self.model.device.to_host(self.model.step(self._cache, 0, [[0]] * rows, [len(piece)] * rows))

    def submit(self, request: Request) -> None:
        """Take a request in. Raises Full, and ValueError for one that does not fit the context (check it before)."""
        if not request.prompt or request.tokens_max < 1 or len(request.prompt) + request.tokens_max > self.context:
            raise ValueError("the prompt and the answer do not fit the context")
        with self._lock:
            if len(self._waiting) >= self.limits.waiting:
                raise Full(f"{len(self._waiting)} requests are waiting")
            self._waiting.append(request)

    def step(self) -> bool:
        """Compute one token of each answer, and read one piece of a prompt. Returns whether there was anything to do."""
        self._drop_cancelled()
        self._admit()
        if not self._rows:
            return False
        answering = len(self._rows) - self._reading
        if answering:
            self._answer(answering)
        if self._reading:
            self._read(self._rows[-1])
        return True

    def fail(self) -> None:
        """End every request with `error`: no step will come any more."""
        with self._lock:
            requests = [*(row.request for row in self._rows), *self._waiting]
            self._rows, self._reading = [], False
            self._waiting.clear()
        for request in requests:
            request.deliver(Delta(finish="error"))

    def _drop_cancelled(self) -> None:
        with self._lock:
            self._waiting = deque(request for request in self._waiting if not request.cancelled)
        for row in [row for row in self._rows if row.request.cancelled]:
            self._leave(row)

    def _admit(self) -> None:
        with self._lock:
            if self._reading or not self._waiting or len(self._rows) >= self._cache.rows:
                return
            request = self._waiting.popleft()
            self._rows.append(_Row(request, Sampler(request.sampling), Text(request.stop)))
            self._reading = True

    def _read(self, row: _Row) -> None:
        """Read the next piece of the prompt of the last row; after the last piece comes the answer's first token."""
        prompt = row.request.prompt
        piece = prompt[row.read : row.read + self.limits.prompt_piece]
        logits = self.model.step(self._cache, len(self._rows) - 1, [piece], [row.read])
        row.read += len(piece)
        self.prompt_tokens_total += len(piece)
        if row.read == len(prompt):
            self._reading = False
            self._took(1)
            self._take(row, row.sampler.draw(self.model.device.to_host(logits)[0]))

    def _answer(self, count: int) -> None:
        rows = self._rows[:count]
        logits = self.model.step(self._cache, 0, [[row.answer[-1]] for row in rows], [row.read for row in rows])
        chosen = self.model.device.to_host(logits)
        self._took(count)
        for row in rows:
            row.read += 1  # of all, before any leaves and others are moved
        for row, row_logits in zip(rows, chosen, strict=True):
            self._take(row, row.sampler.draw(row_logits))

    def _take(self, row: _Row, token: int) -> None:
        """Add a token to an answer, deliver what it brings, and let the row go if it was the last."""
        row.answer.append(token)
        ended = token == self.model.tokenizer.end
        full = len(row.answer) == row.request.tokens_max
        data = b"" if ended else self.model.tokenizer.decode([token])
        text = row.text.add(data, last=ended or full)
        finish = "stop" if ended or row.text.stopped else "length" if full else None
        if finish is not None:
            self._leave(row)  # before it is delivered: who has the answer does not count as waiting for it any more
        row.request.deliver(Delta(text, 1, finish))

    def _leave(self, row: _Row) -> None:
        """Free a row of the cache. The last answering row takes its place, so that those in use stay the first ones."""
        at = self._rows.index(row)
        rows = list(self._rows)
        if self._reading and at == len(rows) - 1:
            self._reading = False
        else:
            last = len(rows) - 1 - self._reading
            if at != last:
                self._cache.move(last, at, rows[last].read)
                rows[at] = rows[last]
            if self._reading:
                self._cache.move(last + 1, last, rows[last + 1].read)
                rows[last] = rows[last + 1]
        rows.pop()
        with self._lock:
            self._rows = rows

    def _took(self, tokens: int) -> None:
        with self._lock:
            self.tokens_total += tokens
            self._recent.append((self._monotonic(), tokens))


class EngineThread:
    """Steps an engine as long as there is something to do. `failure` says why it ended, if it did not by `stop`."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.failure: Exception | None = None
        self._work = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Raises Full; RuntimeError when the engine has failed."""
        if self.failure is not None:
            raise RuntimeError(f"the engine has failed: {self.failure}")
        self.engine.submit(request)
        with self._work:
            self._work.notify()

    def stop(self) -> None:
        with self._work:
            self._stopping = True
            self._work.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stopping:
                if not self.engine.step():
                    with self._work:
                        if not self._stopping and self.engine.depth == 0:
                            self._work.wait()
        except Exception as error:  # the thread's outer edge: whoever waits must hear of it
            self.failure = error
            self.engine.fail()
            raise
