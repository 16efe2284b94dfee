"""Requests to one HTTP server of a model: bounded connections, retries, a deadline, a fate for each failure.

Covered: 429 (its Retry-After is waited for), 5xx, lost connections and replies that can't be read are tried
again a bounded number of times, with exponential back-off and jitter, and are then the world's fault
(EngineError); any other refusal is the caller's (Refused, a UserError). Both say what the server said. The
API key comes from an environment variable, and no message contains it.
Not covered: streaming, several servers, more than one event loop.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx

from agentrl.engines.in_flight import InFlight
from agentrl.errors import BadConfig, EngineError, UserError

T = TypeVar("T")

__all__ = ["BadReply", "Refused", "Server", "ServerSettings"]

_SPARE_CONNECTIONS = 4  # for what may not wait behind queued requests
_LONGEST_BACKOFF_S = 30.0
_LONGEST_SAID = 500  # characters of a server's message that are repeated


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Where a server is and how it is treated."""

    url: str  # of the API, its version included: http://127.0.0.1:8000/v1
    api_key_env: str | None  # environment variable that holds the key; None: it needs none
    max_connections: int  # requests at once; others wait
    deadline_s: float  # seconds of a request, its retries included, from when a connection is free for it
    retries: int  # of a request, after its first attempt
    backoff_s: float  # seconds, the most that the first retry waits; doubles from retry to retry

    def __post_init__(self) -> None:
        try:
            url = httpx.URL(self.url)
        except httpx.InvalidURL as error:
            raise BadConfig(f"the server's url {self.url!r} is none: {error}") from error
        if url.userinfo:
            raise BadConfig(
                "the server's url holds a user name or a password, which messages would repeat; name an "
                "environment variable that holds an API key instead"
            )
        if url.scheme not in ("http", "https") or not url.host:
            raise BadConfig(
                f"the server's url is {self.url!r}; it must be like http://127.0.0.1:8000/v1, the version "
                "of the API included"
            )


class BadReply(Exception):
    """A reply that came with success and says nothing usable; raised by what reads it, and tried again."""


class Refused(UserError):
    """The server refused a request for what it asks: trying again is of no use."""

    def __init__(self, refusal: str, *, status: int) -> None:
        super().__init__(f"{refusal}. Correct what it names, or start the server with other settings")
        self.refusal, self.status = refusal, status


class _Failure(Exception):
    """An attempt that may be made again, not before ``after_s`` seconds."""

    def __init__(self, said: str, *, after_s: float = 0.0) -> None:
        super().__init__(said)
        self.after_s = after_s


@dataclass(frozen=True, slots=True)
class _Request:
    path: str  # below the url
    body: Mapping[str, Any]
    settled: Callable[[int, str], bool]  # (status, what was said): whether that refusal is as good as success


