"""HTTPS, and HTTP, for a WSGI application on the loopback: HTTP/1.1, kept alive, a thread for each
connection.

Not werkzeug's development server: that one shakes hands in the accepting thread, where one silent
client blocks all others, and closes the connection after each response.
"""

from __future__ import annotations

import contextlib
import http.server
import io
import re
import socket
import socketserver
import ssl
import struct
import sys
import tempfile
import threading
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast
from urllib.parse import unquote_to_bytes

from nitrosim.pki import TlsPki

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from typing import Self
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

BODY_MAX: Final = 64 << 20  # of a request: an object; those of KMS are far smaller
_PATIENCE: Final = 60.0  # seconds that a client may take for a handshake, or be idle
_CHUNK: Final = 1 << 14
_LINE_MAX: Final = 1 << 12

FAULTS: Final[Mapping[str, str]] = {
    "tls-other-ca": "a certificate from another CA",
    "tls-wrong-name": "a certificate for other names",
    "tls-expired": "a certificate that has expired",
    "tls-plain": "an answer in plain text where TLS is expected",
    "tls-old": "no TLS version above 1.1",
}
"""What may go wrong before HTTP begins; the client must not send its request."""


class HangUp(Exception):  # noqa: N818 - no error: the application's wish
    """Raised by a WSGI application: reset the connection (RST) in the place of a response."""


class Silence(Exception):  # noqa: N818 - no error: the application's wish
    """Raised by a WSGI application: do not answer, keep the connection until the client goes."""


