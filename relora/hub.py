"""The Hugging Face hub answers within a time that is given, or it is out of reach: every library's requests to it.

Their requests go through one client of huggingface_hub, which retries for about a minute, and waits for ever while it
looks up a name. `bounded` replaces this client by one that waits `timeout_s` in all for an answer and retries within
this time alone. A host that did not answer is not asked again: what is needed then comes from the cache, or is an
error with the reason.
"""

import contextvars
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import constants, get_session, set_client_factory
from huggingface_hub.errors import FileMetadataError, OfflineModeIsEnabled
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # of either major version
from huggingface_hub.utils._http import default_client_factory

_BUSY = frozenset({408, 429, 500, 502, 503, 504})  # answers of a hub that may answer otherwise later
_PAUSE_S = 0.5


class _Busy(httpx.NetworkError):
    """The host answers that it cannot answer now."""


class HubUnreachable(OfflineModeIsEnabled):
    """A host gave no answer. Libraries go to their caches then, as in offline mode, and do not retry."""


@contextmanager
def bounded(timeout_s: float) -> Iterator[None]:
    """Within the block no request to the hub waits longer than `timeout_s` for its answer, retries included."""
    hosts = Hosts()
    set_client_factory(lambda: bounded_client(timeout_s, hosts))
    try:
        yield
    finally:
        set_client_factory(default_client_factory)


@dataclass(frozen=True)
class Hosts:
    """What is known of hosts by their names: which have answered once, and which gave no answer, with the reason."""

    answered: set[str] = field(default_factory=set)
    silent: dict[str, str] = field(default_factory=dict)


def bounded_client(timeout_s: float, hosts: Hosts) -> Any:
    """A client of huggingface_hub whose `send` ends in time, and asks no host in vain a second time."""
    client: Any = default_client_factory()
    send = client.send

    def send_in_time(request: Any, **options: Any) -> Any:
        host = request.url.host
        if host not in hosts.silent:
            limit = _limit_of(request, timeout_s)
            request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), limit)
            try:
                response = _answer(lambda: send(request, **options), limit, may_fail=host in hosts.answered)
            except httpx.TransportError as error:
                hosts.silent[host] = f"{request.url.scheme}://{request.url.netloc.decode()} {_reason(error, limit)}"
            else:
                hosts.answered.add(host)
                return response
        raise HubUnreachable(hosts.silent[host])

    client.send, client.hosts = send_in_time, hosts
    return client


def unreachable(error: BaseException) -> str | None:
    """Why no hub answered, where this is behind `error`, which a library raised; None for any other error."""
    seen: dict[int, BaseException] = {}
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen[id(cause)] = cause
        cause = cause.__cause__ or cause.__context__
    for cause in seen.values():
        if isinstance(cause, HubUnreachable | FileMetadataError):
            return str(cause)
        if isinstance(cause, httpx.HTTPStatusError) and not cause.response.headers.get("X-Error-Code"):
            answer = f"{cause.response.status_code} {cause.response.reason_phrase}".strip()
            return f"{cause.request.url} answers {answer}, and not as a hub does: a proxy, or another HF_ENDPOINT?"
    hosts = getattr(get_session(), "hosts", None)
    if isinstance(error, ConnectionError) and hosts is not None and hosts.silent:
        return str(next(iter(hosts.silent.values())))  # datasets drops the cause of its error
    return None


def _answer(send: Callable[[], Any], limit_s: float, *, may_fail: bool) -> Any:
    """The answer to a request, which is repeated in this time while the host is busy.

    Args:
        may_fail: repeat it after a failure of the network too.

    Raises:
        TransportError: there was no answer in time.
    """
    end = time.monotonic() + limit_s
    while True:
        failure: Exception
        try:
            response = _in_time(send, end - time.monotonic())
        except (httpx.NetworkError, httpx.RemoteProtocolError) as error:
            failure = error
        else:
            if response.status_code not in _BUSY:
                return response
            response.close()
            failure = _Busy(f"answers {response.status_code} {response.reason_phrase}".strip())
        if not (may_fail or isinstance(failure, _Busy)) or time.monotonic() + _PAUSE_S >= end:
            raise failure
        time.sleep(_PAUSE_S)


def _in_time(send: Callable[[], Any], limit_s: float) -> Any:
    """The result of `send`, called in a thread: looking up a host's name has no time-out of its own.

    Raises:
        ReadTimeout: it takes longer than `limit_s`; the thread is left to itself.
    """
    outcome: list[Any] = []

    def call() -> None:
        try:
            outcome.append((send(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=contextvars.copy_context().run, args=(call,), daemon=True)
    thread.start()
    thread.join(max(0.0, limit_s))
    if not outcome:
        raise httpx.ReadTimeout("no answer")
    response, error = outcome[0]
    if error is not None:
        raise error
    return response


def _limit_of(request: Any, timeout_s: float) -> float:
    """`timeout_s`, or less for a request that asks for less than usual: it can do without an answer."""
    own = (request.extensions.get("timeout") or {}).get("read")
    return min(own, timeout_s) if own is not None and own < constants.DEFAULT_REQUEST_TIMEOUT else timeout_s


def _reason(error: Exception, limit_s: float) -> str:
    """Why there was no answer, in words that go on after the host's name."""
    if isinstance(error, httpx.TimeoutException):
        return f"gave no answer within {limit_s:g} s (hub_timeout_s)"
    if isinstance(error, httpx.ProxyError):
        return f"cannot be reached: the proxy answers {error}"
    text = " ".join(str(error).split())
    return text if isinstance(error, _Busy) else f"cannot be reached ({text or type(error).__name__})"
