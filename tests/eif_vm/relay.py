#!/usr/bin/python3 -IS
"""In the enclave under test: lead the socket that nitrosim's shim dials to the parent's vsock port.

    relay SOCKET CID PORT

One request is one message of the socket; over vsock each has its length before it.
"""

from __future__ import annotations

import socket
import sys
import threading

_ROOM = 1 << 16  # bytes; the driver takes 4096


def _serve(client: socket.socket, parent: tuple[int, int]) -> None:
    with client:
        while request := client.recv(_ROOM):
            with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as module:
                module.connect(parent)
                module.sendall(len(request).to_bytes(4) + request)
                with module.makefile("rb") as source:
                    client.send(source.read(int.from_bytes(source.read(4))))


def main(path: str, cid: str, port: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen()
        while True:
            client, _ = listener.accept()
            threading.Thread(target=_serve, args=(client, (int(cid), int(port)))).start()


if __name__ == "__main__":
    main(*sys.argv[1:])