class _UnreadableError(Exception):
    """A request whose body cannot be taken, with the status of the answer."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class HttpServer:
    """A WSGI application on 127.0.0.1 and a free port; a context manager that starts and stops it.

    Leaving the context ends every connection and waits for none.
    """

    def __init__(self, application: WSGIApplication, *, port: int = 0) -> None:
        self._start(_Server(("127.0.0.1", port), application))

    def _start(self, server: _Server) -> None:
        self._server = server
        self._thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)

    @property
    def port(self) -> int:
        """The TCP port, bound since construction."""
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def connections(self) -> int:
        """How many connections were opened so far."""
        return self._server.connections

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class HttpsServer(HttpServer):
    """The same behind TLS.

    `ca_pem` is the CA that a client must trust; with the fault "tls-other-ca" it is one that did
    not sign the server's certificate.
    """

    def __init__(
        self,
        application: WSGIApplication,
        *,
        region: str = "eu-west-1",
        fault: str | None = None,
        port: int = 0,
    ) -> None:
        if fault is not None and fault not in FAULTS:
            raise ValueError(f"{fault!r} is no TLS fault, expected one of {', '.join(FAULTS)}")
        pki = _pki(region, fault)
        self.ca_pem = _pki(region, None).ca_pem if fault == "tls-other-ca" else pki.ca_pem
        context = None if fault == "tls-plain" else _context(pki, old=fault == "tls-old")
        self._start(_TlsServer(("127.0.0.1", port), application, context))

    @property
    def url(self) -> str:
        """The endpoint, by a name that is in the certificate."""
        return f"https://localhost:{self.port}"


def _pki(region: str, fault: str | None) -> TlsPki:
    now = datetime.now(UTC)
    if fault == "tls-wrong-name":
        return TlsPki.generate(now=now, names=["kms.nitrosim.invalid"])
    suffix = "amazonaws.com.cn" if region.startswith("cn-") else "amazonaws.com"
    services = ("kms", "kms-fips", "s3", "*.s3", "secretsmanager", "ssm")
    hosts = [f"{service}.{region}.{suffix}" for service in services]
    return TlsPki.generate(
        now=now, names=[*hosts, "localhost"], ips=["127.0.0.1"], expired=fault == "tls-expired"
    )


def _context(pki: TlsPki, *, old: bool) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if old:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the point of this fault
            context.minimum_version = ssl.TLSVersion.TLSv1
            context.maximum_version = ssl.TLSVersion.TLSv1_1
        context.set_ciphers("ALL:@SECLEVEL=0")
    with tempfile.TemporaryDirectory() as folder:  # the ssl module loads a key from files only
        chain, key = Path(folder, "chain.pem"), Path(folder, "key.pem")
        chain.write_bytes(pki.chain_pem)
        key.write_bytes(pki.key_pem)
        context.load_cert_chain(chain, key)
    return context


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], application: WSGIApplication) -> None:
        self.application = application
        self._open: set[socket.socket] = set()
        self.connections = 0
        self._lock = threading.Lock()
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        """Bind, without HTTPServer's look-up of the host's name, which may ask the network."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "localhost", int(self.server_address[1])

    def finish_request(
        self, request: socket.socket | tuple[bytes, socket.socket], client_address: Any
    ) -> None:
        """Serve one connection, in its own thread."""
        if not isinstance(request, socket.socket):
            raise TypeError("not a stream socket")
        request.settimeout(_PATIENCE)
        self.serve(request, client_address)

    def serve(self, connection: socket.socket, client_address: Any) -> None:
        """Serve what is said on a connection."""
        with self._tracked(connection):
            super().finish_request(connection, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that go away or do not like the certificate."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    def server_close(self) -> None:
        """Stop listening, and end every connection."""
        super().server_close()
        with self._lock:
            for connection in self._open:
                # SSLSocket's own shutdown would fall back to plain text under the thread that uses
                # it
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(connection, socket.SHUT_RDWR)

    @contextlib.contextmanager
    def _tracked(self, connection: socket.socket) -> Iterator[None]:
        with self._lock:
            self._open.add(connection)
            self.connections += 1
        try:
            yield
        finally:
            with self._lock:
                self._open.discard(connection)


class _TlsServer(_Server):
    """Shakes hands first; without a context it says in plain text that it cannot."""

    def __init__(
        self, address: tuple[str, int], application: WSGIApplication, context: ssl.SSLContext | None
    ) -> None:
        self._context = context
        super().__init__(address, application)

    def serve(self, connection: socket.socket, client_address: Any) -> None:
        """The same within TLS."""
        if self._context is None:
            _speak_plainly(connection)
            return
        with (
            self._context.wrap_socket(
                connection, server_side=True, do_handshake_on_connect=False
            ) as inner,
            self._tracked(inner),
        ):
            inner.do_handshake()
            socketserver.BaseServer.finish_request(self, inner, client_address)


def _speak_plainly(connection: socket.socket) -> None:
    """Answer a ClientHello in plain HTTP, and let the client read it: an early close would reset
    the connection.
    """
    connection.recv(_CHUNK)
    connection.sendall(
        b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    )
    connection.shutdown(socket.SHUT_WR)
    _drain(connection)


def _drain(connection: socket.socket) -> None:
    """Read until the client goes."""
    with contextlib.suppress(OSError):
        while connection.recv(_CHUNK):
            pass


class _Handler(http.server.BaseHTTPRequestHandler):
    """HTTP/1.1 on one side, WSGI (PEP 3333) on the other."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def do_POST(self) -> None:
        """Hand the request to the application; every method is its business."""
        body = self._read_body()
        if body is None:
            return
        try:
            self._respond(body)
        except HangUp:
            # with no time to linger, close discards what is queued and resets the connection
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
        except Silence:
            self.connection.settimeout(None)
            _drain(self.connection)
            self.close_connection = True

    def do_GET(self) -> None:
        """As POST."""
        self.do_POST()

    def do_HEAD(self) -> None:
        """As POST."""
        self.do_POST()

    def do_PUT(self) -> None:
        """As POST."""
        self.do_POST()

    def do_DELETE(self) -> None:
        """As POST."""
        self.do_POST()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it so
        """Log nothing: the output belongs to the command that is run beside this."""

    def _read_body(self) -> bytes | None:
        """The body of a request; None for one that was refused, with its connection."""
        try:
            return self._read_whole()
        except _UnreadableError as error:
            self.send_error(error.status)
            self.close_connection = True
            return None

    def _read_whole(self) -> bytes:
        length = self.headers.get("Content-Length", "0")
        if self.command == "PUT" and self.headers.get("Transfer-Encoding") == "chunked":
            return self._read_chunks()
        if "Transfer-Encoding" in self.headers or not length.isascii() or not length.isdigit():
            raise _UnreadableError(411)
        if int(length) > BODY_MAX:
            raise _UnreadableError(413)
        return self.rfile.read(int(length))

    def _read_chunks(self) -> bytes:
        """A body of unknown length, RFC 9112, clause 7.1: how SDKs upload objects."""
        body = bytearray()
        while size := self._chunk_size():
            if size > BODY_MAX - len(body):
                raise _UnreadableError(413)
            body += self.rfile.read(size)
            if self.rfile.readline(_LINE_MAX) != b"\r\n":
                raise _UnreadableError(400)
        while self.rfile.readline(_LINE_MAX).strip():
            pass  # trailers, of which no client of ours makes use
        return bytes(body)

    def _chunk_size(self) -> int:
        digits = self.rfile.readline(_LINE_MAX).partition(b";")[0].strip()
        if not re.fullmatch(rb"[0-9A-Fa-f]{1,16}", digits):
            raise _UnreadableError(400)
        return int(digits, 16)

    def _respond(self, body: bytes) -> None:
        started: list[tuple[str, list[tuple[str, str]]]] = []

        def start_response(
            status: str, headers: list[tuple[str, str]], *_: object
        ) -> Callable[[bytes], object]:
            started.append((status, headers))
            return self.wfile.write

        chunks = self.server.application(self._environ(body), cast("StartResponse", start_response))
        try:
            status, headers = started[-1]
            self._write(status, dict(headers), chunks)
        finally:
            close = getattr(chunks, "close", None)
            if close:
                close()

    def _write(self, status: str, headers: dict[str, str], chunks: Iterable[bytes]) -> None:
        """Send a response; one without Content-Length ends with the connection, and so does one
        that is cut short.
        """
        left = int(headers["Content-Length"]) if "Content-Length" in headers else None
        if left is None:
            self.close_connection = True
            headers["Connection"] = "close"
        code, _, reason = status.partition(" ")
        self.send_response_only(int(code), reason)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        for chunk in chunks:
            self.wfile.write(chunk)
            left = None if left is None else left - len(chunk)
        if left and self.command != "HEAD":
            self.close_connection = True

    def _environ(self, body: bytes) -> WSGIEnvironment:
        path, _, query = self.path.partition("?")
        headers = {
            f"HTTP_{name.upper().replace('-', '_')}": value for name, value in self.headers.items()
        }
        return headers | {
            "REQUEST_METHOD": self.command,
            "SCRIPT_NAME": "",
            "PATH_INFO": unquote_to_bytes(path).decode("latin-1"),
            "QUERY_STRING": query,
            "CONTENT_TYPE": self.headers.get("Content-Type", ""),
            "CONTENT_LENGTH": str(len(body)),
            "SERVER_NAME": self.server.server_name,
            "SERVER_PORT": str(self.server.server_port),
            "SERVER_PROTOCOL": self.request_version,
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": "https",
            "wsgi.input": io.BytesIO(body),
            "wsgi.input_terminated": True,  # whatever Transfer-Encoding it came with
            "wsgi.errors": sys.stderr,
            "wsgi.multithread": True,
            "wsgi.multiprocess": False,
            "wsgi.run_once": False,
        }
