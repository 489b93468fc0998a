"""Worker processes that read and tokenize chunks, results in the chunks' order."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.resource_tracker
import signal
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

from gpt2_ddp.system.errors import UserError, user_error

from .encoding import EncodedChunk, encoder_for
from .sources import Source

CHUNKS_AHEAD = 4
"""Chunks per worker that may be done before the one that is due: what bounds the memory."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a worker could not do a chunk."""

    line: str | None
    """The line for the user, None for a fault of the program."""
    trace: str


def encoded_chunks(source: Source, first: int, workers: int, tokenizer: Path | None = None) -> Iterator[EncodedChunk]:
    """The chunks of `source` from number `first` on, tokenized by `workers` processes, in order.

    `tokenizer` is the data directory that one of the user's own lies in; else it is GPT-2's.

    Raises:
        UserError: what a worker found wrong with the source, or that one was killed.
        RuntimeError: if a worker failed otherwise.
    """
    encoder_for(tokenizer)  # one download or one error, not one a worker
    with _started(source, workers, tokenizer) as idle:
        chunks = enumerate(source.chunks(first))
        busy: dict[Connection, int] = {}
        ready: dict[int, EncodedChunk] = {}
        due, exhausted = 0, False
        while True:
            while idle and not exhausted and len(busy) + len(ready) < workers * CHUNKS_AHEAD:
                if (chunk := next(chunks, None)) is None:
                    exhausted = True
                else:
                    with _death_told():
                        idle[-1].send(chunk[1])
                    busy[idle.pop()] = chunk[0]
            for connection in wait(list(busy), timeout=0 if due in ready or not busy else None):
                assert isinstance(connection, Connection)
                ready[busy.pop(connection)] = _receive(connection)
                idle.append(connection)
            if due in ready:
                yield ready.pop(due)
                due += 1
            elif exhausted and not busy:
                return


def _receive(connection: Connection) -> EncodedChunk:
    with _death_told():
        answer: EncodedChunk | Failure = connection.recv()
    if isinstance(answer, EncodedChunk):
        return answer
    if answer.line:
        raise UserError(answer.line)
    raise RuntimeError(f"a tokenizing process failed:\n{answer.trace}")


@contextlib.contextmanager
def _death_told() -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError):  # the latter where it left something unread, or half an answer
        raise UserError("a tokenizing process was killed, perhaps for lack of memory: try fewer --workers") from None


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Processes started within it are born deaf to Ctrl-C; this one hears afterwards what came meanwhile.

    It alone decides what an interrupt means. By this thread's mask, which a new program inherits; the start of the
    tracker of `multiprocessing` would lift it.
    """
    multiprocessing.resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _started(source: Source, workers: int, tokenizer: Path | None) -> Iterator[list[Connection]]:
    """Connections to new worker processes, which end when it ends, or when this process dies."""
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        connections = []
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, source, tokenizer), daemon=True)
            with _without_interrupts():
                process.start()
            theirs.close()
            stack.callback(process.join)
            stack.callback(process.terminate)
            connections.append(ours)
        for connection in connections:
            stack.callback(connection.close)
        yield list(connections)


def _work(connection: Connection, source: Source, tokenizer: Path | None) -> None:
    encoder = encoder_for(tokenizer)
    with contextlib.suppress(EOFError, ConnectionError):  # the parent is gone
        while True:
            chunk = connection.recv()
            try:
                answer: EncodedChunk | Failure = encoder.encode(source.documents(chunk))
            except Exception as error:
                answer = Failure(line=user_error(error), trace=traceback.format_exc())
            connection.send(answer)
