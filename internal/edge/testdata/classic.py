"""What the classic Python client does, with paramiko and nothing of ours.

It reads one JSON object from stdin: api, ca, email, password, ssh_host, ssh_port, host_key, key (rsa or ecdsa), signkey (socket or
tunnel), bind. It writes what it sees to stdout, a line each, and ends when the edge closes its session.
"""

import json
import logging
import os
import socket
import ssl
import sys
import tempfile
import threading
import urllib.request

import paramiko

logging.getLogger("paramiko").addHandler(logging.NullHandler())
given = json.load(sys.stdin)


def say(what, value=""):
    print(what, value, flush=True)


def api(method, path, body, token=None):
    request = urllib.request.Request(given["api"] + path, data=json.dumps(body).encode(), method=method)
    request.add_header("Content-Type", "application/json")
    request.add_header("x-client-requested-with", "mysocketctl")
    request.add_header("x-client-version", "1.0")
    if token:
        request.add_header("x-access-token", token)
    with urllib.request.urlopen(request, context=ssl.create_default_context(cafile=given["ca"]), timeout=30) as answer:
        return json.loads(answer.read() or b"null")


token = api("POST", "/login", {"email": given["email"], "password": given["password"]})["token"]
token = api("POST", "/login/refresh", {}, token)["token"]
made = api("POST", "/connect", {
    "name": "classic", "description": "", "protected_socket": False, "protected_username": "", "protected_password": "",
    "private_socket": False, "socket_type": "http", "cloud_authentication_enabled": False,
    "cloud_authentication_email_allowed_addressses": [], "cloud_authentication_email_allowed_domains": [],
}, token)
tunnel = made["tunnels"][0]
if [s["socket_id"] for s in api("GET", "/connect", None, token)] != [made["socket_id"]]:
    sys.exit("the socket is not in the list")
say("dnsname", made["dnsname"])

if given["key"] == "rsa":
    key = paramiko.RSAKey.generate(2048)
else:
    key = paramiko.ECDSAKey.generate(bits=256)
path = "/socket/" + made["socket_id"] + ("/tunnel/" + tunnel["tunnel_id"] if given["signkey"] == "tunnel" else "") + "/signkey"
signed = api("POST", path, {"ssh_public_key": key.get_name() + " " + key.get_base64()}, token)
with tempfile.TemporaryDirectory() as directory:
    certificate = os.path.join(directory, "id-cert.pub")
    with open(certificate, "w") as f:
        f.write(signed["signed_ssh_cert"])
    key.load_certificate(certificate)

transport = paramiko.Transport(socket.create_connection((given["ssh_host"], given["ssh_port"])))
transport.local_version = "SSH-2.0-Mysocketctl-1.0"
transport.start_client(timeout=30)
if transport.get_remote_server_key().get_base64() != given["host_key"] or signed["host_key"] != given["host_key"]:
    sys.exit("another host key")
transport.set_keepalive(1)
transport.auth_publickey(made["user_name"], key)


def serve(channel):
    """An app behind the tunnel: one answer, then the end."""
    data = b""
    while b"\r\n\r\n" not in data:
        part = channel.recv(4096)
        if not part:
            break
        data += part
    channel.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\nConnection: close\r\n\r\nclassic")
    channel.close()


def handler(channel, origin, server):
    # The classic client drops a channel that is not for exactly what it asked for.
    if server != (given["bind"], port):
        say("mismatch", str(server))
        channel.close()
        return
    say("origin", origin[0])
    threading.Thread(target=serve, args=(channel,), daemon=True).start()


wanted = tunnel["local_port"] if given["signkey"] == "tunnel" else 0
port = wanted
bound = transport.request_port_forward(given["bind"], wanted, handler)
if wanted and bound != wanted:
    sys.exit("another port was bound")
port = bound

session = transport.open_session()
session.get_pty("xterm-256color", 80, 40)
session.invoke_shell()
say("ready")
while True:
    data = session.recv(4096)
    if not data:
        break
    say("screen", json.dumps(data.decode()))
say("closed", session.recv_exit_status())
transport.close()
