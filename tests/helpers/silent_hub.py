"""A proxy on this machine that stands for a network without a hub: it never answers, refuses, or answers otherwise."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class SilentHub:
    """Answers every request as `mode` says: "hang", "trickle", "close", or the number of an HTTP status.

    Attributes:
        asked: number of connections so far.
    """

    def __init__(self) -> None:
        self.mode = "hang"
        self.asked = 0
        self._server = socket.create_server(("127.0.0.1", 0))
        self._held: list[socket.socket] = []
        threading.Thread(target=self._serve, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.getsockname()[1]}"

    def close(self) -> None:
        for connection in (self._server, *self._held):
            connection.close()

    def _serve(self) -> None:
        with suppress(OSError):  # closed
            while True:
                connection, _ = self._server.accept()
                self._held.append(connection)
                self.asked += 1
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with suppress(OSError):
            request = b""
            while self.mode != "close" and not request.endswith(b"\r\n\r\n"):
                part = connection.recv(65536)
                if not part:
                    return
                request += part
            while self.mode == "trickle":
                connection.sendall(b"HTTP/1.1 200 OK\r\n" if request else b"x: y\r\n")
                request = b""
                time.sleep(0.05)
            if self.mode.isdigit():
                connection.sendall(
                    f"HTTP/1.1 {self.mode} Word\r\nContent-Length: 0\r\nRetry-After: 99\r\n\r\n".encode()
                )
            if self.mode != "hang":
                connection.close()


@contextmanager
def silent_hub() -> Iterator[SilentHub]:
    hub = SilentHub()
    try:
        yield hub
    finally:
        hub.close()
