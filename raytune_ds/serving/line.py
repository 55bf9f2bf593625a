"""The line in which requests wait, and the thread that answers them: as many at once, as one batch, as there are seats.

Whoever comes while a batch is running joins it as soon as a seat is free: the batch is paused, and goes on with the
newcomers, for the price of reading again what it has written so far. So that this price stays small beside what it
buys, a batch is not paused within its first `JOIN_AFTER` tokens.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from raytune_ds.decode import Answer
from raytune_ds.generate import Generator


class Full(Exception):
    """As many wait as may wait."""


class Closed(Exception):
    """Nobody is answered any more."""


class Seat:
    """An answer that is waited for."""

    def __init__(self, answer: Answer, ended: Callable[[Exception | None], None]) -> None:
        """`ended` is called once, by the thread that answers, with what went wrong if something did."""
        self.answer, self._ended, self._is_told = answer, ended, False
        self.cancelled = False

    def cancel(self) -> None:
        """Nobody wants it any more; the next token is its last."""
        self.cancelled = True

    def tell(self, error: Exception | None = None) -> None:
        """Says that it has ended, once."""
        if not self._is_told:
            self._is_told = True
            self._ended(error)


class Line:
    """Answers seats in the order in which they came."""

    JOIN_AFTER = 16

    def __init__(self, generator: Generator, num_seats: int, max_waiting: int) -> None:
        """`num_seats` are answered at once, and `max_waiting` wait beside them."""
        self._generator, self._num_seats, self._max_waiting = generator, num_seats, max_waiting
        self._waiting: deque[Seat] = deque()
        self._batch: list[Seat] = []
        self._num_tokens = 0
        self._changed = threading.Condition()
        self._closed = self._stopped = False
        self._thread = threading.Thread(target=self._work, name="answers", daemon=True)

    def start(self) -> None:
        """Begins to answer."""
        self._thread.start()

    @property
    def is_open(self) -> bool:
        """Whether it takes requests and answers them."""
        return self._thread.is_alive() and not self._closed

    @property
    def num_waiting(self) -> int:
        """How many wait for a seat."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """How many are being answered."""
        return sum(seat.answer.finish is None for seat in self._batch)

    def put(self, seat: Seat) -> None:
        """To the end of the line.

        Raises:
            Full: it is too long.
            Closed: it does not move any more.
        """
        with self._changed:
            if not self.is_open:
                raise Closed
            if len(self._waiting) - self._num_free >= self._max_waiting:
                raise Full
            self._waiting.append(seat)
            self._changed.notify()

    def close(self) -> None:
        """Takes nobody any more; who is in line is still answered."""
        self._closed = True

    def cancel(self) -> None:
        """Ends every answer where it is."""
        with self._changed:
            self._closed = self._stopped = True
            self._changed.notify()

    def join(self, timeout_s: float) -> None:
        """Waits for the thread to end, behind `cancel`."""
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    @property
    def _num_free(self) -> int:
        return self._num_seats - self.num_running

    def _work(self) -> None:
        while self._fill():
            self._num_tokens = 0
            error = None
            try:
                self._generator.run([seat.answer for seat in self._batch], self._after_token)
            except (
                Exception
            ) as failure:  # whatever it is, it is theirs who asked, and others are still to be answered
                error = failure
            for seat in self._batch:
                if error is not None or seat.answer.finish is not None:
                    seat.tell(error)
            self._batch = [] if error is not None else [s for s in self._batch if s.answer.finish is None]
        for seat in (*self._batch, *self._waiting):
            seat.answer.end("cancelled")
            seat.tell()

    def _fill(self) -> bool:
        """Seats who waits, or waits for somebody; False when all is over."""
        with self._changed:
            while not self._stopped and not self._batch:
                self._seat_waiting()
                if not self._batch:
                    self._changed.wait()
            self._seat_waiting()
            return not self._stopped

    def _seat_waiting(self) -> None:
        while self._waiting and len(self._batch) < self._num_seats:
            seat = self._waiting.popleft()
            if seat.cancelled:
                seat.answer.end("cancelled")
                seat.tell()
            else:
                self._batch.append(seat)

    def _after_token(self) -> bool:
        """Tells who has ended; whether the batch is to pause."""
        for seat in self._batch:
            if seat.cancelled or self._stopped:
                seat.answer.end("cancelled")
            if seat.answer.finish is not None:
                seat.tell()
        self._num_tokens += 1
        joins = self._num_tokens >= self.JOIN_AFTER and self._waiting and self._num_free > 0
        return self._stopped or bool(joins)
