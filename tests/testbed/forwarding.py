"""A TCP port that is another one: what a Service's address is in a cluster."""

from __future__ import annotations

import contextlib
import socket
import threading

_CHUNK = 2**16


class Forwarder:
    """Listens on one address and connects each client to another, until `stop`."""

    def __init__(self, listen: tuple[str, int], target: tuple[str, int]) -> None:
        self._target = target
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._listener = socket.create_server(listen, backlog=128)
        self._thread = threading.Thread(target=self._accept, daemon=True, name=f"forwarder {listen[0]}:{listen[1]}")
        self._thread.start()

    def stop(self) -> None:
        """Stop listening and break the connections."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes `accept`, which `close` alone does not
        self._listener.close()
        self._thread.join()
        with self._lock:
            left = list(self._open)
        for one in left:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # stopped
                return
            try:
                server = socket.create_connection(self._target, timeout=10)
                server.settimeout(None)
            except OSError:
                client.close()
                continue
            with self._lock:
                self._open |= {client, server}
            done = threading.Barrier(2, action=lambda pair=(client, server): self._close(*pair))
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=_copy, args=(source, sink, done), daemon=True).start()

    def _close(self, *sockets: socket.socket) -> None:
        with self._lock:
            self._open.difference_update(sockets)
        for one in sockets:
            one.close()


def _copy(source: socket.socket, sink: socket.socket, done: threading.Barrier) -> None:
    """Pass on what one end says until it has said all, and tell the other end so."""
    with contextlib.suppress(OSError):  # one end broke off: the other one learns it from the shutdown
        while data := source.recv(_CHUNK):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)
    done.wait()
