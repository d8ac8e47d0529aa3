"""Worker processes, one a peer: each waits for a command, answers it, and waits again; only the one asked computes."""

import contextlib
import signal
import threading
import traceback
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, Self

from experiments.bench.work import FLOOR, OURS
from resode.errors import ResodeError

PATIENCE = 5.0
"""Seconds a worker has to end by itself."""


class WorkerError(ResodeError):
    """A worker that died, or ours that cannot work."""


class Refused(Exception):
    """A piece of work that the peer cannot do; the message says why."""


class Absent(Exception):
    """A peer that is not installed, or lacks something it needs."""


def serve(connection: Connection, peer: str) -> None:
    """The life of a worker: it ends when the other end of ``connection`` is closed."""
    from experiments.bench import peers, station

    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            connection.send(("ok", peers.load(peer)))
        except ImportError as problem:
            connection.send(("absent", str(problem)))
            return
        commands = station.Station()
        while True:
            name, arguments = connection.recv()
            try:
                answer = ("ok", getattr(commands, name)(*arguments))
            except Exception as problem:
                answer = ("refused", (f"{type(problem).__name__}: {problem}", traceback.format_exc()))
            connection.send(answer)


@contextlib.contextmanager
def deaf() -> Iterator[None]:
    """Processes started here ignore Ctrl-C, which reaches the whole group: the parent answers it, and ends them."""
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class Worker:
    """A process that works for ``peer``; :meth:`ready` waits until it has imported it."""

    def __init__(self, peer: str) -> None:
        context = get_context("spawn")
        self.peer = peer
        self.connection, there = context.Pipe()
        self.process = context.Process(target=serve, args=(there, peer), name=f"bench {peer}", daemon=True)
        with deaf():
            self.process.start()
        there.close()  # the worker's copy is the only one: when it dies, reading here ends

    def ready(self) -> str:
        """The version of the peer.

        Raises:
            Absent: when it cannot be imported.
        """
        return self._receive("starting")

    def ask(self, command: str, *arguments: Any, about: str = "") -> Any:
        """The answer of :class:`~experiments.bench.station.Station` to ``command``.

        Raises:
            Refused: when the command failed.
            WorkerError: when the worker died.
        """
        doing = f"{command} {about}".strip()
        try:
            self.connection.send((command, arguments))
        except (BrokenPipeError, ConnectionResetError):
            raise self._death(doing) from None
        return self._receive(doing)

    def _receive(self, doing: str) -> Any:
        try:
            kind, value = self.connection.recv()
        except (EOFError, ConnectionResetError):
            raise self._death(doing) from None
        if kind == "absent":
            raise Absent(value)
        if kind == "refused":
            message, trace = value
            problem = Refused(message)
            problem.add_note(trace)
            raise problem
        return value

    def _death(self, doing: str) -> WorkerError:
        self.process.join(PATIENCE)
        code = self.process.exitcode
        if code is not None and code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
            how += ", perhaps for lack of memory" if -code == signal.SIGKILL else ""
        else:
            how = f"ended with the status {code}"
        return WorkerError(
            f"the worker of {self.peer} {how} at: {doing}. Its own messages, if any, stand above; leave the peer out "
            "with --peers, or make the batch smaller"
        )

    def close(self, patience: float = PATIENCE) -> None:
        """End the process: by itself if it does so within ``patience`` seconds."""
        self.connection.close()
        self.process.join(patience)
        for end in (self.process.terminate, self.process.kill):
            if self.process.is_alive():
                end()
                self.process.join(PATIENCE)


class Crew:
    """The workers of ours, the floor, and every peer that is installed; a context manager that leaves none behind.

    ``versions`` are those of the workers; ``absent`` says why a peer is none.
    """

    def __init__(self, peers: Sequence[str]) -> None:
        self.workers: dict[str, Worker] = {}
        self.versions: dict[str, str] = {}
        self.absent: dict[str, str] = {}
        try:
            for peer in (OURS, FLOOR, *peers):
                if peer not in (OURS, FLOOR) and find_spec(peer) is None:
                    self.absent[peer] = "not installed"
                else:
                    self.workers[peer] = Worker(peer)
            for peer, worker in list(self.workers.items()):
                self._receive(peer, worker)
        except BaseException:
            self.close(0.0)
            raise

    def _receive(self, peer: str, worker: Worker) -> None:
        try:
            self.versions[peer] = worker.ready()
        except Absent as problem:
            if peer in (OURS, FLOOR):
                raise WorkerError(f"{peer} cannot be imported: {problem}") from problem
            self.absent[peer] = f"cannot be imported: {problem}"
            self.workers.pop(peer).close()

    def __getitem__(self, peer: str) -> Worker:
        return self.workers[peer]

    def __contains__(self, peer: str) -> bool:
        return peer in self.workers

    def __iter__(self) -> Iterator[Worker]:
        return iter(self.workers.values())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(PATIENCE if kind is None else 0.0)

    def close(self, patience: float = PATIENCE) -> None:
        """End all workers."""
        for worker in self:
            worker.connection.close()
        for worker in self:
            worker.close(patience)
