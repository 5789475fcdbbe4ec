"""Several servers as one: weights for all, requests dealt over them, the dead brought back."""

from __future__ import annotations

import asyncio
import math
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from powerflow_lit.rollout.engine import EngineError
from powerflow_lit.rollout.vllm_server_client import Server, ServerDownError
from powerflow_lit.rollout.vllm_server_weights import Transfer

POLL_S = 0.05  # between two looks at what is finished
RESTARTS = 3  # of a server of ours that gives no answer in between

Answer = dict[str, Any]


@dataclass
class _Job:
    """Requests that are dealt over the servers."""

    bodies: Sequence[Mapping[str, Any]]
    waiting: deque[int]
    answers: dict[int, Answer] = field(default_factory=dict)
    fresh: list[int] = field(default_factory=list)  # answers that nobody has looked at
    samples: int = 0
    tokens: int = 0
    over: threading.Event = field(default_factory=threading.Event)  # nobody waits for it

    def add(self, index: int, answer: Answer) -> None:
        self.answers[index] = answer
        self.fresh.append(index)
        self.samples += len(answer["choices"])
        self.tokens += sum(len(choice["token_ids"]) for choice in answer["choices"])

    @property
    def is_done(self) -> bool:
        return len(self.answers) == len(self.bodies)


class Pool:
    """Servers that hold the same weights.

    Args:
        servers: already looked at.
        transfer: how they get weights.
        look_at: asks a server that was started what it is; raises where it is of another kind.
        start_s, wait_s: seconds that ours may take to start, and others to be there again.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        transfer: Transfer,
        look_at: Callable[[Server], None],
        *,
        start_s: float,
        wait_s: float,
    ) -> None:
        self.servers, self._transfer, self._look_at = servers, transfer, look_at
        self._start_s, self._wait_s = start_s, wait_s
        self._restarts: dict[str, int] = {}

    @property
    def at_work(self) -> list[Server]:
        """Those that hold the weights."""
        return [server for server in self.servers if server.label is not None]

    def give_weights(self) -> None:
        """The weights that the transfer has taken, to every server that is there.

        Ours are started again where they have ended; of others one at least is waited for.

        Raises:
            EngineError: none is left, or one cannot take them.
        """
        lost: dict[Server, str] = {}

        def give(server: Server) -> None:
            server.label = None
            try:
                self._transfer.give(server)
            except ServerDownError as error:
                lost[server] = str(error)

        if self._transfer.takes_turns:
            for server in self.servers:
                give(server)
        else:
            with ThreadPoolExecutor(max(len(self.servers), 1)) as threads:
                list(threads.map(give, self.servers))
        for server, why in sorted(lost.items(), key=lambda pair: pair[0].process is None):
            if server.process is None and self.at_work:
                print(f"warning: {server.name} is left out until the next refill: {why}")
            else:
                self._bring_back(server, why, threading.Event())

    def ask(
        self,
        bodies: Sequence[Mapping[str, Any]],
        on_progress: Callable[[int, int], None] | None,
        on_answer: Callable[[int, Answer], None],
        *,
        at_once: int,
    ) -> None:
        """Let the servers answer requests.

        Args:
            on_progress: as an engine's `generate`.
            on_answer: given the number of each request and its answer as soon as it is there, in
                the thread of the caller.
            at_once: requests that a server has at a time.

        Raises:
            EngineError: no server is left, or one refuses a request.
        """
        job = _Job(bodies, deque(range(len(bodies))))
        asyncio.run(self._ask(job, on_progress, on_answer, at_once))

    def close(self) -> None:
        for server in self.servers:
            server.close()
        self._transfer.close()

    async def _ask(
        self,
        job: _Job,
        on_progress: Callable[[int, int], None] | None,
        on_answer: Callable[[int, Answer], None],
        at_once: int,
    ) -> None:
        servers = self.at_work
        share = math.ceil(len(job.bodies) / max(len(servers), 1))  # none takes all at the start
        runs = [asyncio.create_task(self._run(s, job, at_once, share)) for s in servers]
        try:
            going, gone = set(runs), ServerGoneError("no server has the policy's weights")
            while not job.is_done or job.fresh:
                if not going and not job.is_done:
                    raise gone
                ended, going = await asyncio.wait(
                    going, timeout=POLL_S, return_when=asyncio.FIRST_COMPLETED
                )
                fresh, job.fresh = job.fresh, []
                for index in fresh:  # the servers go on meanwhile
                    on_answer(index, job.answers[index])
                if on_progress is not None:  # a run that is asked to stop raises here
                    on_progress(job.samples, job.tokens)
                for run in ended:
                    if isinstance(error := run.exception(), ServerGoneError):
                        gone = error
                        print(f"warning: {error}", flush=True)
                    elif error is not None:
                        raise error
        finally:
            job.over.set()
            for run in runs:
                run.cancel()
            await asyncio.gather(*runs, return_exceptions=True)

    async def _run(self, server: Server, job: _Job, at_once: int, share: int) -> None:
        """Let one server answer what waits, until the job is done.

        Raises:
            ServerGoneError: it died and did not come back; the others have its requests.
        """
        async with server.session() as session:
            while not job.is_done:
                slots = min(at_once, share, len(job.waiting))
                if slots == 0:  # what another has may come back, should it die
                    await asyncio.sleep(POLL_S)
                    continue
                lost: list[str] = []
                try:
                    async with asyncio.TaskGroup() as group:
                        for _ in range(slots):
                            group.create_task(self._slot(server, session, job, lost))
                except BaseExceptionGroup as errors:
                    raise errors.exceptions[0] from None
                if lost:
                    await asyncio.to_thread(self._bring_back, server, lost[0], job.over)

    async def _slot(self, server: Server, session: Any, job: _Job, lost: list[str]) -> None:
        while job.waiting and not lost:
            index = job.waiting.popleft()
            try:
                job.add(index, await server.generate(session, job.bodies[index]))
            except ServerDownError as error:
                job.waiting.appendleft(index)
                lost.append(str(error))
                return
            self._restarts.pop(server.name, None)

    def _bring_back(self, server: Server, why: str, over: threading.Event) -> None:
        """Wait for a server that is gone, ours started again, and give it the weights.

        Raises:
            ServerGoneError: it does not come back.
            LostWeightsError: see `Transfer.give`.
        """
        server.label = None
        self._transfer.forget(server)
        limit = self._wait_s if server.process is None else self._start_s
        while server.label is None and not over.is_set():
            print(f"warning: {self._action(server, why)}", flush=True)
            try:
                server.wait(limit, over.is_set)
                self._look_at(server)
                self._transfer.give(server)
            except ServerDownError as error:
                why = str(error)
                if server.process is None:
                    raise ServerGoneError(f"{server.name} is lost: {why}") from error

    def _action(self, server: Server, why: str) -> str:
        """Start a server of ours again if it has ended; what is done, in words.

        Raises:
            ServerGoneError: that was done a few times in vain.
        """
        if server.process is None:
            return f"{server.name} is waited for, up to {self._wait_s:.0f} s: {why}"
        if server.process.is_running and server.is_up():
            return f"{server.name} is given its weights again: {why}"
        if server.process.is_running and server.process.is_starting:
            return f"{server.name} is waited for: it is starting"
        server.process.settle()
        died = server.process.why()
        self._restarts[server.name] = self._restarts.get(server.name, 0) + 1
        if self._restarts[server.name] > RESTARTS:
            raise ServerGoneError(f"{server.name} {died}, {RESTARTS + 1} times in a row")
        server.process.stop()
        server.process.start()
        return f"{server.name} {died} and is started again"


class ServerGoneError(EngineError):
    """A server is lost for good; others may still be there."""
