"""A payment service as a process of its own: it counts every request, and charges once for each idempotency key.

POST /charge with Idempotency-Key; GET /log gives every charge asked for, in order; `?honour=0` charges every time; a
charge of nothing is declined (402).
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.request import Request, urlopen

from tests.processes import REPOSITORY


class Till:
    """The running service; gone at the end of the block."""

    def __enter__(self) -> Till:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.failure.till"], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self.url = f"http://127.0.0.1:{int(self._process.stdout.readline())}"
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait(10)

    def log(self) -> list[dict[str, Any]]:
        """Every request: key, attempt, fence, n, charge (the number of the charge it got)."""
        return list(_answer(Request(f"{self.url}/log")))

    def charges(self) -> int:
        """How many charges there are, whatever was asked."""
        return len({entry["charge"] for entry in self.log()})


def charge(url: str, *, key: str, attempt: int, fence: int, n: int = 0, honour: bool = True) -> dict[str, Any]:
    """What an application would write: one POST with a timeout."""
    body = json.dumps({"attempt": attempt, "fence": fence, "n": n}).encode()
    request = Request(f"{url}/charge?honour={int(honour)}", body, {"Idempotency-Key": key}, method="POST")
    return dict(_answer(request))


def _answer(request: Request) -> Any:
    with urlopen(request, timeout=10) as response:
        return json.load(response)


def main() -> None:
    lock, log, charges = threading.Lock(), list[dict[str, Any]](), dict[str, int]()

    class Service(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with lock:
                self.reply(log)

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            key = self.headers["Idempotency-Key"]
            if asked.get("cents") == 0:
                self.reply({"error": "declined"}, 402)
                return
            with lock:
                known = None if "honour=0" in self.path else charges.get(key)
                number = known or len(log) + 1
                charges[key] = number
                log.append({"key": key, "charge": number, **asked})
                self.reply({"charge": number, "key": key})

        def reply(self, document: object, status: int = 200) -> None:
            body = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Quiet: what it was asked is in the log that tests read."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
