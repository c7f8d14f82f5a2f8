"""What speaks to the other processes of a run, for one of them: a companion process, the only one that holds JAX.

    python -m ckptc.run.coordinator_process PIPE PARENT OPTIONS

It joins JAX's coordination service (`jax.distributed`) and does what its parent (`ckptc.run.coordinator`) asks for through the
pipe of descriptor PIPE. Why it is a process: jaxlib ends the one it lives in, by SIGABRT, when another process does not
come, dies or cannot be reached any more, and by a segmentation fault where its port is taken; workers cannot be forked
where gRPC has threads; and when its parent is killed, this one still tells the others, at once, instead of leaving them
to miss heartbeats. JAX does not initialise any device here.

The service keeps texts by key, `ckptc/<topic>/<process>`. The topics of failures, `failed`, and of those who have heard
of one and gone, `gone`, are used here; all others are the parent's.

Messages are JSON: from the parent ["say", topic, text], ["hear", topic, count], ["fail", text] and ["leave"]; to it
["joined", process, processes], ["heard", {process: text}] and ["failed", process, text].
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

QUICK, SLOW = 0.01, 0.5  # seconds between two looks at the service: for each process when it waits, and otherwise
LINGER = 5.0  # seconds that the service stays for the others to hear of a failure
KILLED = "it was killed; where memory ran out, use fewer --jobs or a plan with less --memory"
IN_USE = "Address already in use"  # gRPC says the same


def main(argv: list[str]) -> None:
    pipe, parent, options = Connection(int(argv[0])), int(argv[1]), json.loads(argv[2])
    client, process, processes = join(options)
    Companion(pipe, parent, client, process, processes).serve()


def join(options: dict[str, Any]) -> tuple[Any, int, int]:
    """JAX's client of the coordination service, this process's number, and how many there are.

    `options`: `coordinator`, `processes` and `process`, or null in each where JAX is to find them out; `wait`, the
    seconds that processes wait for each other; `heartbeat`, the seconds without a sign of life after which a process,
    or its machine, is taken for dead.
    """
    coordinator, process = options["coordinator"], options["process"]
    if process == 0:
        _check_port(int(coordinator.rpartition(":")[2]))
    import jax

    jax.distributed.initialize(
        coordinator,
        options["processes"],
        process,
        cluster_detection_method="deactivate" if coordinator else None,
        initialization_timeout=options["wait"],
        heartbeat_timeout_seconds=options["heartbeat"],
    )
    # Private: the client's key-value store is what JAX, Orbax and MaxText synchronise hosts with, and JAX has no public
    # way to it. `jax.experimental.multihost_utils` runs collectives on devices, which a conversion has no use for, and
    # which would have every process initialise a backend.
    from jax._src.distributed import global_state

    return global_state.client, global_state.process_id, global_state.num_processes


def _check_port(port: int) -> None:
    """gRPC shares a port with another gRPC server, and then processes of two runs meet at random."""
    dual = socket.has_dualstack_ipv6()
    try:
        socket.create_server(
            ("", port), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual
        ).close()
    except OSError as error:
        sys.exit(f"port {port}: {error.strerror}")


class Companion:
    def __init__(self, pipe: Connection, parent: int, client: Any, process: int, processes: int) -> None:
        self._pipe, self._parent, self._client = pipe, parent, client
        self._process, self._processes = process, processes
        self._quick = min(SLOW, QUICK * processes)  # all of them look: about a hundred times a second together

    def serve(self) -> None:
        """Does what the parent says until it leaves or ends, or any process has failed."""
        wanted: tuple[str, int] | None = None
        pause = SLOW
        self._send(["joined", self._process, self._processes])
        while True:
            # The parent's workers may hold the pipe a little longer than it lives.
            if self._pipe.poll(pause) or os.getppid() != self._parent:
                match self._receive():
                    case ["say", topic, text]:
                        self._say(topic, text)
                    case ["hear", topic, count]:
                        wanted, pause = (topic, count), self._quick
                    case ["leave"]:
                        self._leave()
                    case ["fail", text]:
                        self._say("failed", text)
                        self._go()
            # Looked for before what is wanted, and told after it: what was said before a failure is heard, whoever fails then.
            failed = self._texts("failed")
            if wanted is not None:
                found = self._texts(wanted[0])
                if len(found) >= wanted[1]:
                    self._send(["heard", found])
                    wanted, pause = None, SLOW
            if failed:
                first = min(failed)
                self._send(["failed", first, failed[first]])
                self._go()

    def _receive(self) -> list[Any]:
        try:
            if self._pipe.poll():
                message: list[Any] = json.loads(self._pipe.recv_bytes())
                return message
        except (EOFError, OSError):
            pass
        return ["fail", KILLED]

    def _send(self, message: list[Any]) -> None:
        try:
            self._pipe.send_bytes(json.dumps(message).encode())
        except OSError:
            self._say("failed", KILLED)
            self._go()

    def _say(self, topic: str, text: str) -> None:
        self._client.key_value_set(f"ckptc/{topic}/{self._process}", text)

    def _texts(self, topic: str) -> dict[int, str]:
        return {int(key.rpartition("/")[2]): text for key, text in self._client.key_value_dir_get(f"ckptc/{topic}/")}

    def _leave(self) -> None:
        import jax

        shutdown: Any = jax.distributed.shutdown  # typed in some versions
        shutdown()
        os._exit(0)  # Python would take down what JAX has built up, module by module

    def _go(self) -> None:
        """Ends without a farewell, which would wait for those who are gone. The service goes last."""
        if self._process:
            self._say("gone", "")
        else:
            end = time.monotonic() + LINGER
            while len(self._texts("gone")) < self._processes - 1 and time.monotonic() < end:
                time.sleep(self._quick)
        os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
