"""Calls to one `vllm serve`: what it is, its weights, and responses."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import httpx

from powerflow_lit.rollout.engine import EngineError, NonFiniteRolloutError
from powerflow_lit.rollout.vllm_server_process import OwnServer

GENERATE = "/inference/v1/generate"
KEY = "VLLM_API_KEY"  # the variable that a server reads its key from too
POLL_S = 0.2
PROBE_S = 5.0  # to say that it is well
CONNECT_S = 30.0
KEPT_S = 2.0  # an idle connection; vLLM ends it after 5
CONNECTIONS = 512  # at once, at most
NOT_FINITE = -9999.0  # what vLLM writes for a log-prob of NaN or minus infinity
LONGEST_MESSAGE = 300  # characters of a server's own words


class ServerDownError(Exception):
    """It does not answer, or has other weights than it was given: it was started anew."""


class Server:
    """One server, ours or a running one.

    Args:
        address: of a running one, e.g. `http://node7:8000`; ours has a socket file.
        process: ours.
        request_s: seconds that an answer may take.
    """

    def __init__(self, address: str, process: OwnServer | None, *, request_s: float) -> None:
        self.process = process
        self.name = address if process is None else f"vllm serve of this run ({process.socket})"
        self.address = address
        self.facts: Mapping[str, Any] = {}
        self.label: str | None = None  # of the weights that it was given last
        self.is_given_up = False
        self._request_s = request_s
        limits = httpx.Limits(keepalive_expiry=KEPT_S)
        transport = self._socket(httpx.HTTPTransport, limits=limits)
        self._calls = httpx.Client(transport=transport, limits=limits, **self._settings())

    def session(self) -> httpx.AsyncClient:
        """Connections for many requests at once, of the event loop that it is used in."""
        limits = httpx.Limits(
            max_connections=CONNECTIONS + 1,  # one to ask whether it is well
            max_keepalive_connections=CONNECTIONS,
            keepalive_expiry=KEPT_S,
        )
        transport = self._socket(httpx.AsyncHTTPTransport, limits=limits)
        return httpx.AsyncClient(transport=transport, limits=limits, **self._settings())

    def is_up(self) -> bool:
        """Whether it says that it is well."""
        return self.ails() is None

    def ails(self) -> str | None:
        """None where it says that it is well, else what it does."""
        try:
            found = self._calls.get("/health", timeout=PROBE_S)
        except httpx.TransportError:
            return "does not answer"
        return (
            None if found.is_success else f"answers {found.status_code} when asked for its health"
        )

    def wait(self, seconds: float, stop: Callable[[], bool]) -> None:
        """Until it is up.

        Raises:
            ServerDownError: not within this time, or it is ours and has ended.
        """
        deadline = time.monotonic() + seconds
        while (ails := self.ails()) is not None:
            if self.process is not None and not self.process.is_running:
                raise ServerDownError(self.process.why())
            if stop():
                raise ServerDownError("nobody waits for it any more")
            if time.monotonic() > deadline:
                said = self.process.why() if self.process else ails
                raise ServerDownError(f"{said}, after {seconds:.0f} s")
            time.sleep(POLL_S)
        if self.process is not None:
            self.process.is_starting = False

    def rpc(self, method: str, **kwargs: Any) -> list[Any]:
        """A method of every worker: their answers."""
        body = {"method": method, "kwargs": kwargs}
        return self.post("/collective_rpc", body).get("results", [])

    def post(
        self, path: str, body: Mapping[str, Any] | None = None, *, timeout_s: float | None = None
    ) -> dict[str, Any]:
        """A call's answer, within `request_s` or another time.

        Raises:
            ServerDownError: it cannot be reached, is breaking down or silent.
            EngineError: it refuses the call, in its words, or takes too long.
        """
        timeout: Any = httpx.USE_CLIENT_DEFAULT if timeout_s is None else timeout_s
        return self._called(lambda: self._calls.post(path, json=body, timeout=timeout), path)

    def get(self, path: str) -> dict[str, Any]:
        """As `post`."""
        return self._called(lambda: self._calls.get(path), path)

    def holds(self) -> str:
        """The label of its weights; `default` where it has those of its start."""
        return str(self.get("/weight_info")["weight_version"])

    async def is_well(self, session: httpx.AsyncClient) -> bool:
        """As `is_up`, for the event loop of the session."""
        try:
            return (await session.get("/health", timeout=PROBE_S)).is_success
        except httpx.TransportError:
            return False

    async def generate(self, session: httpx.AsyncClient, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a request for responses or scores.

        Raises:
            ServerDownError: it is gone, or its weights are others than it was given last.
            EngineError: it refuses the request, or takes too long although it is well.
            NonFiniteRolloutError: log-probs are not numbers.
        """
        try:
            answer = self._read(await session.post(GENERATE, json=body), GENERATE)
        except httpx.ConnectTimeout as error:
            raise ServerDownError("it cannot be reached") from error
        except httpx.TimeoutException as error:
            raise self._silent(is_well=await self.is_well(session)) from error
        except httpx.TransportError as error:
            raise ServerDownError(str(error) or type(error).__name__) from error
        for choice in answer["choices"]:
            if choice["finish_reason"] not in ("stop", "length"):
                raise ServerDownError(f"it ended a response by itself: {choice['finish_reason']}")
            labels = {span["version"] for span in choice["weight_versions"] or ()}
            if others := labels - {self.label}:
                raise ServerDownError(
                    f"it answers with the weights {min(others)}, and was given {self.label}"
                )
        return answer

    def close(self) -> None:
        """End it, if it is ours; safe to call twice."""
        self._calls.close()
        if self.process is not None:
            self.process.stop()
            self.process.remove()

    def _settings(self) -> dict[str, Any]:
        key = os.environ.get(KEY)
        return {
            "base_url": self.address,
            "timeout": httpx.Timeout(self._request_s, connect=CONNECT_S, pool=None),
            "headers": {"Authorization": f"Bearer {key}"} if key else {},
            "trust_env": False,  # a proxy is for the world outside
        }

    def _socket(self, transport: Any, **settings: Any) -> Any:
        return transport(uds=str(self.process.socket), **settings) if self.process else None

    def _called(self, call: Callable[[], httpx.Response], path: str) -> dict[str, Any]:
        try:
            return self._read(call(), path)
        except httpx.ConnectTimeout as error:
            raise ServerDownError("it cannot be reached") from error
        except httpx.TimeoutException as error:
            raise self._silent(is_well=self.is_up()) from error
        except httpx.TransportError as error:
            raise ServerDownError(str(error) or type(error).__name__) from error

    def _read(self, response: httpx.Response, path: str) -> dict[str, Any]:
        if response.is_success:
            return response.json() if response.content else {}
        said = " ".join(_message(response).split())[:LONGEST_MESSAGE]
        status = response.status_code
        if status in (401, 403) and "--enable-scale-out" not in said:
            raise EngineError(f"{self.name} wants another key: set {KEY} to that of the server")
        if status in (403, 404):
            raise EngineError(
                f"{self.name} has no {path} ({status}): it must be a vLLM of 0.32 or later that "
                f"was started as docs/engines.md says, with VLLM_SERVER_DEV_MODE=1"
            )
        if "Out of range float values" in said:  # of a score that is NaN, which JSON cannot say
            raise NonFiniteRolloutError("log-probs of a finished text are not numbers")
        if status >= 500 and not self.is_up():
            raise ServerDownError(f"it breaks down: {said}")
        raise EngineError(f"{self.name} refuses {path} ({status}): {said}")

    def _silent(self, *, is_well: bool) -> EngineError | ServerDownError:
        if not is_well:
            return ServerDownError(f"it gave no answer for {self._request_s:.0f} s and is not well")
        return EngineError(
            f"{self.name} gave no answer for {self._request_s:.0f} s: look at its log, or raise "
            "rollout.engine.request_s"
        )


def _message(response: httpx.Response) -> str:
    try:
        found = response.json()
    except ValueError:
        return response.text
    if isinstance(found, dict):
        inner = found.get("error", found.get("detail", found))
        return str(inner.get("message", inner) if isinstance(inner, dict) else inner)
    return str(found)
