"""Faults by chance: which happen when is a pure function of the seed; carrying them out is `run`'s affair.

A fault has a beginning and an end. Roles are looked up when it begins: "primary" is whoever serves then, or did last,
"other" a node that doesn't; so one seed means one story whoever had to take over before, as far as the timing of
processes lets it. Whatever happened, in the end everything is healed, somebody has to serve, every copy has to come up
to date by itself, and the copies are compared.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.cluster.client import Load, Summary, regions_of
from tests.cluster.network import Network
from tests.cluster.nodes import CLIENT, VOLUME, Alone, Deployment, Diskless, Mirrored, Nodes, start_all
from tests.cluster.oracle import Oracle
from tests.cluster.server import WithServer

SIZE_BYTES: Final = 24 << 20
SETTLE_S: Final = 40.0
SERVED_WRITES: Final = 200
"""So many are answered in the end, which shows that clients find their way back."""
BY_ITSELF_S: Final = 5.0
"""So long a node that was primary before its restart may take until it is again; then somebody is promoted."""
PROFILES: Final[dict[str, Callable[[], Deployment]]] = {
    "alone": Alone,
    "two": Mirrored,
    "three": lambda: Mirrored(("a", "b", "c")),
    "server": WithServer,
    "etcd": lambda: Mirrored(arbiter="e"),
    "diskless": Diskless,
}
NODE_FAULTS: Final = ("kill", "pause", "restart", "crash")
ALL_FAULTS: Final = ("kill all", "crash all")
LINK_FAULTS: Final = ("cut", "cut one way", "delay", "loss")
ETCD_FAULTS: Final = ("kill etcd", "pause etcd", "cut etcd")
MOVES: Final = ("promote", "demote and promote", "hand over", "kill and promote")


@dataclass(frozen=True)
class Fault:
    """One, from `begin_s` for `length_s` seconds after the start."""

    kind: str
    begin_s: float
    length_s: float
    role: str
    """"primary" or "other": whom it happens to; of a link, one end."""
    end: str = ""
    """Of a link, the other end: a role, or the client's host."""
    amount: float = 0.0
    """Seconds of a delay, share of a loss; of a link that is cut one way, whether it is the way back."""

    def __str__(self) -> str:
        link = f" and {self.end}" if self.end else ""
        amount = f" ({self.amount:.2g})" if self.amount else ""
        return f"{self.begin_s:5.2f} s: {self.kind} {self.role}{link}{amount} for {self.length_s:.2f} s"


def plan(seed: int, nodes: int, seconds: float, *, etcd: bool = False) -> list[Fault]:
    """The faults of a seed, in order. Most begin when the one before has ended, some before that.

    `etcd`: with those of etcd, which other faults may meet: its begin while those before go on.
    """
    rng = random.Random(f"faults {seed} {nodes}")
    faults, at = [], rng.uniform(0.3, 0.8)
    while at < seconds:
        kinds = NODE_FAULTS * 2 + LINK_FAULTS + ((*MOVES, rng.choice(ALL_FAULTS)) if nodes > 1 else ())
        if etcd:
            kinds += ETCD_FAULTS * 2
        kind = rng.choice(kinds)
        length_s = rng.uniform(0.1, 0.25) if rng.random() < 0.3 else rng.uniform(0.3, 1.8)
        role = "primary" if nodes == 1 or rng.random() < 0.6 else "other"
        end, amount = "", 0.0
        if kind in ALL_FAULTS:
            role = "primary"
        elif kind in LINK_FAULTS:
            end = CLIENT if nodes == 1 or rng.random() < 0.25 else ("other" if role == "primary" else "primary")
            amount = {
                "delay": rng.choice([0.02, 0.1, 0.4]),
                "loss": rng.choice([0.02, 0.2]),
                "cut one way": float(rng.random() < 0.5),
            }.get(kind, 0.0)
        elif kind in MOVES:
            role = "other" if kind == "promote" else "primary"
        if kind in ETCD_FAULTS:
            length_s = rng.uniform(0.3, 3.0)
        faults.append(Fault(kind, at, length_s, role, end, amount))
        if kind in ETCD_FAULTS and rng.random() < 0.6:
            at += rng.uniform(0.05, 0.5)
            continue
        at += length_s * (rng.uniform(0.2, 0.9) if rng.random() < 0.2 else 1) + rng.uniform(0.1, 0.8)
    return faults


@dataclass
class Story:
    """What happened, for whoever has to understand a failure."""

    profile: str
    seed: int
    seconds: float
    began_s: float = field(default_factory=time.monotonic)
    lines: list[str] = field(default_factory=list)

    def tell(self, what: str) -> None:
        self.lines.append(f"{time.monotonic() - self.began_s:6.2f} s  {what}")

    @property
    def command(self) -> str:
        """What replays it."""
        return f"python -m tests.cluster --seed {self.seed} --profile '{self.profile}' --seconds {self.seconds:g}"