class Server:
    """One server, for one event loop."""

    def __init__(self, settings: ServerSettings, *, jitter: random.Random) -> None:
        """``jitter`` spreads the retries. Raises BadConfig where the API key is missing."""
        self._settings, self._jitter = settings, jitter
        self._key = read_key(settings.api_key_env)
        most = settings.max_connections + _SPARE_CONNECTIONS
        self._client = httpx.AsyncClient(
            base_url=settings.url,
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            limits=httpx.Limits(max_connections=most, max_keepalive_connections=most),
            timeout=None,  # the deadline is over all of a request, where httpx's are over its parts
        )
        self._free = asyncio.Semaphore(settings.max_connections)
        self._in_flight = InFlight()
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def url(self) -> str:
        """Where it is."""
        return self._settings.url

    async def post(
        self,
        path: str,
        body: Mapping[str, Any],
        *,
        read: Callable[[httpx.Response], T],
        settled: Callable[[int, str], bool] = lambda status, said: False,
        urgent: bool = False,
    ) -> T:
        """What ``read`` makes of the reply to ``body``; where it raises BadReply, the request is made again.

        A refusal of which ``settled(status, what was said)`` is true is read as success is. ``urgent`` ones
        do not wait for a free connection. Raises EngineError, also where :meth:`abort` ends it, and Refused.
        """
        self._attend()
        work = self._perform(_Request(path, body, settled), read, urgent=urgent)
        aborted = f"the engine was closed while {self.url} worked on a request"
        return await self._in_flight.track(work, aborted=aborted)

    async def abort(self) -> None:
        """Give up what is in flight; whoever waits for it gets EngineError."""
        await self._in_flight.abort()

    async def close(self) -> None:
        """Give up what is in flight, and close the connections; idempotent."""
        await self.abort()
        await self._client.aclose()

    def _attend(self) -> None:
        if self._client.is_closed:
            raise EngineError(f"the connection to {self.url} is closed; make a new engine")
        loop = asyncio.get_running_loop()
        if self._loop not in (None, loop):
            raise RuntimeError("another event loop is using this engine: make one engine for each loop")
        self._loop = loop

    async def _perform(self, request: _Request, read: Callable[[httpx.Response], T], *, urgent: bool) -> T:
        if urgent:
            return await self._attempts(request, read)
        async with self._free:
            return await self._attempts(request, read)

    async def _attempts(self, request: _Request, read: Callable[[httpx.Response], T]) -> T:
        """Attempts until one succeeds, they are used up, or the deadline is over."""
        until = asyncio.get_running_loop().time() + self._settings.deadline_s
        failure = _Failure("it did not answer")
        try:
            async with asyncio.timeout_at(until):
                for number in range(self._settings.retries + 1):
                    if number:
                        await self._back_off(number, failure, until=until)
                    try:
                        return await self._attempt(request, read)
                    except _Failure as new:
                        failure = new
        except TimeoutError:
            raise EngineError(
                f"{self.url}/{request.path} took over {self._settings.deadline_s:g} s, the deadline of a "
                f"request and its retries; at last: {failure}"
            ) from failure
        attempts = f"{self._settings.retries + 1} attempts"
        raise EngineError(f"{self.url}/{request.path} failed in {attempts}; at last: {failure}") from failure

    async def _back_off(self, number: int, failure: _Failure, *, until: float) -> None:
        """Wait before retry ``number``. Raises EngineError at once where the deadline would end the wait."""
        most = min(self._settings.backoff_s * 2 ** (number - 1), _LONGEST_BACKOFF_S)
        # Jitter over the whole range: requests that failed together must not come back together.
        wait_s = failure.after_s + self._jitter.uniform(0, most)
        if asyncio.get_running_loop().time() + wait_s > until:
            raise EngineError(
                f"{self.url} can't be asked again before the request's deadline of "
                f"{self._settings.deadline_s:g} s: {failure}"
            ) from failure
        await asyncio.sleep(wait_s)

    async def _attempt(self, request: _Request, read: Callable[[httpx.Response], T]) -> T:
        try:
            response = await self._client.post(request.path, json=dict(request.body))
        except httpx.RequestError as error:
            raise _Failure(self.hide(f"{type(error).__name__}: {error}")) from error
        said = "" if response.is_success else self._said(response)
        if response.is_success or request.settled(response.status_code, said):
            try:
                return read(response)
            except BadReply as error:
                raise _Failure(self.hide(f"its reply can't be used: {error}")) from error
        status = response.status_code
        if status == httpx.codes.TOO_MANY_REQUESTS or status >= httpx.codes.INTERNAL_SERVER_ERROR:
            after_s = _retry_after_s(response.headers.get("retry-after", ""))
            wait = f" (Retry-After: {after_s:g} s)" if after_s else ""
            raise _Failure(f"status {status}{wait}: {said}", after_s=after_s)
        raise Refused(f"{self.url}/{request.path} refused with status {status}: {said}", status=status)

    def _said(self, response: httpx.Response) -> str:
        """The message of a refusal, in one of the forms in which servers wrap it."""
        try:
            found: Any = response.json()
        except ValueError:
            found = response.text
        for key in ("error", "message", "detail"):
            if isinstance(found, dict) and key in found:
                found = found[key]
        text = self.hide(" ".join(str(found).split()))
        return text[:_LONGEST_SAID] if text else "it gave no reason"

    def hide(self, text: str) -> str:
        """``text`` without the API key; for whole texts, as part of a key can't be told."""
        return text.replace(self._key, "***") if self._key else text


def read_key(name: str | None) -> str:
    """The API key in the environment variable ``name``; "" for None. Raises BadConfig."""
    if name is None:
        return ""
    key = os.environ.get(name, "").strip()
    if not key:
        raise BadConfig(
            f"the environment variable {name}, which should hold the server's API key, is not set"
        )
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise BadConfig(
            f"the environment variable {name} holds no API key: it must be one line of ASCII without spaces"
        )
    return key


def _retry_after_s(value: str) -> float:
    """Seconds that a Retry-After asks for (RFC 9110, 10.2.3: a number or a date); 0 where it says nothing."""
    try:
        seconds = float(value)
    except ValueError:
        try:
            when = parsedate_to_datetime(value)
        except ValueError:
            return 0.0
        when = when if when.tzinfo else when.replace(tzinfo=UTC)
        seconds = (when - datetime.now(UTC)).total_seconds()
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0
