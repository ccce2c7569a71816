"""Metrics of nodes and mirrors, in the text format that Prometheus reads.

`Metrics.text` gathers what there is at that moment from the objects that count; nothing is counted here. Names follow
Prometheus' conventions: a unit at the end, `_total` for what only grows (from zero again after a restart, and for a
mirror's counters whenever its node becomes primary).

Labels are bounded by what an operator has made: `volume`, the `node` of a leg (of one on an NBD server its URI; at most
four a mirror), `peer`, and `state`, of which each has a fixed list and exactly one is 1. Nothing that clients choose is
a label.

What only the primary knows of a mirror is there only on its primary; so a sum over all nodes counts nothing twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from replication.leg import LegState, MirrorState
from replication.members import LegStatus, MirrorStatus
from terrace.localmirror import LocalMirror
from terrace.mirrors import Mirrors
from terrace.peers import PeerState
from terrace.primary import MirrorPart

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
Family = GaugeMetricFamily | CounterMetricFamily


class _Families:
    """By name, in the order in which they came."""

    def __init__(self) -> None:
        self.all: dict[str, Family] = {}

    def gauge(self, name: str, help_text: str, value: float, **labels: str) -> None:
        self._add(GaugeMetricFamily, name, help_text, value, labels)

    def counter(self, name: str, help_text: str, value: float, **labels: str) -> None:
        """`name` without `_total`."""
        self._add(CounterMetricFamily, name, help_text, value, labels)

    def states(self, name: str, help_text: str, states: Iterable[str], now: str, **labels: str) -> None:
        for state in states:
            self.gauge(name, help_text, float(state == now), **labels, state=state)

    def _add(self, kind: Any, name: str, help_text: str, value: float, labels: dict[str, str]) -> None:
        if name not in self.all:
            self.all[name] = kind(name, help_text, labels=list(labels))
        self.all[name].add_metric(list(labels.values()), value)


class Metrics(Collector):
    """See the module."""

    def __init__(self, mirrors: Mirrors) -> None:
        self._mirrors = mirrors

    def text(self) -> bytes:
        """All of it, now."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        return generate_latest(registry)

    def describe(self) -> Iterator[Family]:
        """Nothing: what there is, is asked for once only."""
        return iter(())

    def collect(self) -> Iterator[Family]:
        """For the registry."""
        families = _Families()
        version = str(self._mirrors.peers.hello()["version"])
        families.gauge("terrace_info", "The daemon that answers.", 1.0, version=version)
        self._peers(families)
        for mirror in self._mirrors.all():
            _here(families, mirror)
            served = mirror.mirror
            if served is not None and mirror.serves:
                _mirror(families, mirror.name, served.status())
        return iter(families.all.values())

    def _peers(self, families: _Families) -> None:
        peers = self._mirrors.peers
        for name, peer in sorted(peers.peers.items()):
            up = float(peer.state is PeerState.ONLINE)
            families.gauge("terrace_peer_up", "Whether this node is connected to that one.", up, peer=name)
            traffic = peers.traffic[name]
            for word, count in (("sent", traffic.sent_bytes), ("received", traffic.received_bytes)):
                what = f"Bytes {word} between this node and that one, calls and legs, without what TLS adds."
                families.counter(f"terrace_peer_{word}_bytes", what, count, peer=name)


def _here(families: _Families, mirror: MirrorPart) -> None:
    """What a node knows by itself, primary or not."""
    volume = mirror.name
    families.gauge(
        "terrace_mirror_primary", "Whether this node serves the mirror.", float(mirror.serves), volume=volume
    )
    if mirror.accepted is not None:
        newest = mirror.membership
        families.gauge("terrace_mirror_term", "The term as this node knows it.", newest.term.number, volume=volume)
        what = "The number of the record in its term, as this node knows it."
        families.gauge("terrace_mirror_epoch", what, newest.epoch, volume=volume)
    if not isinstance(mirror, LocalMirror):
        return
    what = "Damaged blocks of the leg here that its own scrub has had from another leg."
    families.counter("terrace_leg_mended_blocks", what, mirror.volume.healed_blocks, volume=volume)
    mender = mirror.volume.elsewhere
    damage = getattr(mender, "damage", None)
    if damage is not None:
        what = "Extents of 64 KiB of the leg here with damage that waits for the primary to heal it."
        families.gauge("terrace_leg_damaged_extents", what, damage.extents, volume=volume)


def _mirror(families: _Families, volume: str, status: MirrorStatus) -> None:
    """What its primary knows."""
    states = [state.value for state in MirrorState if state is not MirrorState.UNKNOWN]  # which a primary never is
    families.states("terrace_mirror_state", "What the mirror can do.", states, status.state.value, volume=volume)
    gauges: tuple[tuple[str, str, float], ...] = (
        ("terrace_mirror_in_flight", "Batches of writes that aren't on all legs yet.", status.in_flight),
        ("terrace_mirror_waiting", "Whether writes wait now.", float(status.waiting is not None)),
        (
            "terrace_mirror_longest_wait_seconds",
            "How long writes ever waited, for a record, or for the slowest leg.",
            status.longest_wait_s,
        ),
        (
            "terrace_mirror_common_flush_age_seconds",
            "Since all legs had flushed last; 0 if nothing was written since.",
            status.flush_age_s or 0.0,
        ),
        ("terrace_mirror_unmendable_blocks", "Blocks that no leg can read.", status.unmendable_blocks),
    )
    for name, what, value in gauges:
        families.gauge(name, what, value, volume=volume)
    what = "Time in which writes waited at the gate."
    families.counter("terrace_mirror_waited_seconds", what, status.waited_s, volume=volume)
    for leg in status.legs:
        _leg(families, volume, leg, in_sync=leg.info.id in status.membership.in_sync)


_COUNTERS: Final = (
    ("reads", "reads", "Reads of clients that the leg has answered."),
    ("read_bytes", "read_bytes", "Bytes of these."),
    ("read_errors", "read_errors", "Reads that it couldn't answer, and another leg had to."),
    ("writes", "writes", "Batches of writes and trims that it was given."),
    ("written_bytes", "written_bytes", "Bytes of these."),
    ("healed_blocks", "healed_blocks", "Blocks that it couldn't read, and that were written anew from another leg."),
    ("failures", "exclusions", "How often it was left behind, because it failed or was silent for too long."),
    ("resyncs", "resyncs", "How often it began to be brought up to date."),
)


def _leg(families: _Families, volume: str, leg: LegStatus, *, in_sync: bool) -> None:
    # Not the node of one on an NBD server, which is that of who added it, and has a leg of its own.
    labels = {"volume": volume, "node": leg.info.place}
    state = LegState.STALE if leg.state is LegState.OFFLINE and not in_sync else leg.state
    states = [one.value for one in LegState]
    families.states("terrace_mirror_leg_state", "What the leg is worth.", states, state.value, **labels)
    progress = leg.resync if leg.state is LegState.SYNCING else None
    left = 0 if progress is None else max(0, progress.total_bytes - progress.done_bytes)
    rate = 0.0 if progress is None else progress.rate_bytes_s
    families.gauge("terrace_mirror_leg_queued_bytes", "Written, and not on the leg yet.", leg.queued_bytes, **labels)
    families.gauge("terrace_mirror_leg_to_sync_bytes", "Left of the resync that is under way.", left, **labels)
    families.gauge("terrace_mirror_leg_sync_bytes_per_second", "The rate of that resync.", rate, **labels)
    for attribute, name, what in _COUNTERS:
        families.counter(f"terrace_mirror_leg_{name}", what, getattr(leg.counters, attribute), **labels)
