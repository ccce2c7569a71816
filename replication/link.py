"""A leg on a peer, as the primary sees it: `RemoteLeg` sends in order, and knows what the peer has.

Life
    `open_remote_leg` connects, reads the replica's HELLO and answers it; from then on one task in the caller's nursery
    (`_run`) has the connection, with tasks of its own that receive, send what the socket didn't take at once, and watch
    the clock. A leg that has failed stays failed, and its task ends.

Resuming
    What was submitted is kept, as the frames that it was sent as, until the replica says that it has it. When the
    connection is lost, the leg connects again. If it finds the same replica, which knows exactly what it has of this
    line of sessions, what is missing is sent again, in its first order, requests in their places between the batches.
    Anything else, or `timeout_s` without success, is the end of the leg. A batch that was applied in part is applied
    again from its beginning: nothing behind it was, so that nobody can tell.

Callbacks
    `done` is called from the receiving task, in order. When the leg fails, all that are due are called with the
    failure, from trio's loop and never from within the call that made it fail. A callback may submit, or close.

Bounds
    None of its own: the mirror bounds `queued_bytes`, which counts all frames that are kept. A frame that the socket
    doesn't take at once lies in the stream's backlog, but that is the same memory. At most `wire.MAX_REQUESTS` requests
    are under way; further ones wait their turn.
"""

from __future__ import annotations

import errno
import logging
import math
import secrets
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from time import perf_counter
from typing import Final

import trio

from nbd.tls import TlsSocket
from replication import wire
from replication.leg import BLOCK_BYTES, Change, Done, Extents
from replication.membership import LegInfo, Membership, encode
from replication.stream import Inbox, Stream, Traffic, gone
from replication.wire import BreachError, Frame, Type

__all__ = ["Connect", "RemoteLeg", "open_remote_leg"]

log = logging.getLogger("replication.link")

INBOX_BYTES: Final = 2 * (wire.HEAD_BYTES + wire.ANSWER_BYTES)
SLICE_S: Final = 0.0015
"""So long the receiver may work before others get their turn."""
FIRST_PAUSE_S: Final = 0.02
LONGEST_PAUSE_S: Final = 0.5
SHORT_LIFE_S: Final = 1.0
"""A connection that was lost before that isn't made again at once."""
LONGEST_PING_S: Final = 1.0
"""A primary that has nothing to say is heard so often, whatever its timeout: the voters' lease counts on it."""

Connect = Callable[[], Awaitable[tuple[socket.socket | TlsSocket, bytes]]]
"""A connection that the replica has taken for a session of this leg, and what came behind that. Raises OSError."""


async def open_remote_leg(
    nursery: trio.Nursery,
    connect: Connect,
    info: LegInfo,
    membership: Membership,
    *,
    timeout_s: float,
    decode_extents: Callable[[bytes], Extents],
    traffic: Traffic | None = None,
) -> RemoteLeg:
    """A leg whose replica has answered. It lives in `nursery`.

    `decode_extents`: the engine's (`LegStore.decode_extents`). Raises OSError: ETIMEDOUT, ESTALE (the replica has
    promised a higher term), EPROTO, or what `connect` raised.
    """
    leg = RemoteLeg(connect, info, membership, timeout_s=timeout_s, decode_extents=decode_extents, traffic=traffic)
    await leg.open(nursery)
    return leg


class _Batch:
    __slots__ = ("done", "frames", "lasting", "sequence", "size_bytes")

    def __init__(
        self, sequence: int, frames: list[bytes | memoryview], size_bytes: int, done: Done, *, lasting: bool
    ) -> None:
        self.sequence = sequence
        self.frames = frames
        self.lasting = lasting  # part of the frames is the caller's memory
        self.size_bytes = size_bytes
        self.done = done


class _Request:
    """One without an answer yet."""

    __slots__ = ("after", "answer", "answered", "error", "frame", "limit", "over")

    def __init__(self, frame: bytes, after: int, limit: int) -> None:
        self.frame = frame
        self.after = after  # the last batch that was submitted before it
        self.limit = limit
        self.answer = bytearray()
        self.answered = trio.Event()
        self.error: OSError | None = None
        self.over = False


