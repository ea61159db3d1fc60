"""A client's TLS key as Java reads it: PKCS-8 DER, in a file that only we can read and that ends with the process.

libpq reads PEM and the PostgreSQL driver of Java does not. What is inside a PEM file is PKCS-8 already, or is wrapped in it here
(RSA and EC keys in their older forms). A key that is encrypted stays so, in a form for which Java 17 has the algorithms; for that
`openssl` has to be on the machine.
"""

from __future__ import annotations

import atexit
import base64
import binascii
import os
import re
import secrets
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

from changeover.errors import UsageError

PEM = re.compile(rb"-----BEGIN ((?:RSA |EC |ENCRYPTED )?PRIVATE KEY)-----\s+(.*?)-----END \1-----", re.DOTALL)

ENCRYPT = ("pkcs8", "-topk8", "-passin", "stdin", "-passout", "stdin", "-v1", "PBE-SHA1-3DES", "-outform", "DER", "-in")
"""openssl's command for an encrypted key; the password comes by standard input, which nobody else sees."""

OPENSSL_SECONDS = 30

SEQUENCE, INTEGER, OCTETS, CURVE = b"\x30", b"\x02", b"\x04", b"\xa0"
RSA = bytes.fromhex("06092a864886f70d0101010500")
"""The algorithm rsaEncryption, and its NULL."""
EC = bytes.fromhex("06072a8648ce3d0201")
"""The algorithm id-ecPublicKey; its parameter is the curve."""


def as_der(path: str, password: str | None = None) -> str:
    """Return a file with the key in DER; raises UsageError for a key that Java can't have.

    It is PATH itself where that is no PEM, and `PATH.pk8` where there is one: on a cluster each executor needs it there.
    """
    beside = f"{path}.pk8"
    if os.path.exists(beside):
        return beside
    try:
        changed = os.stat(path).st_mtime_ns
        return _converted(path, changed, password, os.getpid())
    except OSError as error:
        raise UsageError(f"the client key {path} can't be read ({error.strerror}): check sslkey in the DSN") from error


@lru_cache(maxsize=8)
def _converted(path: str, changed: int, password: str | None, pid: int) -> str:
    """Convert a file once in a process, and again when it has changed."""
    pem = PEM.search(Path(path).read_bytes())
    return _kept(_der(path, pem[1].decode(), pem[2], password), pid) if pem else path


def _der(path: str, label: str, body: bytes, password: str | None) -> bytes:
    if label == "ENCRYPTED PRIVATE KEY" or b":" in body:
        return _encrypted(path, password)
    try:
        key = base64.b64decode(b"".join(body.split()), validate=True)
    except binascii.Error as error:
        raise UsageError(f"the client key {path} is no PEM file: check sslkey in the DSN") from error
    if label == "RSA PRIVATE KEY":
        return _pkcs8(RSA, key)
    if label == "EC PRIVATE KEY":
        return _pkcs8(EC + _curve(path, key), key)
    return key


def _encrypted(path: str, password: str | None) -> bytes:
    program = shutil.which("openssl")
    if program is None or password is None:
        lack = "openssl is not here to convert it" if program is None else "the DSN has no sslpassword"
        raise UsageError(f"the client key {path} is encrypted and {lack}: install it, or name a key that is not encrypted")
    asked = f"{password}\n{password}\n".encode()
    process = subprocess.run([program, *ENCRYPT, path], input=asked, capture_output=True, timeout=OPENSSL_SECONDS, check=False)
    if process.returncode:
        raise UsageError(f"the client key {path} does not open with the DSN's sslpassword: check both")
    return process.stdout


def _pkcs8(algorithm: bytes, key: bytes) -> bytes:
    return _tagged(SEQUENCE, _tagged(INTEGER, b"\0") + _tagged(SEQUENCE, algorithm) + _tagged(OCTETS, key))


def _tagged(tag: bytes, content: bytes) -> bytes:
    size = len(content)
    if size < 0x80:
        return tag + bytes([size]) + content
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return tag + bytes([0x80 | len(length)]) + length + content


def _curve(path: str, key: bytes) -> bytes:
    """Return the curve of an EC key: SEQUENCE (version, key, [0] curve, …)."""
    rest = _parts(key)[0][1]
    for tag, content in _parts(rest):
        if tag == CURVE:
            return content
    raise UsageError(f"the client key {path} does not name its curve: convert it by `openssl pkcs8 -topk8 -nocrypt`")


def _parts(data: bytes) -> list[tuple[bytes, bytes]]:
    """Return the values of a run of DER, with their tags."""
    parts = []
    while data:
        size, start = data[1], 2
        if size & 0x80:
            start = 2 + (size & 0x7F)
            size = int.from_bytes(data[2:start], "big")
        parts.append((data[:1], data[start : start + size]))
        data = data[start + size :]
    return parts


def _kept(key: bytes, pid: int) -> str:
    """Keep a key in a file of this process."""
    path = _folder(pid) / f"{secrets.token_hex(8)}.pk8"
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(key)
    return str(path)


@lru_cache(maxsize=1)
def _folder(pid: int) -> Path:
    """Return the folder of a process; a forked child makes one of its own."""
    folder = Path(tempfile.mkdtemp(prefix="changeover-key-"))  # 0700
    atexit.register(_remove, folder, pid)
    return folder


def _remove(folder: Path, pid: int) -> None:
    if os.getpid() == pid:
        shutil.rmtree(folder, ignore_errors=True)
