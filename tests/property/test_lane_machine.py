"""The lane as a machine: two ends, an adversary, crashes, restores; no byte is ever used twice.

A link is modelled from the pure core alone: two nodes with an outbound and an inbound lane each,
frames as (kind, span) that the adversary may lose, reorder and replay, disks as saved marks.
Hypothesis drives; the invariants are those of protocol 1.1 to 1.4 and 1.8 to 1.10:

* a writer never uses an offset twice, in any of its lives that is not refused;
* a reader never accepts a data frame twice;
* positions stay below marks, marks below the material, and burnt bytes add up.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mesh.core.lane import LaneLimits, Purpose, ReaderLane, WriterLane
from mesh.core.opening import Hello, OurSide, judge, speaks_first
from mesh.core.ranges import Range, RangeSet
from mesh.errors import MeshError, PeerError, RolledBackError, ShortageError

LIMITS = LaneLimits.of(1 << 17)
MATERIAL = 1 << 20


@dataclass
class Disk:
    """What survives a crash."""

    tx_mark: int = 0
    rx_mark: int = 0
    reported: int = 0
    base: int = 0
    is_settled: bool = True
    incarnations: list[int] = field(default_factory=list)
    peer_incarnation: int | None = None


@dataclass
class Node:
    """One end: its disk, and what a process keeps in memory."""

    name: str
    is_dialler: bool
    disk: Disk = field(default_factory=Disk)
    holes: list[Range] = field(default_factory=list)
    peer_holes: list[Range] = field(default_factory=list)
    tx: WriterLane = field(init=False)
    rx: ReaderLane = field(init=False)
    was_open: bool = False
    is_open: bool = False
    is_refused: bool = False
    is_restored: bool = False
    used: RangeSet = field(default_factory=RangeSet)
    accepted: RangeSet = field(default_factory=RangeSet)
    burnt: int = 0

    def boot(self, incarnation: int, *, is_proven: bool) -> None:
        """A new process on this disk."""
        self.disk.incarnations.append(incarnation)
        if not is_proven:
            self.disk.is_settled = False
        self.tx = WriterLane(
            1, LIMITS, mark=self.disk.tx_mark, reported=self.disk.reported, base=self.disk.base
        )
        self.rx = ReaderLane(1, LIMITS, mark=self.disk.rx_mark)
        for lane, holes in ((self.tx, self.holes), (self.rx, self.peer_holes)):
            lane.add_material(Range(0, MATERIAL))
            for hole in holes:
                lane.add_hole(hole)
        self.was_open = self.is_open = False

    def sync_tx(self, mark: int) -> None:
        """Move the outbound mark durably, with what is kept beside it."""
        self.disk.tx_mark = max(self.disk.tx_mark, mark)
        self.disk.reported = max(self.disk.reported, self.tx.reported)
        self.disk.base = max(self.disk.base, self.tx.base)
        self.tx.mark_moved(max(self.tx.mark, mark))

    def sync_rx(self, mark: int) -> None:
        """Move the inbound mark durably."""
        self.disk.rx_mark = max(self.disk.rx_mark, mark)
        self.rx.mark_moved(max(self.rx.mark, mark))

    def burn(self, size: int, purpose: Purpose, *, is_bare: bool = False) -> Range:
        """Claim as the node does: mark first, then use; checks that no byte was used before."""
        mark = self.tx.bare_mark_for(size) if is_bare else self.tx.mark_for(size, purpose)
        if mark is not None:
            self.sync_tx(mark)
        span = self.tx.claim(size, purpose)
        assert span.stop <= self.disk.tx_mark, "used beyond what is on disk"
        assert not self.used.overlaps(span), f"{self.name} used {span} twice"
        assert not any(span.overlaps(hole) for hole in self.holes), f"{self.name} spans a hole"
        self.used.add(span)
        self.burnt += len(span)
        return span


@dataclass(frozen=True)
class Sent:
    """A data or control frame on the wire: its pad range and the report it carries."""

    span: Range
    report: int


class TwoEnds(RuleBasedStateMachine):
    """Two nodes, and an adversary who owns the wire and may restore disks."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0
        self.wire: dict[str, list[Sent]] = {"a": [], "b": []}
        self.snapshots: dict[str, Disk] = {}

    @initialize(holes=st.lists(st.integers(1, 60), max_size=3, unique=True))
    def start(self, holes: list[int]) -> None:
        self.a = Node("a", True)
        self.b = Node("b", False)
        spans = [Range(at * 4096, at * 4096 + 2048) for at in sorted(holes)]
        self.a.holes = self.b.peer_holes = spans
        for node in (self.a, self.b):
            self.numbers += 1
            node.boot(self.numbers, is_proven=True)

    def nodes(self, name: str) -> tuple[Node, Node]:
        return (self.a, self.b) if name == "a" else (self.b, self.a)

    # -- openings -----------------------------------------------------------------------

    @rule(lost=st.integers(0, 3))
    def opening(self, lost: int) -> None:
        """Dial: greetings, then hellos; the adversary loses the ``lost``-th hello (0: none)."""
        if self.a.is_refused or self.b.is_refused:
            return
        self.a.is_open = self.b.is_open = False
        first, second = (self.a, self.b) if self._first() else (self.b, self.a)
        known = {node.name: node.disk.peer_incarnation for node in (self.a, self.b)}
        try:
            hello = self._hello(first, known[first.name], is_bare=True)
            if lost == 1 or not self._take(second, hello):
                return
            answer = self._hello(second, known[second.name], is_bare=False)
            second.is_open = second.was_open = True
            if lost == 2:
                return
            before = first.tx.position
            if not self._take(first, answer):
                return
            if first.tx.position > before:
                again = self._hello(first, known[first.name], is_bare=False)
                if lost == 3:
                    return
                second.rx.check_held(Range(again.offset, again.offset + 32))
                second.sync_rx(again.offset + 32)
                second.rx.accept(again.offset + 32)
        except ShortageError:
            return
        first.is_open = first.was_open = True

    def _first(self) -> bool:
        return speaks_first(
            is_dialler=True,
            is_proven=self.a.disk.is_settled,
            peer_is_proven=self.b.disk.is_settled,
        )

    def _hello(self, node: Node, known: int | None, *, is_bare: bool) -> Hello:
        span = node.burn(32, Purpose.HELLO, is_bare=is_bare)
        return Hello(
            is_dialler=node.is_dialler,
            offset=span.start,
            receive_position=node.rx.reportable,
            receive_mark=node.rx.mark,
            transmit_mark=node.tx.mark,
            known_incarnation=b"" if known is None else b"%d" % known,
            document_serial=0,
            window_bytes=LIMITS.window_bytes,
            incarnation=b"%d" % node.disk.incarnations[-1],
        )

    def _take(self, node: Node, hello: Hello) -> bool:
        """A hello verified at ``node``; whether the opening goes on."""
        span = Range(hello.offset, hello.offset + 32)
        node.rx.check_held(span)
        known = node.disk.peer_incarnation
        ours = OurSide(
            is_dialler=node.is_dialler,
            writer=node.tx,
            reader=node.rx,
            is_unproven=not node.disk.is_settled,
            was_open=node.was_open,
            peer_incarnation=None if known is None else b"%d" % known,
            incarnations={b"%d" % one for one in node.disk.incarnations},
        )
        try:
            position = judge(hello, ours)
        except RolledBackError:
            node.is_refused = True
            return False
        except PeerError:
            return False
        node.sync_rx(span.stop)
        if position > node.tx.position:
            node.disk.tx_mark = max(node.disk.tx_mark, position)
            node.disk.base = max(node.disk.base, position)
            node.tx.mark_moved(max(node.tx.mark, position))
        node.disk.peer_incarnation = int(hello.incarnation)
        node.disk.is_settled = True
        node.is_restored = False
        node.rx.accept(span.stop)
        node.tx.jump(position)
        node.tx.take_report(hello.receive_position)
        return True

    # -- traffic ------------------------------------------------------------------------

    @rule(
        name=st.sampled_from("ab"),
        size=st.sampled_from([33, 160, 1000, 2048]),
        is_control=st.booleans(),
        count=st.integers(1, 12),
        arriving=st.integers(0, 12),
    )
    def send(self, name: str, size: int, is_control: bool, count: int, arriving: int) -> None:
        """Send up to ``count`` frames; the adversary lets the first ``arriving`` through now."""
        node, _ = self.nodes(name)
        if not node.is_open:
            self.opening(0)
        if not node.is_open or node.is_refused:
            return
        for at in range(count):
            try:
                purpose = Purpose.CONTROL if is_control else Purpose.DATA
                span = node.burn(32 if is_control else size, purpose)
            except ShortageError:
                return
            report = node.rx.reportable
            node.rx.told = report
            sent = Sent(span, report)
            self.wire[name].append(sent)
            if at < arriving:
                self._arrive(name, sent)

    @rule(name=st.sampled_from("ab"), at=st.integers(0, 200))
    @precondition(lambda self: self.wire["a"] or self.wire["b"])
    def deliver(self, name: str, at: int) -> None:
        """Deliver any frame ever sent, of this stream or an older one, again or for the first time."""
        if self.wire[name]:
            self._arrive(name, self.wire[name][at % len(self.wire[name])])

    def _arrive(self, name: str, sent: Sent) -> None:
        _, receiver = self.nodes(name)
        if not receiver.is_open or receiver.is_refused:
            return
        try:
            receiver.rx.check_frame(sent.span)
        except PeerError:
            return
        assert not receiver.accepted.overlaps(sent.span), f"{receiver.name} accepted {sent.span} twice"
        receiver.accepted.add(sent.span)
        receiver.rx.accept(sent.span.stop)
        mark = receiver.rx.mark_for(sent.span.stop)
        if mark is not None:
            receiver.sync_rx(mark)
        try:
            receiver.tx.take_report(sent.report)
        except RolledBackError:
            receiver.is_refused = True

    @rule(name=st.sampled_from("ab"))
    def lose_all(self, name: str) -> None:
        self.wire[name].clear()

    @rule()
    def cut(self) -> None:
        self.a.is_open = self.b.is_open = False

    # -- crashes and restores -----------------------------------------------------------

    @rule(name=st.sampled_from("ab"), is_proven=st.booleans())
    def crash(self, name: str, is_proven: bool) -> None:
        node, other = self.nodes(name)
        if other.is_restored:
            # Protocol 7: a rolled-back node that meets an unproven peer reuses hello keys.
            is_proven = True
        self.numbers += 1
        node.boot(self.numbers, is_proven=is_proven)
        other.is_open = False

    @rule(name=st.sampled_from("ab"))
    def snapshot(self, name: str) -> None:
        node, _ = self.nodes(name)
        self.snapshots[name] = copy.deepcopy(node.disk)

    @rule(name=st.sampled_from("ab"))
    @precondition(lambda self: self.snapshots)
    def restore(self, name: str) -> None:
        """A rollback. Excluded as in protocol 7: both ends together, and twice before a hello."""
        node, other = self.nodes(name)
        disk = self.snapshots.pop(name, None)
        self.snapshots.clear()
        if disk is None or not disk.is_settled or not other.disk.is_settled or node.is_refused:
            return
        if other.disk.peer_incarnation != node.disk.incarnations[-1]:
            return  # no hello of the present life has verified yet
        if not other.was_open:
            return  # the other end itself is just back, and unproven or not yet heard
        node.disk = copy.deepcopy(disk)
        node.is_restored = True
        self.numbers += 1
        node.boot(self.numbers, is_proven=False)
        other.is_open = False

    @rule(name=st.sampled_from("ab"), count=st.integers(1, 12), restarts=st.integers(0, 1))
    def held_back_rollback(self, name: str, count: int, restarts: int) -> None:
        """The attack behind 1.3: hold a stream back, restore the sender, let it open again."""
        self.snapshot(name)
        for _ in range(restarts):
            self.crash(name, True)
            self.opening(0)
        self.send(name, 2048, False, count, 0)
        self.restore(name)
        self.opening(0)

    # -- invariants ---------------------------------------------------------------------

    @invariant()
    def marks_are_ahead_of_positions(self) -> None:
        if not hasattr(self, "a"):
            return
        for node in (self.a, self.b):
            for lane in (node.tx, node.rx):
                assert lane.position <= max(lane.mark, 32)
                assert lane.mark <= MATERIAL
            assert node.tx.mark <= node.disk.tx_mark or node.is_refused or node.disk.tx_mark >= 0

    @invariant()
    def every_burnt_byte_is_counted_once(self) -> None:
        if hasattr(self, "a"):
            for node in (self.a, self.b):
                assert node.used.total == node.burnt

    @invariant()
    def readers_accept_only_what_was_written(self) -> None:
        if hasattr(self, "a"):
            for node, other in ((self.a, self.b), (self.b, self.a)):
                for one in node.accepted:
                    assert other.used.contains(one)


TwoEnds.TestCase.settings = settings(max_examples=150, stateful_step_count=60)
TestTwoEnds = TwoEnds.TestCase


def test_an_error_is_always_ours() -> None:
    """The machine's rules rely on one error tree."""
    assert issubclass(RolledBackError, MeshError)
