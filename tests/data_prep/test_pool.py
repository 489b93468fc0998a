"""Tokenizing processes that are interrupted or killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection

import pytest

from data_prep import pool
from gpt2_ddp.system.errors import UserError

KILLED = "a tokenizing process was killed, perhaps for lack of memory: try fewer --workers"


@dataclass(frozen=True, kw_only=True)
class Words:
    """A source of one document a chunk."""

    name: str = "words"
    revision: str = "1"

    def chunks(self, first: int) -> Iterator[int]:
        return iter(range(first, 3))

    def documents(self, chunk: int) -> Iterator[str]:
        yield f"document {chunk}"


def interrupted_at_birth() -> list[int]:
    """The lengths of a worker's first chunk, which has been sent SIGINT before it had read a line of Python."""
    with pool._started(Words(), 1, None) as [connection]:
        for process in multiprocessing.active_children():
            os.kill(int(process.pid or 0), signal.SIGINT)
        connection.send(0)
        return pool._receive(connection).lengths.tolist()


@pytest.mark.parametrize("elsewhere", [False, True], ids=["main thread", "another thread"])
def test_an_interrupt_while_a_worker_starts_is_not_the_workers(*, elsewhere: bool) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with ThreadPoolExecutor(max_workers=1) as executor:
        lengths = executor.submit(interrupted_at_birth).result() if elsewhere else interrupted_at_birth()
    assert lengths == [3]  # the end-of-text, "document", " 0"
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


def test_an_interrupt_while_a_worker_starts_is_heard_by_the_command() -> None:
    with pytest.raises(KeyboardInterrupt), pool._without_interrupts():
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("death", ["before it was given a chunk", "before it had read one", "before it had answered"])
def test_a_killed_worker_is_told_with_what_to_do(death: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe whose other end is closed, as by the kernel."""
    ours, theirs = multiprocessing.Pipe()

    @contextmanager
    def dead(*_: object) -> Iterator[list[Connection]]:
        if death == "before it was given a chunk":
            theirs.close()
        yield [ours]

    def die(connection: Connection, receive: Callable[[Connection], object] = pool._receive) -> object:
        if death == "before it had answered":
            theirs.recv()
        theirs.close()
        return receive(connection)

    monkeypatch.setattr(pool, "_started", dead)
    monkeypatch.setattr(pool, "_receive", die)
    monkeypatch.setattr(pool, "wait", lambda connections, **_: connections)
    with ours, pytest.raises(UserError, match=KILLED):
        list(pool.encoded_chunks(Words(), 0, 1))
