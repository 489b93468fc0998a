"""Ends a rank that would wait for ever: for ranks that hang, which it names, or for a torchrun that has died."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from torch.distributed import is_torchelastic_launched

from gpt2_ddp.distributed.context import DistContext
from gpt2_ddp.system.cli import tell

SILENCE_SECONDS = 60.0
"""A rank from which nothing at all is heard for so long is given up, however long a step may take."""
ASKED_SECONDS = 8.0
"""The same once a signal has come: a rank that waits for a dead one must leave before torchrun kills it, after 30 s."""


@contextmanager
def leaving_with_torchrun(note_end: Callable[[str, str], None]) -> Iterator[None]:
    """Inside, a rank ends when torchrun does, however suddenly; `note_end` puts the state and why into status.json.

    Nobody would restart or stop it any more, and the next start needs what it holds.
    """
    ended, torchrun = threading.Event(), os.getppid()

    def watch() -> None:
        while not ended.wait(1.0):
            if os.getppid() != torchrun:
                tell("error: torchrun has died: ending too")
                note_end("failed", "torchrun has died")
                os._exit(1)

    if is_torchelastic_launched():
        threading.Thread(target=watch, name="torchrun", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


class Watchdog(threading.Thread):
    """Ends this process when no rank gets on any more, after naming the ranks that hold up the others.

    Every rank publishes how often it has got on (`beats`) and that it lives at all (`ticks`). A rank whose ticks stand
    still is stopped or gone; else the ones with the fewest beats are those that the others wait for.
    """

    def __init__(
        self,
        context: DistContext,
        timeout: float,
        *,
        asked: Callable[[], bool] = lambda: False,
        note_end: Callable[[str, str], None] = lambda _state, _why: None,
    ) -> None:
        """`timeout` in seconds is how long no rank may get on; `asked` tells whether this one was asked to stop.

        `note_end` puts the state and why into status.json.
        """
        super().__init__(name="watchdog", daemon=True)
        self._context, self._timeout = context, timeout
        self._asked, self._note_end = asked, note_end
        self._ticks = 0
        self._ended, self._standing_by = threading.Event(), False

    def watch(self) -> None:
        """Begin, unless that has been done or there is nobody to watch."""
        if self._context.store is not None and not self.is_alive() and not self._ended.is_set():
            self._context.shorten_timeouts(self._timeout + 30)  # later than this thread, which can name who is late
            self._publish()  # here, so that a rank that stops at once is known to the others
            self.start()

    def run(self) -> None:
        recent: deque[list[dict[str, Any]]] = deque(maxlen=6)
        beats, since = [-1], time.monotonic()
        heard = since
        while not self._ended.wait(min(1.0, self._timeout / 10)):
            try:
                self._publish()
                look = self._look()
            except RuntimeError:  # torchrun, which has the store, is ending or has died: the next round will tell
                if not self._standing_by and self._asked() and time.monotonic() > heard + ASKED_SECONDS:
                    self._leave("the node that keeps the ranks' store does not answer")
                continue
            heard = time.monotonic()
            if look is None or self._standing_by:
                continue
            recent.append(look)
            if beats != [told["beats"] for told in recent[-1]]:
                beats, since = [told["beats"] for told in recent[-1]], time.monotonic()
            stood_still = time.monotonic() - since
            ticks = [[told["ticks"] for told in look] for look in (recent[0], recent[-1])]
            silent = [rank for rank, (was, now) in enumerate(zip(*ticks, strict=True)) if was == now]
            silence = min(self._timeout, ASKED_SECONDS if self._asked() else SILENCE_SECONDS)
            if len(recent) == recent.maxlen and stood_still > (silence if silent else self._timeout):
                self._give_up(recent[-1], silent)

    def _publish(self) -> None:
        self._ticks += 1
        mine = {
            "beats": self._context.pulse.beats,
            "ticks": self._ticks,
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        assert self._context.store is not None  # `watch` has looked
        self._context.store.set(f"watchdog/{self._context.rank}", json.dumps(mine))

    def _look(self) -> list[dict[str, Any]] | None:
        """What every rank published last; None while one of them has not, because it is in its first step."""
        keys = [f"watchdog/{rank}" for rank in range(self._context.world_size)]
        store = self._context.store
        assert store is not None
        if not store.check(keys):
            return None
        return [json.loads(store.get(key)) for key in keys]

    def _give_up(self, now: list[dict[str, Any]], silent: list[int]) -> None:
        ranks = range(self._context.world_size)
        fewest = min(told["beats"] for told in now)
        late = silent or [rank for rank in ranks if now[rank]["beats"] == fewest]
        what = "gives no sign of life" if silent else "holds up the others"
        named = ", ".join(f"rank {rank} on {now[rank]['host']}" for rank in late)
        speaks = self._context.rank == min(set(ranks) - set(silent))
        self._leave(f"the run stands still: {named} {what}", speaks=speaks, silent=[now[rank] for rank in silent])

    def _leave(self, why: str, *, speaks: bool = True, silent: Sequence[dict[str, Any]] = ()) -> None:
        if self._asked():
            why = f"{why}; asked to stop, but no step can be ended and saved: the last checkpoint stands"
        if speaks:
            tell(f"error: {why}")
        self._note_end("failed", why)
        if not speaks:
            time.sleep(2)  # torchrun ends everybody at the first exit: let the line be printed
        for told in silent:
            if told["host"] == socket.gethostname():
                # A stopped process does not hear torchrun's SIGTERM, and a restart would wait for it for minutes.
                with suppress(ProcessLookupError):
                    os.kill(told["pid"], signal.SIGKILL)
        os._exit(1)

    def stand_by(self) -> None:
        """From now on only show the others that this rank lives: it waits for none of them."""
        self._standing_by = True

    def dismiss(self) -> None:
        """End: from now on no rank waits for another."""
        self._ended.set()
