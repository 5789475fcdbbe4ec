"""Several servers as one: weights for all, requests dealt over them, the dead brought back."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from powerflow_lit.rollout.engine import EngineError, LostWeightsError
from powerflow_lit.rollout.vllm_server_client import Server, ServerDownError
from powerflow_lit.rollout.vllm_server_weights import Transfer

POLL_S = 0.05  # between two looks at what is finished
LOSSES = 3  # of a server that gives no answer in between; the next is one too many
WATCH_S = 10.0  # between two looks at whether a machine is still there
SILENT = 6  # such looks in vain, one after the other: it is not

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
        self._losses: dict[str, int] = {}  # since its last answer

    @property
    def at_work(self) -> list[Server]:
        """Those that hold the weights."""
        return [server for server in self.servers if server.label is not None]

    def give_weights(self) -> None:
        """The weights that the transfer has taken, to every server that is there.

        Ours are started again where they have ended; of others the first to be back is waited for.

        Raises:
            EngineError: none is left, or one cannot take them.
        """
        lost: dict[Server, str] = {}

        def give(server: Server) -> None:
            last, server.label = server.label, None
            try:
                if server.holds() != last:  # it was started anew, perhaps as something else
                    self._look_at(server)
                self._transfer.give(server)
            except ServerDownError as error:
                lost[server] = str(error)

        if self._transfer.takes_turns:
            for server in self.servers:
                give(server)
        else:
            with ThreadPoolExecutor(max(len(self.servers), 1)) as threads:
                list(threads.map(give, self.servers))
        for server in [server for server in lost if server.process is not None]:
            self._bring_back(server, lost.pop(server), threading.Event())
        lost = {server: lost[server] for server in self.servers if server in lost}  # in their order
        if lost and not self.at_work:
            self._await_first(lost)
        for server, why in lost.items():
            print(f"warning: {server.name} is left out until the next refill: {why}", flush=True)

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
            LostWeightsError: none has the weights, or see `Transfer.give`.
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
            going = set(runs)
            gone: EngineError = LostWeightsError("no server has the policy's weights")
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
                        tasks = [
                            group.create_task(self._slot(server, session, job, lost))
                            for _ in range(slots)
                        ]
                        watch = group.create_task(self._watch(server, session, tasks, lost))
                        await asyncio.wait(tasks)
                        watch.cancel()
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
            except asyncio.CancelledError:
                job.waiting.appendleft(index)
                raise
            self._losses.pop(server.name, None)

    async def _watch(
        self, server: Server, session: Any, tasks: Sequence[asyncio.Task[None]], lost: list[str]
    ) -> None:
        """End the requests of a machine that has vanished: its connections stay open for ever.

        A server of ours cannot vanish so: its end closes them.
        """
        silent = 0
        while server.process is None:
            await asyncio.sleep(WATCH_S)
            silent = 0 if await server.is_well(session) else silent + 1
            if silent == SILENT:
                lost.append(f"asked for its health {SILENT} times, it did not answer")
                for task in tasks:
                    task.cancel()
                return

    def _await_first(self, lost: dict[Server, str]) -> None:
        """Give the weights to whichever of these servers, at addresses all, is back first.

        It is `lost` no longer then.

        Raises:
            ServerGoneError: none comes back.
        """
        for server, why in lost.items():
            self._transfer.forget(server)
            print(f"warning: {self._waited_for(server, why)}", flush=True)
        deadline = time.monotonic() + self._wait_s
        while True:
            for server in lost:
                try:
                    if (ails := server.ails()) is not None:
                        raise ServerDownError(ails)
                    self._look_at(server)
                    self._transfer.give(server)
                except ServerDownError as error:
                    lost[server] = str(error)
                else:
                    del lost[server]
                    return
            if time.monotonic() > deadline:
                after = f", after {self._wait_s:.0f} s"
                each = [f"{server.name} is lost: {why}{after}" for server, why in lost.items()]
                raise ServerGoneError("; ".join(each))
            time.sleep(POLL_S)

    def _bring_back(self, server: Server, why: str, over: threading.Event) -> None:
        """Wait for a server that is gone, ours started again, and give it the weights.

        Raises:
            ServerGoneError: it does not come back, or is lost again and again.
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
        own, is_up = server.process, server.is_up()
        if own is not None and own.is_running and own.is_starting and not is_up:
            return f"{server.name} is waited for: it is starting"
        self._losses[server.name] = self._losses.get(server.name, 0) + 1
        is_over = self._losses[server.name] > LOSSES
        if own is None or (own.is_running and is_up):
            if is_over:
                raise ServerGoneError(
                    f"{server.name} was lost {LOSSES + 1} times in a row before it gave an answer "
                    f"({why}): a server serves one run at a time, does another use it?"
                )
            again = f"{server.name} is given its weights again: {why}"
            return again if is_up else self._waited_for(server, why)
        own.settle()
        died = own.why()
        if is_over:
            raise ServerGoneError(f"{server.name} {died}, {LOSSES + 1} times in a row")
        own.stop()
        own.start()
        return f"{server.name} {died} and is started again"

    def _waited_for(self, server: Server, why: str) -> str:
        return f"{server.name} is waited for, up to {self._wait_s:.0f} s: {why}"


class ServerGoneError(EngineError):
    """A server is lost for good; others may still be there."""
