"""Snapshots as operators meet them: the API's answers, the commands' words, and their refusals. On fake pools."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from terrace.snapshots import meant, named, safety_name
from tests.system.daemon import ApiError
from tests.system.nbdclient import OPT_LIST, Connection, Refused, connect, greet, option
from tests.terrace.fakedaemon import FakeDaemon
from tests.terrace.test_cli import Cli, on_a_terminal

VOLUMES = "/v1/pools/p/volumes"
OLD, NEW = b"\x11" * 4096, b"\x22" * 4096


@pytest.fixture
def cli(daemon: FakeDaemon) -> Cli:
    return Cli(daemon.home)


@pytest.fixture
def volume(daemon: FakeDaemon) -> Iterator[str]:
    """`p/v`, which begins with OLD, with a snapshot `monday`; and `p/w`."""
    for name in "vw":
        daemon.api("POST", VOLUMES, {"name": name, "size": "1M"})
    write(daemon, "p/v", OLD)
    daemon.api("POST", "/v1/pools/p/snapshots", {"name": "monday", "volumes": ["v"]})
    yield "p/v"
    for held in daemon.api("GET", "/v1/pools/p/snapshots"):
        daemon.api("PATCH", f"{VOLUMES}/{held['volume'][2:]}/snapshots/{held['snapshot']}", {"held": False})
    for found in daemon.api("GET", VOLUMES):
        wait_until_unused(daemon, found["name"])
        daemon.api("DELETE", f"{VOLUMES}/{found['name'][2:]}?snapshots=1")


def write(daemon: FakeDaemon, export: str, data: bytes) -> None:
    with Connection(daemon.socket, export) as connection:
        connection.write(0, data)
        connection.disconnect()
    wait_until_unused(daemon, export)


def wait_until_unused(daemon: FakeDaemon, export: str) -> None:
    while any(one["export"] == export for one in daemon.api("GET", "/v1/status")["nbd"]["connections"]):
        time.sleep(0.01)


def read(daemon: FakeDaemon, export: str) -> bytes:
    with Connection(daemon.socket, export) as connection:
        data = connection.read(0, 4096)
    wait_until_unused(daemon, export)
    return data


def refusal(daemon: FakeDaemon, method: str, path: str, body: object = None) -> ApiError:
    with pytest.raises(ApiError) as error:
        daemon.api(method, path, body)
    return error.value


# -- what is pure --------------------------------------------------------------------------------------------


def test_a_safety_snapshot_has_the_time_in_its_name_and_never_that_of_another() -> None:
    first = safety_name(1.8e9, set())
    assert re.fullmatch(r"before-rollback-\d{8}-\d{6}", first)
    assert safety_name(1.8e9, {first}) == f"{first}-2"
    assert safety_name(1.8e9, {first, f"{first}-2"}) == f"{first}-3"


def test_of_a_thousand_names_the_nearest_of_the_newest_is_meant() -> None:
    names = [f"hourly-{number:04}" for number in range(1000)] + ["monday"]
    assert meant("mondya", names) == "monday"
    assert meant("xyz", names) is None


@pytest.mark.parametrize(
    ("clients", "text"),
    [
        (["a"], "a"),
        (["a", "b"], "a and b"),
        (["a", "b", "c"], "a, b and c"),
        ([*"abcdefg"], "a, b, c, d, e and 2 more"),
    ],
)
def test_clients_are_named_and_of_many_the_first(clients: list[str], text: str) -> None:
    assert named(clients) == text


# -- the API -------------------------------------------------------------------------------------------------


def test_a_group_is_taken_as_a_whole_or_not_at_all(daemon: FakeDaemon, volume: str) -> None:
    taken = daemon.api("POST", "/v1/pools/p/snapshots", {"name": "g", "volumes": ["w", "v"]})
    assert [one["name"] for one in taken] == ["p/w@g", "p/v@g"]
    error = refusal(daemon, "POST", "/v1/pools/p/snapshots", {"name": "monday", "volumes": ["w", "v"]})
    assert (error.status, error.errno) == (409, "EEXIST")
    assert "p/v@monday" in error.message
    assert [one["name"] for one in daemon.api("GET", f"{VOLUMES}/w/snapshots")] == ["p/w@g"]
    assert len(daemon.api("GET", "/v1/pools/p/snapshots")) == 3


def test_a_snapshot_lives_from_creation_over_its_renaming_to_deletion(daemon: FakeDaemon, volume: str) -> None:
    path = f"{VOLUMES}/v/snapshots"
    shown = daemon.api("GET", f"{path}/monday")
    assert shown == {"name": "p/v@monday", "volume": "p/v", "held": False, "clones": []} | shown
    assert daemon.api("GET", path) == [shown]
    assert daemon.api("GET", f"{VOLUMES}/v")["snapshots"] == 1
    changed = daemon.api("PATCH", f"{path}/monday", {"name": "tuesday", "held": True})
    assert (changed["name"], changed["held"]) == ("p/v@tuesday", True)
    assert refusal(daemon, "DELETE", f"{path}/tuesday").errno == "EBUSY"
    daemon.api("PATCH", f"{path}/tuesday", {"held": False})
    gone = daemon.api("DELETE", f"{path}/tuesday")
    assert gone == {"deleted": "p/v@tuesday", "freed_bytes": shown["exclusive_bytes"], "clones": [], "left": []}
    assert daemon.api("GET", path) == []


def test_a_clone_is_a_volume_with_an_origin_and_the_policy_of_its_origins_volume(
    daemon: FakeDaemon, volume: str
) -> None:
    made = daemon.api("POST", f"{VOLUMES}/v/snapshots/monday/clone", {"name": "c"})
    assert (made["name"], made["origin"], made["policy"]) == ("p/c", "p/v@monday", "default")
    assert read(daemon, "p/c") == OLD
    gone = daemon.api("DELETE", f"{VOLUMES}/v/snapshots/monday")
    assert (gone["freed_bytes"], gone["clones"]) == (0, ["p/c"])


def test_a_rollback_keeps_what_was_unless_told_not_to(daemon: FakeDaemon, volume: str) -> None:
    path = f"{VOLUMES}/v/snapshots/monday/rollback"
    write(daemon, "p/v", NEW)
    done = daemon.api("POST", path)
    assert done["kept_as"].startswith("p/v@before-rollback-")
    assert (done["snapshot"], done["cut_off"], done["volume"]["name"]) == ("p/v@monday", [], "p/v")
    assert (read(daemon, "p/v"), read(daemon, done["kept_as"])) == (OLD, NEW)
    assert daemon.api("POST", path, {"keep_as": "mine"})["kept_as"] == "p/v@mine"
    assert daemon.api("POST", path, {"safety": False})["kept_as"] is None
    assert refusal(daemon, "POST", path, {"keep_as": "x", "safety": False}).errno == "EINVAL"
    assert refusal(daemon, "POST", path, {"keep_as": "mine"}).errno == "EEXIST"


def test_rollbacks_of_one_moment_keep_what_was_under_names_of_their_own(daemon: FakeDaemon, volume: str) -> None:
    path = f"{VOLUMES}/v/snapshots/monday/rollback"
    with ThreadPoolExecutor(8) as clients:
        kept = list(clients.map(lambda _: daemon.api("POST", path)["kept_as"], range(8)))
    assert len(set(kept)) == 8


def test_a_pool_with_a_held_snapshot_is_not_deleted(daemon: FakeDaemon, cli: Cli, volume: str) -> None:
    cli.ok("snapshot", "create", "p/v@tuesday")
    cli.ok("snapshot", "hold", "p/v@tuesday")
    assert "p/v@tuesday can't be deleted, being held: release" in cli.error("pool", "delete", "p", "--yes")
    cli.ok("snapshot", "hold", "p/v@monday")
    assert "p/v@monday and 1 more snapshot can't" in cli.error("pool", "delete", "p", "--yes")
    assert read(daemon, "p/v@tuesday") == OLD


def test_operators_hear_of_what_happened_to_snapshots(daemon: FakeDaemon, volume: str) -> None:
    before = daemon.api("GET", "/v1/events")[-1]["number"]
    daemon.api("POST", "/v1/pools/p/snapshots", {"name": "g", "volumes": ["v", "w"]})
    daemon.api("POST", f"{VOLUMES}/v/snapshots/g/rollback", {"keep_as": "was"})
    daemon.api("POST", f"{VOLUMES}/v/snapshots/g/clone", {"name": "c"})
    daemon.api("DELETE", f"{VOLUMES}/w/snapshots/g")
    daemon.api("DELETE", f"{VOLUMES}/v?snapshots=1")
    assert [(event["kind"], event["text"]) for event in daemon.api("GET", f"/v1/events?after={before}")] == [
        ("snapshot", "p/v@g, p/w@g were taken"),
        ("snapshot", "volume p/v was rolled back to p/v@g; what it was before is p/v@was"),
        ("snapshot", "volume p/c was made as a clone of p/v@g"),
        ("snapshot", "snapshot p/w@g was deleted"),
        ("snapshot", "volume p/v was deleted with its 3 snapshot(s)"),
    ]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "words"),
    [
        ("GET", "v/snapshots/mondya", None, 404, "did you mean 'monday'"),
        ("GET", "v/snapshots/xyz", None, 404, "no snapshot 'xyz'"),
        ("GET", "none/snapshots", None, 404, "none"),
        ("GET", "none/snapshots/s", None, 404, "none"),
        ("DELETE", "v/snapshots/mondya", None, 404, "did you mean 'monday'"),
        ("POST", "v/snapshots/mondya/rollback", {}, 404, "did you mean 'monday'"),
        ("POST", "v/snapshots/mondya/clone", {"name": "c"}, 404, "did you mean 'monday'"),
        ("POST", "v/snapshots/monday/clone", {"name": "w"}, 409, "p/w"),
        ("POST", "v/snapshots/monday/clone", {"name": "a@b"}, 400, "can't name a volume"),
        ("POST", "v/snapshots/monday/clone", {"name": "c", "policy": "none"}, 404, "none"),
        ("POST", "v/snapshots/monday/clone", {}, 400, "name"),
        ("POST", "v/snapshots/monday/rollback", {"keep_as": "a@b"}, 400, "can't name a snapshot"),
        ("PATCH", "v/snapshots/monday", {"name": "a/b"}, 400, "can't name a snapshot"),
        ("PATCH", "v/snapshots/monday", {"hold": True}, 400, "hold"),
        ("DELETE", "v", None, 409, "1 snapshot"),
    ],
)
def test_what_can_not_be_is_refused_with_a_word_that_helps(
    daemon: FakeDaemon, volume: str, method: str, path: str, body: object, status: int, words: str
) -> None:
    error = refusal(daemon, method, f"{VOLUMES}/{path}", body)
    assert error.status == status
    assert words in error.message


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"name": "s"},
        {"name": "s", "volumes": []},
        {"name": "a@b", "volumes": ["v"]},
        {"name": "", "volumes": ["v"]},
        {"name": "x" * 300, "volumes": ["v"]},
        {"name": "s", "volumes": ["v", "v"]},
        {"name": "s", "volumes": "v"},
        {"name": 7, "volumes": ["v"]},
    ],
    ids=repr,
)
def test_the_api_takes_no_snapshot_that_has_no_sense(daemon: FakeDaemon, volume: str, body: object) -> None:
    assert refusal(daemon, "POST", "/v1/pools/p/snapshots", body).errno == "EINVAL"
    assert len(daemon.api("GET", "/v1/pools/p/snapshots")) == 1


def test_what_is_in_use_is_left_alone_and_its_clients_are_named(daemon: FakeDaemon, volume: str) -> None:
    address = ("127.0.0.1", daemon.port)
    with Connection(address, "p/v") as live, Connection(address, "p/v@monday") as reader:
        peers = ["{}:{}".format(*connection.socket.getsockname()) for connection in (live, reader)]
        for method, path, peer in (
            ("POST", "v/snapshots/monday/rollback", peers[0]),
            ("DELETE", "v/snapshots/monday", peers[1]),
            ("DELETE", "v?snapshots=1", peers[0]),
        ):
            error = refusal(daemon, method, f"{VOLUMES}/{path}")
            assert (error.status, error.errno) == (409, "EBUSY")
            assert f"is in use by {peer} and can't be" in error.message
        assert "--force" in refusal(daemon, "POST", f"{VOLUMES}/v/snapshots/monday/rollback").message
        assert "p/v@monday" in refusal(daemon, "DELETE", "/v1/pools/p").message
        live.disconnect()
        wait_until_unused(daemon, "p/v")
        assert "p/v@monday" in refusal(daemon, "DELETE", "/v1/pools/p").message


# -- exports -------------------------------------------------------------------------------------------------


def listed(daemon: FakeDaemon) -> list[str]:
    raw = connect(daemon.socket)
    with raw:
        greet(raw)
        return [
            payload[4 : 4 + int.from_bytes(payload[:4], "big")].decode() for _, payload in option(raw, OPT_LIST, b"")
        ]


def test_a_snapshot_is_an_export_that_can_be_read_and_not_written(daemon: FakeDaemon, volume: str) -> None:
    write(daemon, "p/v", NEW)
    with Connection(daemon.socket, "p/v@monday") as connection:
        assert connection.flags & 2  # NBD_FLAG_READ_ONLY
        assert connection.read(0, 4096) == OLD
        with pytest.raises(OSError, match="not permitted"):
            connection.write(0, NEW)
        assert daemon.api("GET", f"{VOLUMES}/v/snapshots/monday")["open_count"] == 1
    wait_until_unused(daemon, "p/v@monday")
    assert daemon.api("GET", f"{VOLUMES}/v/snapshots/monday")["open_count"] == 0


@pytest.mark.parametrize("name", ["p/v@none", "p/v@", "p/none@monday", "p@monday", "p/@monday", "@", "p/v@monday@x"])
def test_an_export_that_is_none_is_refused_by_name(daemon: FakeDaemon, volume: str, name: str) -> None:
    with pytest.raises(Refused) as error:
        Connection(daemon.socket, name)
    assert error.value.code == 6  # NBD_REP_ERR_UNKNOWN
    assert "no " in str(error.value)


def test_the_only_volume_is_the_default_however_many_snapshots_it_has(daemon: FakeDaemon, volume: str) -> None:
    daemon.api("DELETE", f"{VOLUMES}/w")
    assert read(daemon, "") == OLD


def test_a_list_has_all_volumes_and_the_newest_snapshots(daemon: FakeDaemon, volume: str) -> None:
    assert listed(daemon) == ["p/v", "p/v@monday", "p/w"]
    for number in range(70):
        daemon.api("POST", "/v1/pools/p/snapshots", {"name": f"s{number}", "volumes": ["w"]})
    assert listed(daemon) == ["p/v", "p/w", *(f"p/w@s{number}" for number in range(6, 70))]
    assert read(daemon, "p/v@monday") == OLD


# -- the command line ----------------------------------------------------------------------------------------


def test_the_commands_take_show_change_and_delete_snapshots(daemon: FakeDaemon, cli: Cli, volume: str) -> None:
    assert "p/v@tuesday" in cli.ok("snapshot", "create", "p/v@tuesday")
    said = cli.ok("snapshot", "create", "--group", "g", "p/v", "p/w")
    assert "All 2 are of one instant." in said
    assert "All 2 are of one instant." in cli.ok("snapshot", "create", "p/v@h", "p/w@h")
    for place in ((), ("p",), ("p/v",)):
        shown = cli.ok("snapshot", "list", *place)
        assert "p/v@monday" in shown
        assert ("p/w@g" in shown) == (place != ("p/v",))
    shown = cli.ok("snapshot", "show", "p/v@monday")
    assert f"nbd://127.0.0.1:{daemon.port}/p/v@monday" in shown
    assert "1 MiB (1048576 bytes)" in shown
    assert cli.ok("snapshot", "rename", "p/v@tuesday", "p/v@wednesday") == (
        "Snapshot p/v@tuesday is now p/v@wednesday.\n"
    )
    assert "held" in cli.ok("snapshot", "hold", "p/v@wednesday")
    assert "hold" in cli.ok("snapshot", "list", "p/v")
    assert "release p/v@wednesday" in cli.error("snapshot", "delete", "p/v@monday", "p/v@wednesday", "--yes")
    assert "is not held" in cli.ok("snapshot", "release", "p/v@wednesday")
    said = cli.ok("snapshot", "delete", "p/v@wednesday", "p/v@g", "--yes")
    assert said.splitlines()[0].startswith("Snapshot p/v@wednesday is deleted; ")
    assert said.endswith(" come back in all.\n")
    assert "p/v@monday" in cli.ok("snapshot", "list")


def test_the_commands_clone_and_roll_back(cli: Cli, volume: str) -> None:
    assert "a clone of p/v@monday" in cli.ok("volume", "clone", "p/v@monday", "p/c")
    assert "p/v@monday" in cli.ok("volume", "show", "p/c")
    assert "Origin" in cli.ok("volume", "list")
    assert "clone p/c" in cli.ok("snapshot", "list")
    assert "needs p/v@monday no more" in cli.ok("volume", "promote", "p/c")
    assert "no clone" in cli.error("volume", "promote", "p/c")
    cli.ok("volume", "delete", "p/c", "--yes")
    cli.ok("volume", "clone", "p/v@monday", "p/c")
    assert "stay for p/c" in cli.ok("snapshot", "delete", "p/v@monday", "--yes")
    cli.ok("volume", "delete", "p/c", "--yes")
    assert "Origin" not in cli.ok("volume", "list")
    cli.ok("snapshot", "create", "p/v@now")
    cli.ok("volume", "resize", "p/v", "2M")
    said = cli.ok("snapshot", "rollback", "p/v@now")
    assert "Volume p/v is what it was at p/v@now." in said
    assert "It has 1 MiB again, as then; it had 2 MiB." in said
    kept = re.search(r"p/v@before-rollback-\d{8}-\d{6}", said)
    assert kept is not None
    assert kept[0] in cli.ok("snapshot", "list")
    assert "--yes" in cli.error("snapshot", "rollback", "p/v@now", "--no-safety", status=2)
    assert "before" not in cli.ok("snapshot", "rollback", "p/v@now", "--no-safety", "--yes")
    assert "rolled back" in cli.ok("volume", "show", "p/v")


def test_a_rollback_under_a_client_says_who_and_what_breaks(daemon: FakeDaemon, cli: Cli, volume: str) -> None:
    with Connection(("127.0.0.1", daemon.port), "p/v") as connection:
        peer = "{}:{}".format(*connection.socket.getsockname())
        line = cli.error("snapshot", "rollback", "p/v@monday")
        assert peer in line
        assert "--force" in line
        status, written = on_a_terminal(daemon.home, "snapshot", "rollback", "p/v@monday", "--force", answer="n\n")
        assert status == 1
        flat = " ".join(written.split())
        assert f"in use by {peer}: from now on all their requests will fail" in flat
        assert "--yes" in cli.error("snapshot", "rollback", "p/v@monday", "--force", status=2)
        assert f"must connect anew: {peer}" in cli.ok("snapshot", "rollback", "p/v@monday", "--force", "--yes")


def test_a_volume_with_snapshots_goes_only_with_them(cli: Cli, volume: str) -> None:
    assert "has 1 snapshot, which terrace snapshot list p/v shows" in cli.error("volume", "delete", "p/v", "--yes")
    assert cli.ok("volume", "delete", "p/v", "--snapshots", "--yes") == "Volume p/v and its 1 snapshot are deleted.\n"
    assert "There are no snapshots" in cli.ok("snapshot", "list")


@pytest.mark.parametrize(
    "arguments",
    [
        ("snapshot", "list"),
        ("snapshot", "show", "p/v@monday"),
        ("snapshot", "create", "p/w@x"),
        ("snapshot", "rename", "p/v@monday", "x"),
        ("snapshot", "hold", "p/v@monday"),
        ("snapshot", "release", "p/v@monday"),
        ("snapshot", "rollback", "p/v@monday"),
        ("snapshot", "delete", "p/v@monday", "--yes"),
        ("volume", "clone", "p/v@monday", "p/c"),
        ("volume", "delete", "p/v", "--snapshots", "--yes"),
    ],
    ids=" ".join,
)
def test_every_command_of_snapshots_speaks_json(cli: Cli, volume: str, arguments: tuple[str, ...]) -> None:
    assert cli.json(*arguments)


@pytest.mark.parametrize(
    ("arguments", "status", "word"),
    [
        (("snapshot", "show", "p/v"), 2, "write p/v@SNAP"),
        (("snapshot", "show", "p/v@"), 2, "write p/v@SNAP"),
        (("snapshot", "show", "p@s"), 2, "write POOL/VOL@SNAP"),
        (("snapshot", "show", "p/v@a@b"), 2, "after the @ comes one name"),
        (("snapshot", "show", "p/v@a/b"), 2, "after the @ comes one name"),
        (("snapshot", "show", "p/v@mondya"), 1, "did you mean 'monday'"),
        (("snapshot", "show", "p/none@monday"), 1, "none"),
        (("snapshot", "show", "none/v@monday"), 1, "none"),
        (("snapshot", "create"), 2, "POOL/VOL@SNAP"),
        (("snapshot", "create", "p/v"), 2, "write p/v@SNAP"),
        (("snapshot", "create", "p/v@monday"), 1, "p/v@monday already"),
        (("snapshot", "create", "p/v@a", "p/w@b"), 2, "--group"),
        (("snapshot", "create", "--group", "g", "p/v@a"), 2, "has an @"),
        (("snapshot", "create", "--group", "g@h", "p/v"), 2, "no @"),
        (("snapshot", "create", "--group", "g", "p/v", "q/w"), 2, "no instant in common"),
        (("snapshot", "create", "p/v@-x"), 1, "can't name a snapshot"),
        (("snapshot", "create", "p/v@" + "x" * 300), 1, "can't name a snapshot"),
        (("snapshot", "list", "p/v@monday"), 2, "has an @"),
        (("snapshot", "list", "p@monday"), 2, "has no @"),
        (("snapshot", "delete", "p/v@monday"), 2, "--yes"),
        (("snapshot", "delete", "p/v@monday", "p/v@mondya", "--yes"), 1, "did you mean"),
        (("snapshot", "rename", "p/v@monday", "p/w@x"), 2, "stays with its volume"),
        (("snapshot", "rename", "p/v@monday", "a b"), 1, "can't name a snapshot"),
        (("snapshot", "rollback", "p/v@monday", "--keep-as", "x", "--no-safety"), 2, "--keep-as"),
        (("snapshot", "rollback", "p/v@monday", "--keep-as", "p/v@x"), 2, "SNAP alone"),
        (("snapshot", "rollback", "p/v@monday", "--keep-as", "monday"), 1, "p/v@monday already"),
        (("volume", "clone", "p/v", "p/c"), 2, "write p/v@SNAP"),
        (("volume", "clone", "p/v@monday", "q/c"), 2, "lives in the pool of its snapshot, p"),
        (("volume", "clone", "p/v@monday", "p/w"), 1, "p/w"),
        (("volume", "clone", "p/v@monday", "p/c@x"), 2, "has an @"),
        (("volume", "create", "p/x@y", "1M"), 2, "has an @"),
        (("volume", "show", "p/v@monday"), 2, "has an @"),
        (("volume", "delete", "p/v@monday"), 2, "has an @"),
        (("pool", "show", "p@monday"), 2, "has no @"),
    ],
)
def test_a_wrong_name_is_one_line_that_says_what_would_be_right(
    cli: Cli, volume: str, arguments: tuple[str, ...], status: int, word: str
) -> None:
    assert word in cli.error(*arguments, status=status)
    assert [one["name"] for one in cli.json("snapshot", "list")] == ["p/v@monday"]  # type: ignore[attr-defined]


def test_deleting_asks_with_what_would_come_back(daemon: FakeDaemon, cli: Cli, volume: str) -> None:
    status, written = on_a_terminal(daemon.home, "snapshot", "delete", "p/v@monday", answer="n\n")
    assert status == 1
    assert "that only it has" in written
    assert "p/v@monday" in cli.ok("snapshot", "list")
