"""A connection to an OpenAI-compatible server, and what its refusals mean to a user."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from typing import Any, TypeVar

from powerflow_lit.mendable import MendableError

Item = TypeVar("Item")
Result = TypeVar("Result")

PROBE_TIMEOUT_S = 10.0  # a server that is up lists its models at once


class JudgeError(MendableError, RuntimeError):
    """A judge or an embedder cannot work; one line that names what to mend."""


class RefusedError(JudgeError):
    """The server will not answer this one request (too long, say); others may pass."""


class _Stopped(Exception):  # noqa: N818
    """An item that was not begun because another one failed."""


class Endpoint:
    """One model of one OpenAI-compatible server: a hosted one, or a local `vllm serve`.

    The key is read from the environment and stays in memory. Busy servers (429), failing ones
    (5xx) and lost connections are asked again with growing pauses, as `Retry-After` says.

    Args:
        base_url: address with its version, `http://127.0.0.1:8000/v1`.
        model: name under which the server lists the model.
        api_key_env: environment variable that holds the key; None for a server without keys.
        timeout_s: seconds that one request may take.
        max_retries: further attempts after the first.
        concurrency: requests in flight at once.
        probe: ask the server now whether it is up and has the model.

    Raises:
        JudgeError: `openai` is not installed, the variable is not set, the server does not
            answer, refuses the key or has no such model.
    """

    def __init__(
        self,
        *,
        base_url: str,
        model: str,
        api_key_env: str | None,
        timeout_s: float,
        max_retries: int,
        concurrency: int,
        probe: bool,
    ) -> None:
        try:
            import openai
        except ImportError as error:
            raise JudgeError(
                "a judge or embedder behind a server needs the package openai: "
                "pip install 'powerflow-lit[judge]'"
            ) from error
        if concurrency < 1:
            raise JudgeError(f"concurrency={concurrency}: must be 1 or more")
        self.base_url, self.model, self.concurrency = base_url, model, concurrency
        self._openai: Any = openai
        self._key_env, self._key = api_key_env, _key(api_key_env)
        self.client: Any = openai.OpenAI(
            base_url=base_url,
            api_key=self._key or "none",  # never the library's own default variable
            timeout=timeout_s,
            max_retries=max_retries,
        )
        if probe:
            self._probe()

    def _probe(self) -> None:
        try:
            client = self.client.with_options(timeout=PROBE_TIMEOUT_S, max_retries=1)
            with self.errors():
                names = [model.id for model in client.models.list().data]
        except RefusedError:
            return  # some servers list nothing: the first question will tell
        if self.model not in names:
            has = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
            raise JudgeError(
                f"{self.base_url} has no model {self.model!r}; it has: {has or 'none'}"
            )

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turns the client's errors into one line each.

        Raises:
            RefusedError: the server will not take this request (400, 404, 413, 422).
            JudgeError: no connection, no permission, or still failing after the last retry.
        """
        openai = self._openai
        try:
            yield
        except openai.APITimeoutError as error:
            raise JudgeError(f"{self.base_url} took too long to answer: raise timeout_s") from error
        except openai.APIConnectionError as error:
            reason = self._line(error.__cause__ or error)
            raise JudgeError(
                f"no server answers at {self.base_url} ({reason}): start one "
                "(`vllm serve <model>`) or mend base_url"
            ) from error
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            remedy = (
                f"mend the key in {self._key_env}"
                if self._key_env
                else "name the variable that holds your key, api_key_env=OPENAI_API_KEY"
            )
            raise JudgeError(f"{self.base_url} refuses access: {remedy}") from error
        except openai.APIStatusError as error:
            said = f"{self.base_url} answers {error.status_code}: {self._line(error)}"
            if error.status_code in (400, 404, 413, 422):
                raise RefusedError(said) from error
            raise JudgeError(f"{said} (after all retries; what was answered is kept)") from error
        except openai.APIError as error:
            raise JudgeError(f"{self.base_url}: {self._line(error)}") from error

    def _line(self, error: BaseException) -> str:
        """The first line of an error's text, without the key."""
        body = getattr(error, "body", None)
        said = body.get("message") if isinstance(body, dict) else None
        line = (str(said or error).strip().splitlines() or [type(error).__name__])[0][:200]
        return line.replace(self._key, "***") if self._key else line

    def map(
        self,
        function: Callable[[Item], Result],
        items: Sequence[Item],
        on_done: Callable[[int], None],
    ) -> list[Result]:
        """`function` of each item, `concurrency` at once, in order; `on_done` hears the count.

        The first error, or Ctrl-C, drops the items that have not started.
        """
        if not items:
            return []
        stop = threading.Event()

        def call(item: Item) -> Result:
            if stop.is_set():
                raise _Stopped
            try:
                return function(item)
            except BaseException:
                stop.set()  # before this thread takes the next item
                raise

        pool = ThreadPoolExecutor(self.concurrency)
        try:
            futures = [pool.submit(call, item) for item in items]
            for done, future in enumerate(as_completed(futures), start=1):
                if not isinstance(future.exception(), _Stopped):  # the error itself is to come
                    future.result()
                on_done(done)
            return [future.result() for future in futures]
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """Lets the connections go; safe to call twice."""
        self.client.close()


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise JudgeError(
            f"api_key_env={variable}: there is no such environment variable; export it, or set "
            "api_key_env=null for a server without keys"
        )
    return key
