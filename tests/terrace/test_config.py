"""The configuration: defaults without a file, and errors that say where, what and what instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbd.server import Limits
from terrace.access import Rule
from terrace.config import Config, load_config, parse_config, split_address
from terrace.schema import ConfigError, interval_seconds, line_of, window_minutes
from terrace.scrubs import Plan
from tiers import PoolSettings


def problems(text: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        parse_config(text, "t.toml")
    return error.value.problems


def test_no_file_is_a_valid_configuration_with_the_defaults_of_those_who_obey_it() -> None:
    config = load_config(None)
    assert config == Config() == parse_config("", "t.toml")
    assert config.nbd.listen == ["127.0.0.1:10809"]
    assert config.nbd.limits() == Limits()
    assert config.pool.settings() == PoolSettings()


def test_every_key_reaches_what_it_configures() -> None:
    config = parse_config(
        """
        [nbd]
        listen = ["[::1]:1234", "localhost:0"]
        socket = "other.sock"
        max_connections = 7
        max_connections_per_address = 5
        max_handshakes = 3
        handshake_timeout_s = 2
        drain_grace_s = 0.5
        [nbd.tls]
        mode = "required"
        certificate = "/c"
        key = "k"
        ca = "a"
        clients = "any"
        plaintext = true
        [nbd.exports."demo/*"]
        read_only = true
        addresses = ["unix", "10.0.0.0/8"]
        subjects = ["CN=a"]
        [nbd.exports."*"]
        addresses = []
        [pool]
        checkpoint_interval_s = 5
        checkpoint_log = "64M"
        map_cache = 33554432
        unsynced_cap = "8MiB"
        [scrub]
        interval = "2w"
        window = "22:30-05:00"
        rate = "100M"
        [fuse]
        mountpoint = "/mnt/volumes"
        [log]
        level = "debug"
        """,
        "t.toml",
    )
    limits, settings = config.nbd.limits(), config.pool_settings()
    assert (limits.connections, limits.handshake_timeout_s, limits.drain_grace_s) == (7, 2.0, 0.5)
    assert (limits.connections_per_address, limits.handshakes) == (5, 3)
    tls = config.nbd.tls
    assert (tls.mode, tls.certificate, tls.key, tls.ca, tls.clients, tls.plaintext) == (
        *("required", "/c", "k", "a", "any", True),
    )
    assert config.nbd.rules() == [
        Rule("demo/*", True, ("unix", "10.0.0.0/8"), ("CN=a",)),
        Rule("*", False, (), ("any",)),
    ]
    assert (settings.checkpoint_interval_s, settings.checkpoint_log_bytes) == (5.0, 64 << 20)
    assert (settings.map_cache_bytes, settings.unsynced_cap_bytes) == (32 << 20, 8 << 20)
    assert [split_address(address) for address in config.nbd.listen] == [("::1", 1234), ("localhost", 0)]
    assert config.scrub.plan() == Plan(14 * 86400, (22 * 60 + 30, 5 * 60))
    assert settings.scrub_rate_bytes == 100 << 20
    assert config.fuse.mountpoint == "/mnt/volumes" and Config().fuse.mountpoint == ""
    assert config.log.level == "debug"


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ('[nbd.tls]\nmode = "on"', 2, '"on" is not possible; valid: off, allowed, required'),
        ('[nbd.tls]\nclients = "none"', 2, "valid: verify, any"),
        ('[nbd.tls]\ncertificat = "x"', 2, 'did you mean "certificate"?'),
        ('[nbd.tls]\nkey = ""', 2, "nbd.tls.key"),
        ('[nbd.exports."demo/v"]\naddresses = ["unix", "10.0.0.1/8"]', 2, '"10.0.0.1/8" is no address'),
        ('[nbd.exports."demo/v"]\naddress = ["unix"]', 2, 'did you mean "addresses"?'),
        ('[nbd.exports."demo/v"]\nread_only = "yes"', 2, "nbd.exports.demo/v.read_only"),
        ("[nbd.exports.demo]\nread_only = true", 1, '"demo/*" is a whole pool'),
        ('[nbd]\nexports = ["demo"]', 2, "write [nbd.exports.NAME] on a line of its own"),
    ],
)
def test_what_is_wrong_with_tls_or_a_rule_is_said_with_its_line(text: str, line: int, said: str) -> None:
    (problem,) = problems(text)
    assert problem.startswith(f"t.toml:{line}: nbd.") and said in problem


def test_a_mount_point_is_an_absolute_path() -> None:
    (problem,) = problems('[fuse]\nmountpoint = "volumes"')
    assert problem.startswith("t.toml:2: ") and "'volumes' is not an absolute path" in problem
    (problem,) = problems('[fuse]\nmountpont = "/volumes"')
    assert "mountpont" in problem


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("never", None), ("90s", 90), ("15min", 900), ("1.5h", 5400), ("30 d", 30 * 86400), ("4w", 28 * 86400)],
)
def test_an_interval_is_a_number_with_a_unit_or_never(text: str, seconds: float | None) -> None:
    assert interval_seconds(text) == seconds


def test_no_interval_but_zero_and_never_switch_the_schedule_off() -> None:
    assert parse_config("[scrub]\ninterval = 0", "t").scrub.plan() == Plan(None)
    assert parse_config("", "t").scrub.plan() == Plan(30 * 86400.0)


@pytest.mark.parametrize("text", ["", "d", "0d", "-1d", "1e9d", "inf d", "30", "1m", "30D", "\u0661d", "99999w"])
def test_what_is_no_interval_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not an interval"):
        interval_seconds(text)


@pytest.mark.parametrize(
    "text", ["01:00", "1:00-2:00", "25:00-26:00", "01:60-02:00", "03:00-03:00", "01:00-24:30", "-"]
)
def test_what_is_no_window_of_hours_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a window of hours"):
        window_minutes(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[nbd]\n\nlisen = []", 't.toml:3: nbd.lisen: unknown key; did you mean "listen"?'),
        ("# no\n[pol]", 't.toml:2: pol: unknown key; did you mean "pool"?'),
        ("[x]", "t.toml:1: x: unknown key; valid here: nbd, node, etcd, peers, pool, space, scrub, fuse, log, policy"),
        ("nbd.listen = 1", 't.toml:1: nbd.listen: 1 is not a list such as ["127.0.0.1:10809"]'),
        (
            '[nbd.exports."p/v"]\nsubjects = "CN=a"',
            't.toml:2: nbd.exports.p/v.subjects: "CN=a" is not a list such as ["CN=a"]',
        ),
        ('[nbd.exports."p/v"]\nread_only = "yes"', 't.toml:2: nbd.exports.p/v.read_only: "yes" is not true or false'),
        (
            '[nbd.exports."p/v"]\nsubjects = ["backup"]',
            't.toml:2: nbd.exports.p/v.subjects: "backup" is no subject: write one such as "CN=backup", '
            '"DNS:host.example" for an alternative name, or "any"',
        ),
        (
            '[nbd.exports.""]',
            't.toml:1: nbd.exports.: "" matches no export: they are named POOL/VOL, and "*" is all of them',
        ),
        ("[nbd]\nlisten = [\n  1,\n]", "t.toml:2: nbd.listen: 1 is not a string in quotes"),
        ("nbd = 1", "t.toml:1: nbd: 1 is not a section; write [nbd] on a line of its own"),
        ("[nbd]\nmax_connections = 0", "t.toml:2: nbd.max_connections: 0 is not possible; it must be at least 1"),
        ("[nbd]\nmax_connections = 1.5", "t.toml:2: nbd.max_connections: 1.5 is not a whole number"),
        ("[nbd]\nmax_connections = true", "t.toml:2: nbd.max_connections: true is not a whole number"),
        (
            "[nbd]\nhandshake_timeout_s = 0",
            "t.toml:2: nbd.handshake_timeout_s: 0 is not possible; it must be more than 0",
        ),
        ("[nbd]\nhandshake_timeout_s = nan", "t.toml:2: nbd.handshake_timeout_s: nan is not a finite number"),
        ("[pool]\nmap_cache = true", "t.toml:2: pool.map_cache: true is not a size such as 64M"),
        ("[pool]\nmap_cache = 5", "t.toml:2: pool.map_cache: 5 is not possible; it must be at least 1 MiB"),
        (
            '[pool]\nmap_cache = "8EB"',
            "t.toml:2: pool.map_cache: '8EB' is ambiguous; sizes are powers of 1024: write 8E",
        ),
        (
            '[scrub]\ninterval = "monthly"',
            't.toml:2: scrub.interval: "monthly" is not an interval; write one such as "12h", "30d" or "4w", '
            'or "never"',
        ),
        ("[scrub]\ninterval = 30", "t.toml:2: scrub.interval: 30 is not a string in quotes"),
        (
            '[scrub]\n\nwindow = "1-6"',
            't.toml:3: scrub.window: "1-6" is not a window of hours; write one such as "01:00-06:00" or "22:30-05:00"',
        ),
        (
            '[scrub]\nrate = "1K"',
            "t.toml:2: scrub.rate: 1024 bytes a second is too little for a scrub; it must be at least 64 KiB, or 0: "
            "no limit",
        ),
        ("[scrub]\nrate = -1", "t.toml:2: scrub.rate: -1 is not possible; it must be at least 0 B"),
        ('[log]\nlevel = "all"', 't.toml:2: log.level: "all" is not possible; valid: debug, info, warning, error'),
    ],
)
def test_an_error_names_file_line_key_and_what_would_be_right(text: str, expected: str) -> None:
    assert problems(text) == [expected]


@pytest.mark.parametrize("address", ["10809", "localhost", ":10809", "h:", "h:-1", "h:65536", "h:x", "::1:1", "h:٣"])
def test_what_is_no_address_is_refused_with_its_text(address: str) -> None:
    (problem,) = problems(f'[nbd]\nlisten = ["127.0.0.1:1", "{address}"]')
    assert problem.startswith("t.toml:2: nbd.listen: ")
    assert address in problem


def test_all_errors_are_told_at_once_in_the_order_of_lines() -> None:
    told = problems('[log]\nlevel = "x"\n[pool]\na = 1\n[nbd]\nb = 2\n')
    assert [problem.split(": ")[:2] for problem in told] == [
        ["t.toml:2", "log.level"],
        ["t.toml:4", "pool.a"],
        ["t.toml:6", "nbd.b"],
    ]


@pytest.mark.parametrize("text", ["[nbd", "nbd", "a = 1\na = 2", 'x = "', "\x00"])
def test_what_is_no_toml_is_refused_with_its_line(text: str) -> None:
    (problem,) = problems("\n" + text)
    assert problem.startswith(("t.toml:2: is not TOML: ", "t.toml:3: is not TOML: "))


def test_the_line_of_a_key_is_found_past_strings_and_lists_that_look_like_it() -> None:
    text = 'a = """\n[nbd]\nlisen = 1\n"""\nb = [\n  "lisen = 2",\n]\n\n[nbd]\n# lisen\nlisen = 3\n'
    assert line_of(text, ["nbd", "lisen"]) == 11
    assert line_of(text, ["b"]) == 5
    assert line_of(text, ["nbd"]) == 9


def test_a_file_that_can_not_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: can't be read: No such file"):
        load_config(tmp_path / "none.toml")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not UTF-8"):
        load_config(tmp_path / "binary")


NODES = '[nbd.tls]\nmode = "required"\n[node]\nname = "a"\n'


def test_peers_are_known_by_the_name_in_their_certificate_unless_a_subject_is_given() -> None:
    config = parse_config(
        NODES + 'listen = ["192.0.2.1:1"]\n[peers.b]\naddress = "192.0.2.2:1"\n'
        '[peers.c]\naddress = "[::1]:1"\nsubject = "DNS:c.example"\nplaintext = true',
        "t.toml",
    )
    assert (config.node.name, config.node.listen) == ("a", ["192.0.2.1:1"])
    assert config.peers["b"].subjects("b") == ("CN=b",) and not config.peers["b"].plaintext
    assert config.peers["c"].subjects("c") == ("DNS:c.example",) and config.peers["c"].plaintext


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[node]\nname = "a/b"', "t.toml:2: node.name: \"a/b\" can't be a node's name"),
        ('[node]\nname = "a"\ncertificate = "c"', "certificate and key go together"),
        (NODES + '[peers.a]\naddress = "192.0.2.2:1"', 't.toml:5: peers.a: "a" is this node itself'),
        (NODES + '[peers."x y"]\naddress = "192.0.2.2:1"', "peers.x y: \"x y\" can't be a node's name"),
        (NODES + '[peers.b]\naddress = "127.0.0.1:10809"', "is an address of this node itself; write that of b"),
        (
            NODES + '[peers.b]\naddress = "192.0.2.2:1"\n[peers.c]\naddress = "192.0.2.2:1"',
            "peers.c: 192.0.2.2:1 is the address of the peer b already",
        ),
        (NODES + '[peers.b]\naddress = "192.0.2.2"', "t.toml:6: peers.b.address: '192.0.2.2' is not an address"),
        (NODES + '[peers.b]\naddress = "192.0.2.2:0"', "no port that can be connected to"),
        (NODES + "[peers.b]", "t.toml:5: peers.b.address: is missing"),
        (NODES + '[peers.b]\naddress = "192.0.2.2:1"\nplaintext = true', "192.0.2.2:1 is not this host"),
        (NODES + '[peers.b]\naddress = "192.0.2.2:1"\nsubject = "b"', '"b" is no subject'),
        (NODES + '[peers.b]\naddress = "192.0.2.2:1"\nsubject = "any"', "a peer has to be told from others"),
        ('[peers.b]\naddress = "192.0.2.2:1"', "there is no name for this node itself"),
        ('[node]\nname = "a"\n[peers.b]\naddress = "192.0.2.2:1"', "nodes talk over TLS, which is off"),
        (
            NODES.replace("[node]", 'clients = "any"\n[node]') + '[peers.b]\naddress = "192.0.2.2:1"',
            "its certificate has to be verified",
        ),
    ],
)
def test_what_can_be_no_peer_is_refused_by_name(text: str, said: str) -> None:
    (problem,) = problems(text)
    assert said in problem


def test_etcd_is_asked_where_the_file_says_and_as_whom(tmp_path: Path) -> None:
    text = (
        '[etcd]\nendpoints = ["https://e1:2379/", "http://[::1]:2379", "http://localhost:1"]\nca = "ca.pem"\n'
        'certificate = "/c.pem"\nkey = "k.pem"\nuser = "t"\npassword_file = "secret"\nprefix = "mine/"'
    )
    etcd = parse_config(text, "t.toml").etcd
    assert etcd.endpoints == ["https://e1:2379", "http://[::1]:2379", "http://localhost:1"]
    assert etcd.prefix == "mine"
    with pytest.raises(OSError, match=rf"{tmp_path}/ca\.pem, which \[etcd\] names, can't be read"):
        etcd.judge_files(tmp_path)
    Config().etcd.judge_files(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('endpoints = ["http://192.0.2.1:2379"]', "t.toml:2: etcd.endpoints: http://192.0.2.1:2379 is not this host"),
        ('endpoints = ["http://e1:2379"]', "write https://e1:2379"),
        ('endpoints = ["e1:2379"]', "'e1:2379' is no endpoint of etcd: write https://HOST:PORT"),
        ('endpoints = ["https://e1:port"]', "is no endpoint of etcd"),
        ('endpoints = ["https://"]', "is no endpoint of etcd"),
        ('endpoints = ["https://e1:1/v3"]', "is no endpoint of etcd"),
        ('endpoints = ["https://t:hush@e1:1/x"]', "has no user in it: give user and password_file"),
        ('endpoints = "https://e1:1"', 'is not a list such as ["https://e1:1"]'),
        ('certificate = "c"', "certificate and key go together"),
        ('user = "t"', "user and password_file go together"),
        ('password_file = "p"', "user and password_file go together"),
        ('prefix = ""', "can't begin a key"),
        ('prefix = "/"', "can't begin a key"),
        ('prefix = "a b"', "can't begin a key"),
        ('password = "hush"', "unknown key"),
    ],
)
def test_what_can_be_no_etcd_is_refused_and_no_secret_is_shown(text: str, said: str) -> None:
    (problem,) = problems("[etcd]\n" + text)
    assert said in problem and "hush" not in problem


def test_a_node_without_any_certificate_is_asked_for_that_of_a_node_unless_it_named_a_servers(tmp_path: Path) -> None:
    tls = '[nbd.tls]\nmode = "required"\n'
    node = '[node]\nname = "a"\n'

    def shown(text: str) -> str:
        return parse_config(text, "test").certificate_and_key(tmp_path)[0].name

    assert (shown(tls + node), shown(tls)) == ("node-cert.pem", "server-cert.pem")
    assert shown(tls + 'certificate = "own.pem"\n' + node) == "own.pem"
    (tmp_path / "tls").mkdir()
    (tmp_path / "tls/server-cert.pem").touch()
    assert shown(tls + node) == "server-cert.pem"
    (tmp_path / "tls/node-cert.pem").touch()
    (tmp_path / "tls/node-key.pem").touch()
    assert shown(tls + node) == "node-cert.pem"
