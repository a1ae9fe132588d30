"""The watch over the ranks of a job: when one fails, dies or hangs, all end within seconds and one message says why.

A thread of every rank holds a connection to rank 0 from the start to the end, so that a step costs nothing and it does
not matter what the main thread waits for. A rank that fails sends its reason; the system closes the connection of one
that dies, and the network's keepalive that of a machine; one whose main thread stands at the same instruction for too
long is asked, with all others, where it stands. Rank 0 chooses whom to name, prints it and tells all ranks to end.
"""
import contextlib
import hashlib
import json
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[1]
# A machine that is gone is noticed after 20 s.
KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 20000}
PERIOD = 1.0  # seconds between two looks at the main thread
ANSWER = 15  # seconds in which a rank has to answer
LATE = 20  # seconds that a job which ends at its start waits for ranks that have not come yet
TOGETHER = 0.5  # seconds in which ranks that all stumble over the same have said so
# Files whose innermost frame means that a rank waits for others; backward exchanges gradients.
WAITING = ("torch/distributed/", "torch/nn/parallel/distributed.py", "torch/autograd/graph.py", "train/distributed.py",
           "train/watch.py")

current = None  # the watch of this process, or None: it is alone


class Watch:
    """A context: inside it, the ranks that torchrun started live and end together.

    message_of: function of an exception, that gives its line for the user. An exception that leaves the context ends
    the process, and all others, with exit status 2; SystemExit and KeyboardInterrupt pass.
    """

    def __init__(self, message_of):
        self.message_of = message_of
        self.timeout = 10.0  # minutes
        self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.local_rank, self.parent = int(os.environ.get("LOCAL_RANK", 0)), os.getppid()
        self.lock = threading.RLock()
        self.ending = False
        self.left, self.gone = False, set()  # whether this rank has left in peace, and which others
        self.trace = None
        self.hosts, self.processes = {self.rank: socket.gethostname()}, {}
        self.shared = 0
        self.facts, self.early = {}, {}  # on rank 0, by subject: its own; those of others that came before
        self.failures, self.decide_at = [], None  # on rank 0: (urgency, rank, message)
        self.answers, self.asked_at = {}, None  # to the question where a rank stands
        self.stack, self.still = None, 0  # of the main thread, and for how many looks it has been the same
        self.look_at = time.monotonic()

    def __enter__(self):
        """Raises ConnectionError when rank 0 cannot be reached."""
        global current
        self.selector = selectors.DefaultSelector()
        self.peers = {}  # rank -> socket: of rank 0 to all others, of the others to rank 0
        try:
            self._meet()
        except (OSError, RuntimeError) as error:
            raise ConnectionError(f"rank {self.rank} of {self.world} on {self.hosts[self.rank]} cannot reach rank 0 at "
                                  f"{os.environ.get('MASTER_ADDR')}: {str(error).splitlines()[0]}") from error
        current = self
        self.thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self.thread.start()
        self.agree("software", {"torch": torch.__version__, "the project's code": _code()})
        return self

    def _meet(self):
        """Rank 0 says through torch's store where it listens; the others come."""
        self.store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(minutes=10)))
        own = [os.getpid(), os.environ.get("GROUP_RANK")]
        if self.rank:
            port, token, self.hosts[0], self.processes[0] = json.loads(self.store.get("watch"))
            self._connected(0, socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=60), b"")
            self._send(0, token=token, rank=self.rank, host=self.hosts[self.rank], process=own)
            return
        self.token, dual = secrets.token_hex(), socket.has_dualstack_ipv6()
        self.server = socket.create_server(("", 0), family=socket.AF_INET6 if dual else socket.AF_INET,
                                           dualstack_ipv6=dual, backlog=self.world)
        self.selector.register(self.server, selectors.EVENT_READ, lambda _: self._accept())
        self.store.set("watch", json.dumps([self.server.getsockname()[1], self.token, self.hosts[0], own]))

    def __exit__(self, kind, error, trace):
        global current
        current = None
        if error is None or isinstance(error, SystemExit | KeyboardInterrupt):
            last = time.monotonic() + LATE
            while self.rank == 0 and len(self.hosts) < self.world and time.monotonic() < last:
                time.sleep(0.05)
            with self.lock:
                self.left = True
                for rank in self.peers:
                    self._send(rank, left=True)
            return
        if os.environ.get("ELSA_TRACEBACK"):
            self.trace = "".join(traceback.format_exception(error))
        message = self.message_of(error)
        # A rank that waited for one that died learns it from its collective, maybe before rank 0 does.
        urgency = 2 if isinstance(error, RuntimeError) else 1
        if self.rank == 0:
            self._failed(urgency, 0, message)
        else:
            self._send(0, failed=message, urgency=urgency)
        time.sleep(ANSWER)  # the thread ends this process meanwhile
        self._end(self.rank, message)

    def from_rank_0(self, function):
        """What function() gives on rank 0, plain values, on every rank, before the ranks can exchange tensors."""
        self.shared += 1
        if self.rank == 0:
            self.store.set(f"watch/{self.shared}", json.dumps(function()))
        return json.loads(self.store.get(f"watch/{self.shared}"))

    def agree(self, subject, facts):
        """Ends the job when one of these facts, {name: plain value}, is not the one of rank 0; a name that only one of
        both has is not compared."""
        facts = json.loads(json.dumps(facts))
        with self.lock:
            if self.rank:
                self._send(0, facts=[subject, facts])
            else:
                self.facts[subject] = facts
                for rank, theirs in self.early.pop(subject, ()):
                    self._compare(rank, subject, theirs)

    # What follows runs in the thread, except for _failed and _end of a rank that fails.

    def _run(self):
        while not self.left:
            for key, _ in self.selector.select(PERIOD if self.decide_at is None else 0.05):
                with self.lock:
                    key.data(key.fileobj)
            with self.lock:
                if not self.left:
                    self._look()

    def _accept(self):
        connection, _ = self.server.accept()
        connection.settimeout(ANSWER)
        try:
            line, _, rest = connection.recv(1 << 16).partition(b"\n")
            hello = json.loads(line)
            if hello["token"] != self.token:
                raise ValueError
        except (OSError, ValueError, KeyError, TypeError):  # somebody else's
            connection.close()
            return
        self.hosts[hello["rank"]], self.processes[hello["rank"]] = hello["host"], hello["process"]
        self._connected(hello["rank"], connection, rest)

    def _connected(self, rank, connection, rest):
        """rest: bytes that were read from the connection already."""
        connection.settimeout(ANSWER)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE.items():
            if hasattr(socket, option):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self.peers[rank] = connection
        buffer = bytearray(rest)
        self._messages(rank, buffer)
        self.selector.register(connection, selectors.EVENT_READ, lambda _: self._receive(rank, buffer))

    def _receive(self, rank, buffer):
        connection = self.peers[rank]
        try:
            received = connection.recv(1 << 16)
        except OSError:
            received = b""
        if received:
            buffer += received
            self._messages(rank, buffer)
            return
        self.selector.unregister(connection)
        del self.peers[rank]
        if rank not in self.gone:
            died = "died: killed, out of memory or its machine lost; the log of that machine may say more"
            if self.rank == 0:
                self._failed(0, rank, died)
            elif self.asked_at is not None:  # another one did not wait any longer, and killed it
                self._without_rank_0()
            else:
                self._end(0, died)

    def _messages(self, rank, buffer):
        while b"\n" in buffer:
            line, _, rest = bytes(buffer).partition(b"\n")
            buffer[:] = rest
            self._message(rank, **json.loads(line))

    def _message(self, rank, failed=None, urgency=0, facts=None, end=None, left=None, where=None, stands=None):
        if failed is not None:
            self._failed(urgency, rank, failed)
        if facts is not None:
            self._compare(rank, *facts)
        if end is not None:
            self._end_with(*end, self.local_rank == 0)
        if left:
            self.gone.add(rank)
        if where:  # rank 0 asks, so it lives, and will end all
            self.asked_at = time.monotonic() + ANSWER
            self._send(0, stands=self._stands())
        if stands is not None:
            self._stopped(rank, stands)

    def _send(self, to, /, **message):
        try:
            self.peers[to].sendall(json.dumps(message).encode() + b"\n")
        except (OSError, KeyError):
            pass  # its death is noticed by reading

    def _compare(self, rank, subject, theirs):
        """Of rank 0: names the first facts that differ."""
        if subject not in self.facts:
            self.early.setdefault(subject, []).append((rank, theirs))
            return
        own = self.facts[subject]
        other = [f"{name} is {theirs[name]!r} here and {own[name]!r} on rank 0" for name in theirs
                 if name in own and theirs[name] != own[name]]
        if other:
            more = f" (and {len(other) - 3} more)" if len(other) > 3 else ""
            self._failed(0, rank, f"{'; '.join(other[:3])}{more}; expected the same on all ranks")

    def _failed(self, urgency, rank, message):
        """Of rank 0. urgency: 0, certain; 1, an error; 2, one that may follow from another rank's."""
        with self.lock:
            self.failures.append((urgency, rank, message))
            self.decide_at = self.decide_at or time.monotonic() + TOGETHER
            if urgency == 0 or len(self.failures) == self.world:
                self._decide()

    def _decide(self):
        _, rank, message = min(self.failures, key=lambda failure: failure[0])  # the first of the most urgent
        everyones = len({text for _, _, text in self.failures}) == 1 and len(self.failures) == self.world
        self._end(None if everyones else rank, message)

    def _end(self, rank, message):
        """Ends the job. rank: of whom to name, None: no one; all have the same to say."""
        if rank is not None:
            host = f" on {self.hosts[rank]}" if rank in self.hosts else ""
            message = f"rank {rank} of {self.world}{host}: {message}"
        # On each machine one speaks, and where rank 0 cannot, its neighbour.
        self._end_with(rank, message, self.local_rank == 0 or self.rank == 1)

    def _end_with(self, rank, text, speaks):
        with self.lock:
            if self.ending:  # what a rank that comes late has to say changes nothing
                return
            self.ending = True
            speaker = threading.Thread(target=self._say, args=(rank, text, speaks), daemon=True)
            speaker.start()
            if self.rank == 0:
                for peer in self.peers:
                    self._send(peer, end=[rank, text])
                self._tell_late(rank, text)
            speaker.join(5)  # of a terminal that takes nothing
            os._exit(2)

    def _tell_late(self, rank, text):
        """Of rank 0: those who have not come yet are told too; else they would think that rank 0 died."""
        last = time.monotonic() + LATE
        while len(self.hosts) < self.world and time.monotonic() < last:
            self.server.settimeout(max(last - time.monotonic(), 0.01))
            came = {*self.peers}
            with contextlib.suppress(OSError):
                self._accept()
            for peer in self.peers.keys() - came:
                self._send(peer, end=[rank, text])

    def _say(self, rank, text, speaks):
        _record(text)
        sys.stdout.flush()
        if speaks:
            print(f"error: {text}", file=sys.stderr, flush=True)
        if self.trace and rank in (self.rank, None):
            print(self.trace, file=sys.stderr, flush=True)

    # Whether the main thread moves

    def _look(self):
        if os.getppid() != self.parent:
            self._end(self.rank, "the process that started it, torchrun, ended")
        if self.decide_at is not None and time.monotonic() >= self.decide_at:
            self._decide()
        if time.monotonic() < self.look_at:
            return
        self.look_at = time.monotonic() + PERIOD  # looks are counted, not seconds: a machine may sleep
        stack = [(frame.f_code, frame.f_lasti) for frame in _frames()]
        self.still = self.still + 1 if stack == self.stack else 0
        self.stack = stack
        if self.asked_at is None and self.still * PERIOD > self.timeout * 60:
            if self.rank:
                self.asked_at = time.monotonic()
                self._send(0, stands=self._stands())
            else:
                self._stopped(0, self._stands())
        if self.asked_at is not None and time.monotonic() - self.asked_at > ANSWER:
            if self.rank:
                self._without_rank_0()
            else:
                self._blame()

    def _stopped(self, rank, stands):
        """Of rank 0: a rank stands still, or says where it stands. The first time all are asked."""
        self.answers[rank] = stands
        if self.asked_at is None:
            self.asked_at = time.monotonic()
            self.answers[0] = self._stands()
            for peer in self.peers:
                self._send(peer, where=True)
        if self.answers.keys() >= {0, *self.peers}:
            self._blame()

    def _without_rank_0(self):
        self._kill(0)
        self._end(0, f"does not answer, and rank {self.rank} {self._standing(self._stands())}")

    def _blame(self):
        silent = sorted({*self.peers} - self.answers.keys())
        for rank in silent:
            self._kill(rank)
        if silent:
            others = "; ".join(f"rank {rank} {self._standing(self.answers[rank])}" for rank in sorted(self.answers)[:4])
            self._end(silent[0], f"does not answer: stopped, or its machine is; {others}")
        # Who waits for others is not to blame; of the rest the one that has stood for longest.
        order = sorted(self.answers, key=lambda rank: (self.answers[rank]["waits"], -self.answers[rank]["seconds"]))
        others = "; ".join(f"rank {rank} {self._standing(self.answers[rank])}" for rank in order[1:4])
        self._end(order[0], f"{self._standing(self.answers[order[0]])}; {others}. "
                            f"Stopped because one stood for --timeout-minutes {self.timeout:g}")

    def _standing(self, stands):
        does = ("moves on, now" if stands["seconds"] < self.timeout * 30 else
                f"has waited for others for {stands['seconds']:.0f} s" if stands["waits"] else
                f"has stood for {stands['seconds']:.0f} s")
        return f"{does} at {stands['where']}"

    def _kill(self, rank):
        """A rank of this machine that cannot end itself; those of others are left to their torchrun."""
        process, torchrun = self.processes[rank]
        if torchrun is not None and torchrun == os.environ.get("GROUP_RANK"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def _stands(self):
        frames = _frames()
        own = next((frame for frame in frames if Path(frame.f_code.co_filename).is_relative_to(ROOT)), frames[0])
        place = ", called at ".join(f"{frame.f_code.co_filename.removeprefix(f'{ROOT}{os.sep}')}:{frame.f_lineno} "
                                    f"({frame.f_code.co_name})" for frame in dict.fromkeys((frames[0], own)))
        waits = frames[0].f_code.co_filename.replace(os.sep, "/")
        return {"where": place, "seconds": self.still * PERIOD, "waits": any(part in waits for part in WAITING)}


def _frames():
    """Of the main thread, innermost first."""
    frames, frame = [], sys._current_frames().get(threading.main_thread().ident)
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames


def _code():
    """Digest of the project's Python files."""
    digest = hashlib.sha256()
    for path in sorted([ROOT / "run.py", *(path for folder in ("eval", "train", "models", "kernels")
                                           for path in (ROOT / folder).rglob("*.py"))]):
        digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _record(text):
    """Where torchrun looks for what its table says about a rank."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        try:
            details = {"py_callstack": "", "timestamp": str(int(time.time()))}
            Path(path).write_text(json.dumps({"message": {"message": text, "extraInfo": details}}))
        except OSError:
            pass
