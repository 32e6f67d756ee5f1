"""Two of Kafka's requests, on a socket of our own: the client libraries do not offer them.

Who leads the quorum of the controllers: brokers name any of themselves as the "controller" to clients (KIP-590), only
DescribeQuorum tells (KIP-595), asked where the controllers listen: a broker passes it on to the controller it knows and
waits there when that is frozen. And FindCoordinator for a transactional id as for a group.
"""

from __future__ import annotations

import socket
import struct

_FIND_COORDINATOR, _DESCRIBE_QUORUM = 10, 55
_CLIENT = struct.pack(">h5s", 5, b"tests")
_NO_TAGS = b"\0"
GROUP, TRANSACTION = 0, 1


def led_epoch(controller_port: int) -> int:
    """The epoch of the quorum that this controller leads; -1 when it follows. Raises OSError when it is away."""
    partitions = b"\x02" + struct.pack(">i", 0) + _NO_TAGS
    topics = b"\x02" + _compact(b"__cluster_metadata") + partitions + _NO_TAGS
    answer = _ask(controller_port, _DESCRIBE_QUORUM, 0, _NO_TAGS + topics + _NO_TAGS)
    at = 1  # the header's tags
    error, _topics, length = struct.unpack_from(">hBB", answer, at)
    if error:
        return -1
    at += 4 + length - 1 + 1  # the topic's name, and how many partitions
    _index, partition_error, _leader, epoch = struct.unpack_from(">ihii", answer, at)
    return -1 if partition_error else int(epoch)


def coordinator(port: int, name: str, kind: int) -> int:
    """The `node.id` of the coordinator of a group or transactional id; -1 while there is none."""
    encoded = name.encode()
    body = struct.pack(f">h{len(encoded)}sb", len(encoded), encoded, kind)
    answer = _ask(port, _FIND_COORDINATOR, 1, body)
    _throttled, error, message = struct.unpack_from(">ihh", answer)
    node = struct.unpack_from(">i", answer, 8 + max(0, message))[0]
    return -1 if error else int(node)


def _ask(port: int, key: int, version: int, body: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), 3) as connection:
        request = struct.pack(">hhi", key, version, 1) + _CLIENT + body
        connection.sendall(struct.pack(">i", len(request)) + request)
        answer = _read(connection, struct.unpack(">i", _read(connection, 4))[0])
    return answer[4:]


def _read(connection: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count:
        more = connection.recv(count - len(found))
        if not more:
            raise ConnectionError("the broker hung up")
        found += more
    return found


def _compact(text: bytes) -> bytes:
    return bytes([len(text) + 1]) + text
