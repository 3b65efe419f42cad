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
from typing import Any

from huggingface_hub import constants, set_client_factory
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import httpx
from huggingface_hub.utils._http import default_client_factory

_BUSY = frozenset({408, 429, 500, 502, 503, 504})  # answers of a hub that may answer otherwise later
_PAUSE_S = 0.5


class HubUnreachable(OfflineModeIsEnabled):
    """A host gave no answer. Libraries go to their caches then, as in offline mode, and do not retry."""


@contextmanager
def bounded(timeout_s: float) -> Iterator[None]:
    """Within the block no request to the hub waits longer than `timeout_s` for its answer, retries included."""
    silent: dict[str, str] = {}
    set_client_factory(lambda: bounded_client(timeout_s, silent))
    try:
        yield
    finally:
        set_client_factory(default_client_factory)


def bounded_client(timeout_s: float, silent: dict[str, str]) -> Any:
    """A client of huggingface_hub whose `send` ends in time.

    Args:
        silent: host -> why it gave no answer; such hosts are not asked again.
    """
    client = default_client_factory()
    send = client.send

    def send_in_time(request: Any, **options: Any) -> Any:
        host = request.url.host
        if host not in silent:
            limit = _limit_of(request, timeout_s)
            request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), limit)
            try:
                return _answer(lambda: send(request, **options), limit)
            except httpx.TransportError as error:
                silent[host] = f"{request.url.scheme}://{request.url.netloc.decode()} {_reason(error, limit)}"
        raise HubUnreachable(silent[host])

    client.send = send_in_time
    return client


def unreachable(error: BaseException) -> str | None:
    """Why the hub gave no answer, if this is behind `error`, which a library raised; None for any other error."""
    seen: set[int] = set()
    while id(error) not in seen:
        if isinstance(error, HubUnreachable):
            return str(error)
        seen.add(id(error))
        error = error.__cause__ or error.__context__ or error
    return None


def _answer(send: Callable[[], Any], limit_s: float) -> Any:
    """The hub's answer; a busy hub, and one that has just closed the connection, are asked again in this time.

    Raises:
        TransportError: there was none in time.
    """
    end = time.monotonic() + limit_s
    while True:
        response = _in_time(send, end - time.monotonic())
        if response.status_code not in _BUSY:
            return response
        if time.monotonic() + _PAUSE_S >= end:
            response.close()
            raise httpx.ReadError(f"answers {response.status_code} {response.reason_phrase}".strip())
        response.close()
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
    return text if text.startswith("answers") else f"cannot be reached ({text or type(error).__name__})"