@dataclass(frozen=True)
class Outcome:
    """Of a run that kept every promise."""

    summary: Summary
    faults: int
    settled_s: float
    """From the last fault's end until every copy was up to date."""
    story: Story


def run(seed: int, profile: str, seconds: float, directory: Path) -> Outcome:
    """One run, in a directory that has nothing yet. Whatever it raises has the story, and how to replay it."""
    deployment = PROFILES[profile]()
    story = Story(profile, seed, seconds)
    nodes: Nodes | None = None
    try:
        arbiter = [deployment.arbiter] if deployment.arbiter is not None else []
        with contextlib.closing(deployment), Network([*deployment.names, CLIENT, *arbiter]) as network:
            nodes = Nodes(network, directory, deployment)
            with nodes:
                return _live(nodes, story)
    except Exception as error:
        logs = "" if nodes is None else "\n".join(f"--- log of {n.name}:\n{n.tail()}" for n in nodes.by_name.values())
        story.tell(f"failed: {error}")
        error.add_note("\n".join([*story.lines, logs, f"replay: {story.command}"]))
        raise


def _live(nodes: Nodes, story: Story) -> Outcome:
    nodes.deployment.create(nodes, SIZE_BYTES)
    oracle = Oracle(regions_of(SIZE_BYTES), story.seed)
    load = Load(nodes.network.host(CLIENT), nodes.addresses, VOLUME, oracle, story.seed)
    faults = plan(story.seed, len(nodes.names), story.seconds, etcd=nodes.etcd is not None)
    story.began_s = time.monotonic()
    load.start()
    _carry_out(nodes, faults, load, story)
    settled_s = settle(nodes, load, story)
    before = load.summary.writes

    def written() -> str | None:
        load.check()
        count = load.summary.writes - before
        return None if count >= SERVED_WRITES else f"{count} writes answered"

    nodes.wait_for("served", written, SETTLE_S)
    summary = load.stop()
    story.tell(str(summary))
    for node in nodes.by_name.values():
        status = node.stop()
        assert status == 0, f"the node {node.name} ended with {status}:\n{node.tail()}"
    nodes.check_logs()
    copies = {f"the copy of {name}": nodes.contents(name) for name in nodes.deployment.copies()}
    oracle.judge_copies(copies | dict(nodes.deployment.others()))
    return Outcome(summary, len(faults), settled_s, story)


def _carry_out(nodes: Nodes, faults: Sequence[Fault], load: Load, story: Story) -> None:
    """Begins and ends them in time, later where a node takes its time; looks after the load meanwhile."""
    began_s = time.monotonic()
    waiting = list(faults)
    running: list[tuple[float, Callable[[], None]]] = []
    while waiting or running:
        load.check()
        nodes.check()
        now = time.monotonic() - began_s
        for one in sorted(running, key=lambda one: one[0]):
            if one[0] <= now:
                running.remove(one)
                one[1]()
        if waiting and waiting[0].begin_s <= now:
            fault = waiting.pop(0)
            end = _begin(nodes, fault, story)
            if end is not None:
                running.append((now + fault.length_s, end))
        time.sleep(0.01)


def _begin(nodes: Nodes, fault: Fault, story: Story) -> Callable[[], None] | None:
    """Makes it happen; returns what ends it, or None if it can't happen now, or is over at once."""
    if fault.kind in ETCD_FAULTS:
        return _trouble_etcd(nodes, fault, story)
    name = _of_role(nodes, fault.role)
    if name is None:
        story.tell(f"no {fault.role} for: {fault}")
        return None
    node = nodes[name]
    if fault.kind in LINK_FAULTS:
        other = fault.end if fault.end == CLIENT else _of_role(nodes, fault.end)
        if other is None or other == name:
            return None
        return _break_link(nodes.network, fault, name, other, story)
    if not node.answers:
        story.tell(f"{name} is down or stands still, and so there is no: {fault}")
        return None

    def start_again() -> None:
        story.tell(f"start {name}, which takes {node.start():.2f} s")

    def resume() -> None:
        story.tell(f"resume {name}")
        node.resume()

    match fault.kind:
        case "kill" | "crash":
            story.tell(f"{fault.kind} {name}")
            node.kill()
            if fault.kind == "crash":
                node.new_boot()
            return start_again
        case "kill all" | "crash all":
            return _end_all(nodes, fault, story)
        case "pause":
            story.tell(f"pause {name}")
            node.pause()
            return resume
        case "restart":
            story.tell(f"stop {name}")
            status = node.stop()
            assert status == 0, f"the node {name} ended with {status}:\n{node.tail()}"
            start_again()
        case "promote":
            _told(story, f"promote {name}", nodes.deployment.promote(nodes, name))
        case "hand over":
            to = _of_role(nodes, "other")
            _told(story, f"hand over from {name} to {to}", nodes.deployment.demote(nodes, name, to))
        case "demote and promote":
            refused = nodes.deployment.demote(nodes, name)
            _told(story, f"demote {name}", refused)
            if refused is None:
                _promote_another(nodes, name, story)
        case "kill and promote":
            story.tell(f"kill {name}")
            node.kill()
            _promote_another(nodes, name, story)
            return start_again
    return None