class RemoteLeg:
    """See the module; a `replication.leg.Leg`."""

    def __init__(
        self,
        connect: Connect,
        info: LegInfo,
        membership: Membership,
        *,
        timeout_s: float,
        decode_extents: Callable[[bytes], Extents],
        traffic: Traffic | None = None,
    ) -> None:
        self.info = info
        self._traffic = traffic
        self.queued_bytes = 0
        self.hello: wire.Hello
        """What the replica said last when a session began."""
        self.resumptions = 0
        """How often the connection was lost and resumed."""
        self._resumed_at = -math.inf
        self._haste_s = 0.0
        self._name = f"{info.export} on {info.node}"
        self._connect = connect
        self._term = membership.term
        self._timeout_s = timeout_s
        self._decode_extents = decode_extents
        self._line = secrets.token_hex(8)
        self._failure: OSError | None = None
        self._doomed: list[Done] = []
        self._stream: Stream | None = None  # None between two connections
        self._inbox: Inbox
        self._batches: deque[_Batch] = deque()  # not acknowledged, in order
        self._buffers = wire.Buffers()
        self._submitted = 0
        self._acknowledged: int | None = None
        self._requests: dict[int, _Request] = {}  # by cookie, in the order of the stream
        self._cookie = 0
        self._turns = trio.Semaphore(wire.MAX_REQUESTS)
        self._owing_since: float | None = None
        self._pinged_at: float | None = None
        self._lost_at: float | None = None
        self._scope = trio.CancelScope()

    @property
    def failure(self) -> OSError | None:
        """Why it can't be used any more."""
        return self._failure

    @property
    def is_local(self) -> bool:
        """False."""
        return False

    @property
    def silent_since(self) -> float | None:
        """See `Leg`. A request that the replica says it works on doesn't count as silence."""
        since = [at for at in (self._owing_since, self._pinged_at, self._lost_at) if at is not None]
        return min(since) if since and self._failure is None else None

    # --- changes ---

    def submit(self, sequence: int, changes: Sequence[Change], done: Done) -> None:
        """See `Leg`. Sequences grow."""
        if self._failure is not None:
            self._doom([done])
            return
        assert sequence > self._submitted, (sequence, self._submitted)
        frames = wire.pack_batch(sequence, changes, self._buffers)
        size = len(frames[0]) if len(frames) == 1 else sum(map(len, frames))
        self._submitted = sequence
        if self._owing_since is None:
            self._owing_since = trio.current_time()
        self._batches.append(_Batch(sequence, frames, size, done, lasting=wire.is_lasting(changes)))
        self.queued_bytes += size
        stream = self._stream
        if stream is not None:
            for frame in frames:
                stream.send(frame)

    def flushed_by_all(self, sequence: int) -> None:
        """See `Leg`."""
        if self._stream is not None:
            self._stream.send(wire.pack(Type.FLUSHED_BY_ALL, sequence))

    def _acknowledge(self, sequence: int) -> None:
        batches = self._batches
        if sequence > self._submitted:
            raise BreachError(f"a DONE of batch {sequence}, and {self._submitted} is the last")
        if batches and sequence >= batches[0].sequence:
            self._acknowledged = sequence
            self._progress()
            while batches and batches[0].sequence <= sequence:
                batch = batches.popleft()
                self.queued_bytes -= batch.size_bytes
                if batch.size_bytes >= wire.LONG_FRAME_BYTES and not batch.lasting:
                    for frame in batch.frames:
                        self._buffers.give_back(frame)
                if not batches and not self._requests:
                    self._owing_since = None
                batch.done(None)

    def _progress(self) -> None:
        self._owing_since = trio.current_time() if self._batches or self._requests else None

    # --- requests ---

    async def _ask(self, kind: Type, body: bytes = b"", *, count: int = 0, limit: int = 0) -> bytearray:
        """The answer, of at most `limit` bytes."""
        self._check()
        await self._turns.acquire()
        if self._failure is not None:
            self._turns.release()
            raise _again(self._failure)
        self._cookie = cookie = self._cookie + 1
        frame = wire.pack(kind, cookie, body, count=count)
        request = self._requests[cookie] = _Request(frame, self._submitted, limit)
        if self._owing_since is None:
            self._owing_since = trio.current_time()
        if self._stream is not None:
            self._stream.send(frame)
        try:
            await request.answered.wait()
        finally:
            if not request.answered.is_set():
                # Nobody waits for it, but the replica works on it: its turn ends with its answer.
                request.over = True
                request.answer.clear()
        if request.error is not None:
            raise request.error
        return request.answer

    def _check(self) -> None:
        if self._failure is not None:
            raise _again(self._failure)

    def read_now(self, offset: int, length: int, into: memoryview) -> bool:
        """False."""
        self._check()
        return False

    async def read(self, offset: int, length: int, into: memoryview) -> None:
        """See `Leg`. Whole blocks are asked for, and what was not wanted of the first and the last one is left out."""
        at, end = offset & -BLOCK_BYTES, offset + length
        while at < end:
            size = min(-(-(end - at) // BLOCK_BYTES) * BLOCK_BYTES, wire.MAX_READ_BYTES)
            data = await self._ask(Type.READ, wire.RANGE.pack(at, size), limit=size)
            self._judge_length(data, size, "READ")
            first, stop = max(at, offset), min(at + size, end)
            if stop - first == size:
                into[first - offset : stop - offset] = data
            else:
                into[first - offset : stop - offset] = memoryview(data)[first - at : stop - at]
            at += size

    def _judge_length(self, answer: bytearray, expected: int, what: str) -> None:
        if len(answer) != expected:
            error = BreachError(f"{self._name} answers a {what} with {len(answer)} bytes, not {expected}")
            self._fail(error)
            raise _again(error)

    async def flush(self) -> None:
        """See `Leg`."""
        await self._ask(Type.FLUSH)

    async def checks(self, offset: int, length: int) -> bytes:
        """See `Leg`."""
        parts = []
        for at in range(offset, offset + length, wire.MAX_CHECKS_BYTES):
            size = min(offset + length - at, wire.MAX_CHECKS_BYTES)
            expected = size // BLOCK_BYTES * 8
            answer = await self._ask(Type.CHECKS, wire.RANGE.pack(at, size), limit=expected)
            self._judge_length(answer, expected, "CHECKS")
            parts.append(answer)
        return b"".join(parts)

    async def mapped(self, offset: int, length: int) -> list[tuple[int, int]]:
        """See `Leg`."""
        limit = wire.MAX_MAPPED * wire.RANGE.size
        answer = await self._ask(Type.MAPPED, wire.RANGE.pack(offset, length), limit=limit)
        try:
            return wire.read_ranges(answer, offset, length)
        except BreachError as breach:
            error = BreachError(f"{self._name} sends {breach}")
            self._fail(error)
            raise _again(error) from None

    async def changed(self, trackers: Iterable[str]) -> Extents:
        """See `Leg`."""
        body = wire.pack_names(trackers)
        return self._decode_extents(bytes(await self._ask(Type.CHANGED, body, limit=wire.MAX_CHANGED_BYTES)))

    async def accept(self, membership: Membership, *, inconsistent: bool) -> None:
        """See `Leg`."""
        await self._ask(Type.ACCEPT, encode(membership), count=int(inconsistent))

    async def resize(self, size_bytes: int) -> None:
        """See `Leg`."""
        await self._ask(Type.RESIZE, wire.SIZE.pack(size_bytes))

    async def snapshot(self, name: str) -> None:
        """See `Leg`. ENAMETOOLONG."""
        body = name.encode()
        if len(body) > wire.MAX_NAME_BYTES:
            raise OSError(errno.ENAMETOOLONG, f"a snapshot's name has at most {wire.MAX_NAME_BYTES} bytes")
        await self._ask(Type.SNAPSHOT, body)

    # --- the end ---

    def close(self) -> None:
        """See `Leg`. The replica is told, as far as the socket takes that at once; then it can leave cleanly."""
        if self._failure is None and self._stream is not None and not self._batches:
            self._stream.send(wire.pack(Type.GOODBYE))
        self._fail(OSError(errno.ECANCELED, f"the leg {self._name} was closed"))

    def _fail(self, error: OSError) -> None:
        """Set the failure, and see that everybody learns of it."""
        if self._failure is not None:
            return
        self._failure = error
        self._scope.cancel()
        requests, self._requests = self._requests, {}
        for request in requests.values():
            request.error = _again(error)
            request.answered.set()
            self._turns.release()
        if self._batches:
            self._doom([batch.done for batch in self._batches])
            self._batches.clear()  # the very one that `_acknowledge` may be in the middle of
        self.queued_bytes = 0

    def _doom(self, dones: list[Done]) -> None:
        """Call these with the failure, from trio's loop: not from within this call, and whatever task may end."""
        if not self._doomed:
            trio.lowlevel.current_trio_token().run_sync_soon(self._call_doomed)
        self._doomed += dones

    def _call_doomed(self) -> None:
        doomed, self._doomed = self._doomed, []
        assert self._failure is not None
        for done in doomed:
            done(_again(self._failure))

    # --- the connection ---

    async def open(self, nursery: trio.Nursery) -> None:
        """Connect for the first time. Raises OSError; then it has failed."""
        try:
            with trio.move_on_after(self._timeout_s):
                stream = await self._dial()
                try:
                    stream.send(wire.pack_begin(self._line, resumes=False))
                    self._stream = stream
                except BaseException:
                    stream.close()
                    raise
            if self._stream is None:
                raise OSError(errno.ETIMEDOUT, f"{self._name} has not answered within {self._timeout_s:g} s")
            nursery.start_soon(self._run, self._stream)
        except OSError as error:
            self._fail(error)
            raise
        finally:
            if self._stream is None:
                self._fail(OSError(errno.ECANCELED, f"opening the leg {self._name} was cancelled"))

    async def _dial(self) -> Stream:
        """A connection on which HELLO has come."""
        sock, received = await self._connect()
        stream = Stream(sock, peer=self._name, traffic=self._traffic)
        try:
            self._inbox = inbox = Inbox(INBOX_BYTES, received)
            while True:
                frame = wire.take_frame(inbox.buffer, inbox.start, inbox.end, wire.FROM_REPLICA)
                if not isinstance(frame, int):
                    break
                if not await inbox.fill(stream, frame):
                    raise gone(self._name)
            if frame.kind is Type.ERROR:
                raise wire.read_error(frame)
            if frame.kind is not Type.HELLO:
                raise BreachError(f"{self._name} begins with a {frame.kind.name} in place of HELLO")
            hello = wire.read_hello(frame)
            if hello.leg != self.info.id:
                raise BreachError(f"{self._name} is the leg {hello.leg}, not {self.info.id}")
            inbox.start += frame.size_bytes
            self.hello = hello
            return stream
        except BaseException:
            stream.close()
            raise

    async def _run(self, stream: Stream) -> None:
        """One connection after the other, until the leg has failed."""
        try:
            with self._scope:
                while True:
                    lost = await self._talk(stream)
                    if self._failure is None:
                        stream = await self._resume(lost)
        except OSError as error:
            self._fail(error)
        finally:
            self._fail(OSError(errno.ECANCELED, f"the leg {self._name} was stopped"))
            if self._stream is not None:
                self._stream.close()
                self._stream = None

    async def _talk(self, stream: Stream) -> OSError:
        """Receive and send until the connection is lost, and return why; raises OSError if that can't be mended."""
        error: OSError | None = None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._send, stream)
                nursery.start_soon(self._watch, stream)
                try:
                    await self._receive(stream)
                except OSError as failed:
                    error = failed
                if isinstance(error, BreachError):
                    stream.send(wire.pack_error(error))
                nursery.cancel_scope.cancel()
        finally:
            self._stream = None
            self._pinged_at = None
            stream.close()
        assert error is not None
        if isinstance(error, (BreachError, _Fatal)):
            raise error
        return error

    async def _send(self, stream: Stream) -> None:
        with suppress(OSError):  # the receiver meets it too
            await stream.send_rest()

    async def _watch(self, stream: Stream) -> None:
        """Be heard, and notice silence."""
        pause = min(LONGEST_PING_S, self._timeout_s / 4)
        while True:
            if self._pinged_at is None:
                self._pinged_at = trio.current_time()
                stream.send(wire.pack(Type.PING))
            await trio.sleep(pause)
            since = self.silent_since
            if since is not None and trio.current_time() - since >= self._timeout_s:
                self._fail(OSError(errno.ETIMEDOUT, f"{self._name} has been silent for {self._timeout_s:g} s"))

    async def _receive(self, stream: Stream) -> None:
        """Ends only by raising OSError."""
        inbox = self._inbox
        while True:
            wanted = self._work(inbox)
            if self._failure is not None:
                raise _again(self._failure)
            if not await inbox.fill(stream, wanted):
                raise gone(self._name)
            if perf_counter() > stream.woke_at + SLICE_S:
                await stream.rest()

    def _work(self, inbox: Inbox) -> int:
        """All complete frames. Returns how many bytes there must be for the next one."""
        while True:
            frame = wire.take_frame(inbox.buffer, inbox.start, inbox.end, wire.FROM_REPLICA)
            if isinstance(frame, int):
                return frame
            inbox.start += frame.size_bytes
            kind = frame.kind
            if kind is Type.DONE:
                self._acknowledge(frame.number)
            elif kind is Type.ANSWER or (kind is Type.ERROR and frame.number):
                self._answer(frame)
            elif kind is Type.PONG:
                self._pinged_at = None
            elif kind is Type.WORKING:
                if self._requests:
                    self._progress()
                    if self._pinged_at is not None:
                        self._pinged_at = trio.current_time()
            elif kind is Type.ERROR:
                error = wire.read_error(frame)
                raise error if error.errno == errno.ESHUTDOWN else _Fatal(error)
            else:
                raise BreachError(f"{self._name} sends a second {kind.name}")

    def _answer(self, frame: Frame) -> None:
        request = self._requests.get(frame.number)
        if request is None:
            raise BreachError(f"{self._name} answers the request {frame.number}, which isn't under way")
        if frame.kind is Type.ERROR:
            request.error = wire.read_error(frame)
        elif len(request.answer) + len(frame.body) > request.limit:
            raise BreachError(f"{self._name} answers with more than the {request.limit} bytes that were asked")
        elif not request.over:
            request.answer += frame.body
        if not frame.more:
            del self._requests[frame.number]
            request.answered.set()
            self._turns.release()
        self._progress()

    # --- losing it, and going on ---

    async def _resume(self, lost: OSError) -> Stream:
        """Connect again, and send what the replica hasn't got. Raises OSError if that can't be."""
        self._lost_at = trio.current_time()
        log.warning("%s: connection lost: %s", self._name, lost.strerror or lost)
        silent_since = self.silent_since
        assert silent_since is not None
        deadline = max(silent_since + self._timeout_s, self._lost_at + min(1.0, self._timeout_s / 4))
        pause = FIRST_PAUSE_S
        if self._lost_at - self._resumed_at > SHORT_LIFE_S:
            self._haste_s = 0.0
        else:  # it takes connections, and ends each at once
            self._haste_s = min(max(2 * self._haste_s, FIRST_PAUSE_S), LONGEST_PAUSE_S)
            await trio.sleep(min(self._haste_s, (deadline - self._lost_at) / 2))
        while True:
            stream: Stream | None = None
            with trio.move_on_at(deadline):
                try:
                    stream = await self._dial()
                except BreachError:
                    raise
                except OSError as error:
                    if error.errno == errno.ESTALE:
                        raise
                    lost = error
                    await trio.sleep(pause)
                    pause = min(2 * pause, LONGEST_PAUSE_S)
            if stream is not None:
                break
            if trio.current_time() >= deadline:
                text = f"{self._name} can't be reached since {self._timeout_s:g} s: {lost.strerror or lost}"
                raise OSError(errno.ETIMEDOUT, text)
        try:
            self._go_on(stream)
        except BaseException:
            stream.close()
            raise
        self.resumptions += 1
        self._resumed_at = trio.current_time()
        self._lost_at = None
        log.info("%s: connected again, %d batches to send", self._name, len(self._batches))
        return stream

    def _go_on(self, stream: Stream) -> None:
        """Synchronous: nothing is submitted in the middle of it."""
        hello, position = self.hello, self.hello.position
        sequence = self._acknowledged
        if hello.line == self._line:
            if position is not None:
                sequence = position.sequence
        elif hello.line is None and position is not None and position.term == self._term:
            sequence = position.sequence
        else:
            raise OSError(
                errno.ENOTRECOVERABLE,
                f"{self._name} doesn't know what it has of this session: it was restarted, or has had another one",
            )
        low, high = self._acknowledged or 0, self._submitted
        if sequence is not None and not low <= sequence <= high:
            raise BreachError(f"{self._name} has batch {sequence}, which is not within {low} and {high}")
        self._stream = stream
        stream.send(wire.pack_begin(self._line, resumes=True))
        requests = deque(self._requests.values())
        for batch in self._batches:
            while requests and requests[0].after < batch.sequence:
                self._send_again(stream, requests.popleft())
            if sequence is None or batch.sequence > sequence:
                for frame in batch.frames:
                    stream.send(frame)
        for request in requests:
            self._send_again(stream, request)
        if sequence is not None:
            self._acknowledge(sequence)

    def _send_again(self, stream: Stream, request: _Request) -> None:
        request.answer.clear()
        stream.send(request.frame)


class _Fatal(OSError):
    """The replica has ended the session, and says why."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error.errno, error.strerror)


def _again(error: OSError) -> OSError:
    """Each of those that raise it gets its own."""
    return OSError(error.errno or errno.EIO, error.strerror or str(error))
