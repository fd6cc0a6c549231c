"""A TCP proxy in front of a server: a test can cut, slow or silence it, or have it speak TLS, as our Valkey cannot."""

from __future__ import annotations

import contextlib
import queue
import socket
import ssl
import threading
import time

HOST = "127.0.0.1"


class Proxy:
    """Listens on a port of its own and passes everything on, until it is told otherwise.

    Args:
        target: port of the server; another one is for new connections only.
        tls: what it speaks to clients; None: plain TCP.
    """

    def __init__(self, target: int, tls: ssl.SSLContext | None = None) -> None:
        self.target = target
        self._tls = tls
        self._sockets: set[socket.socket] = set()
        self.delay_s = 0.0  # before every answer
        self._open = threading.Event()  # bytes flow
        self._open.set()
        self._refuse = False
        self._listener = socket.create_server((HOST, 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"redis://{HOST}:{self.port}"

    def cut(self) -> None:
        """Close every connection, and every new one at once."""
        self._refuse = True
        for one in list(self._sockets):
            _close(one)

    def silence(self) -> None:
        """Connections stay, bytes vanish: a network that drops packets."""
        self._open.clear()

    def heal(self) -> None:
        self._refuse, self.delay_s = False, 0.0
        for one in list(self._sockets) if not self._open.is_set() else ():
            _close(one)  # what was dropped is lost for these
        self._open.set()

    def close(self) -> None:
        _close(self._listener)
        self.cut()
        self._open.set()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        self._sockets.add(client)
        try:
            if self._refuse:
                return
            if self._tls is not None:
                # A TLS socket must not be read and written by two threads at once: only its raw bytes are, here.
                _serve_tls(client, self._tls, self.target)
                return
            server = socket.create_connection((HOST, self.target))
            self._sockets.add(server)
            back = threading.Thread(target=self._pump, args=(server, client, True), daemon=True)
            back.start()
            self._pump(client, server, False)
            back.join()
            self._sockets.discard(server)
        except OSError:
            pass
        finally:
            self._sockets.discard(client)
            _close(client)

    def _pump(self, source: socket.socket, sink: socket.socket, answers: bool) -> None:
        late: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
        writer = threading.Thread(target=self._write, args=(late, sink), daemon=True)
        writer.start()
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                late.put((time.monotonic() + (self.delay_s if answers else 0.0), data))
        late.put((0.0, b""))
        writer.join()
        _close(source)
        _close(sink)

    def _write(self, late: queue.SimpleQueue[tuple[float, bytes]], sink: socket.socket) -> None:
        """Latency, not throughput: what came together goes on together."""
        with contextlib.suppress(OSError):
            while True:
                due_s, data = late.get()
                if not data:
                    return
                time.sleep(max(0.0, due_s - time.monotonic()))
                if self._open.is_set():
                    sink.sendall(data)


def _serve_tls(client: socket.socket, context: ssl.SSLContext, target: int) -> None:
    """One connection, in one thread: alternately what the client has and what the server has."""
    with context.wrap_socket(client, server_side=True) as secure, socket.create_connection((HOST, target)) as server:
        secure.settimeout(0.01)
        server.settimeout(0.01)
        while True:
            for source, sink in ((secure, server), (server, secure)):
                with contextlib.suppress(TimeoutError):
                    data = source.recv(65536)
                    if not data:
                        return
                    sink.settimeout(5)
                    sink.sendall(data)
                    sink.settimeout(0.01)


def _close(one: socket.socket) -> None:
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    one.close()