def _end_all(nodes: Nodes, fault: Fault, story: Story) -> Callable[[], None]:
    """All that run end at once."""
    ended = [node for node in nodes.by_name.values() if node.alive()]
    story.tell(f"{fault.kind}: {', '.join(node.name for node in ended)}")
    for node in ended:
        node.kill()
        if fault.kind == "crash all":
            node.new_boot()

    def start_again() -> None:
        if fault.length_s > 1:  # at once, or one after the other
            story.tell("start all")
            start_all(ended)
        for node in reversed(ended):
            if not node.alive():
                story.tell(f"start {node.name}, which takes {node.start():.2f} s")

    return start_again


def _trouble_etcd(nodes: Nodes, fault: Fault, story: Story) -> Callable[[], None] | None:
    """etcd is away, for all or for one node."""
    etcd, host = nodes.etcd, nodes.deployment.arbiter
    assert etcd is not None and host is not None
    if fault.kind == "cut etcd":
        name = _of_role(nodes, fault.role)
        if name is None:
            return None
        story.tell(f"cut, {name} and etcd")
        nodes.network.cut(name, host, both=True)

        def join() -> None:
            story.tell(f"{name} and etcd are joined again")
            nodes.network.join(name, host, both=True)

        return join
    if etcd.process is None or etcd.paused:
        story.tell(f"etcd is away already, and so there is no: {fault}")
        return None
    story.tell(fault.kind)
    if fault.kind == "pause etcd":
        etcd.pause()
    else:
        etcd.kill()

    def end() -> None:
        _heal_etcd(nodes, story)

    return end


def _heal_etcd(nodes: Nodes, story: Story) -> None:
    etcd = nodes.etcd
    if etcd is not None and etcd.process is None:
        story.tell("start etcd")
        etcd.start(wait=False)
    elif etcd is not None and etcd.paused:
        story.tell("resume etcd")
        etcd.resume()


def _break_link(network: Network, fault: Fault, a: str, b: str, story: Story) -> Callable[[], None]:
    if fault.kind == "cut one way" and fault.amount:
        a, b = b, a
    story.tell(f"{fault.kind}, {a} and {b} {f'({fault.amount:.2g})' if fault.amount else ''}")
    match fault.kind:
        case "cut":
            network.cut(a, b, both=True)
        case "cut one way":
            network.cut(a, b)
        case "delay":
            network.delay(a, b, fault.amount, both=True)
        case "loss":
            network.lose(a, b, fault.amount, both=True)

    def end() -> None:
        story.tell(f"{a} and {b} are joined again")
        network.join(a, b, both=True)

    return end


def _promote_another(nodes: Nodes, than: str, story: Story) -> None:
    for other in nodes.answering():
        if other.name != than and other.name in nodes.deployment.servers():
            refused = nodes.deployment.promote(nodes, other.name)
            _told(story, f"promote {other.name}", refused)
            if refused is None:
                return


def _told(story: Story, what: str, refused: str | None) -> None:
    story.tell(f"{what}: {refused or 'done'}")


def _of_role(nodes: Nodes, role: str) -> str | None:
    """The node that has it now, also one that is down or stands still."""
    names = list(nodes.deployment.servers())
    primary = nodes.deployment.primary(nodes) or nodes.last_primary or names[0]
    nodes.last_primary = primary
    if role == "primary":
        return primary
    return next((name for name in names if name != primary), None)


def settle(nodes: Nodes, load: Load, story: Story) -> float:
    """Heals everything, lets somebody serve, and waits until every copy is up to date; in how many seconds."""
    start_s = time.monotonic()
    nodes.network.heal()
    for node in nodes.by_name.values():
        node.resume()
    _heal_etcd(nodes, story)

    def served() -> str | None:
        load.check()
        if nodes.deployment.primary(nodes) is not None:
            return None
        if time.monotonic() - start_s < BY_ITSELF_S and nodes.deployment.starting(nodes):
            return "a node is starting to"
        refusals = []
        for name in nodes.deployment.servers():
            refused = nodes.deployment.promote(nodes, name)
            _told(story, f"promote {name}", refused)
            if refused is None:
                return None
            refusals.append(f"{name}: {refused}")
        return "; ".join(refusals)

    nodes.wait_for("served by anybody", served, SETTLE_S)

    def whole() -> str | None:
        load.check()
        nodes.check()
        return nodes.deployment.whole(nodes)

    nodes.wait_for("whole", whole, SETTLE_S)
    settled_s = time.monotonic() - start_s
    story.tell(f"whole, {settled_s:.2f} s after everything was healed")
    return settled_s
