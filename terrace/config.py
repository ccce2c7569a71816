"""The configuration file: TOML in, a checked `Config` out, or errors that say where and what instead.

Every key has a default, so no file is a valid configuration. Whatever Terrace doesn't know is an error: a misspelt
limit that is silently ignored is found in the night when it was needed.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator

from nbd.server import Limits
from nbd.tls import TlsFiles
from replication.etcd import PREFIX, judge_endpoint
from terrace.access import ANY, Rule, require_address, require_subject
from terrace.policies import PolicyConfig, ShownPolicy, require_policy_name, shown
from terrace.schedule import Schedule
from terrace.schema import ConfigError, KeyedError, Section, Size, Window, interval_seconds, validate, window_minutes
from terrace.scrubs import Plan
from tiers import Policy
from tiers.policy import DEFAULT, DEFAULT_NAME
from tiers.settings import PoolSettings

if TYPE_CHECKING:
    from replication.etcdclient import Etcd


def _as_address(text: str) -> str:
    split_address(text)
    return text


def split_address(text: str) -> tuple[str, int]:
    """(host, port) of `127.0.0.1:10809`, `[::1]:10809` or `localhost:10809`. Raises ValueError."""
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"{text!r} is ambiguous; write an IPv6 address as [{host}]:{port}")
    if not colon or not host or not port.isascii() or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{text!r} is not an address; write HOST:PORT with a port from 0 to 65535")
    return host, int(port)


def _as_interval(value: object) -> object:
    return "never" if value == 0 and not isinstance(value, bool) else value


def _is_interval(text: str) -> str:
    interval_seconds(text)
    return text


def _is_rate(rate: int) -> int:
    if 0 < rate < 64 << 10:
        raise ValueError(f"{rate} bytes a second is too little for a scrub; it must be at least 64 KiB, or 0: no limit")
    return rate


MIB = 1 << 20
# The defaults are those of the packages that obey them.
_LIMITS = Limits()
_SETTINGS = PoolSettings()
Address = Annotated[str, AfterValidator(_as_address)]


class TlsConfig(Section):
    """[nbd.tls]: what is encrypted, and who is let in. Relative paths begin at the home."""

    mode: Literal["off", "allowed", "required"] = "off"
    certificate: str = Field("tls/server-cert.pem", min_length=1, max_length=4095)
    key: str = Field("tls/server-key.pem", min_length=1, max_length=4095)
    ca: str = Field("tls/ca-cert.pem", min_length=1, max_length=4095)
    clients: Literal["verify", "any"] = "verify"
    plaintext: bool = False


class ExportConfig(Section):
    """[nbd.exports."PATTERN"]: who may have the exports that the pattern matches, and for what."""

    read_only: bool = False
    addresses: list[Annotated[str, AfterValidator(require_address)]] = Field([ANY])
    subjects: list[Annotated[str, AfterValidator(require_subject)]] = Field([ANY])


def _are_patterns(exports: dict[str, ExportConfig]) -> dict[str, ExportConfig]:
    for pattern in exports:
        if "/" not in pattern and "*" not in pattern:
            other = f'"{pattern}/*" is a whole pool' if pattern else '"*" is all of them'
            raise KeyedError(pattern, f'"{pattern}" matches no export: they are named POOL/VOL, and {other}')
    return exports


class NbdConfig(Section):
    """[nbd]: where volumes are exported and what a client may take."""

    listen: list[Address] = Field(["127.0.0.1:10809"])
    socket: str = Field("nbd.sock", max_length=107)
    max_connections: int = Field(_LIMITS.connections, ge=1, le=65536)
    max_connections_per_address: int = Field(_LIMITS.connections_per_address, ge=0, le=65536)
    max_handshakes: int = Field(_LIMITS.handshakes, ge=1, le=65536)
    handshake_timeout_s: float = Field(_LIMITS.handshake_timeout_s, gt=0, le=3600, allow_inf_nan=False)
    drain_grace_s: float = Field(_LIMITS.drain_grace_s, ge=0, le=3600, allow_inf_nan=False)

    tls: TlsConfig = TlsConfig()
    exports: Annotated[dict[str, ExportConfig], AfterValidator(_are_patterns)] = Field(default_factory=dict)

    def rules(self) -> list[Rule]:
        """Who may have which export, in the order of the file."""
        return [
            Rule(pattern, one.read_only, tuple(one.addresses), tuple(one.subjects))
            for pattern, one in self.exports.items()
        ]

    def limits(self) -> Limits:
        return replace(
            _LIMITS,
            connections=self.max_connections,
            connections_per_address=self.max_connections_per_address,
            handshakes=self.max_handshakes,
            handshake_timeout_s=self.handshake_timeout_s,
            drain_grace_s=self.drain_grace_s,
        )


class PoolConfig(Section):
    """[pool]: what each pool may use, and when it writes a checkpoint."""

    checkpoint_interval_s: float = Field(_SETTINGS.checkpoint_interval_s, gt=0, le=86400, allow_inf_nan=False)
    checkpoint_log: Size = Field(_SETTINGS.checkpoint_log_bytes, ge=MIB, le=1 << 40)
    map_cache: Size = Field(_SETTINGS.map_cache_bytes, ge=MIB, le=1 << 40)
    unsynced_cap: Size = Field(_SETTINGS.unsynced_cap_bytes, ge=MIB, le=1 << 40)
    overcommit_limit: float = Field(_SETTINGS.overcommit_limit, ge=0, le=1e6, allow_inf_nan=False)

    def settings(self) -> PoolSettings:
        return replace(
            _SETTINGS,
            checkpoint_interval_s=self.checkpoint_interval_s,
            checkpoint_log_bytes=self.checkpoint_log,
            map_cache_bytes=self.map_cache,
            unsynced_cap_bytes=self.unsynced_cap,
            overcommit_limit=self.overcommit_limit,
        )


def _are_levels(levels: list[float]) -> list[float]:
    for level in levels:
        if not 0 < level <= 100:
            raise ValueError(f"{level:g} is not a level; levels are percents above 0, up to 100, such as [70, 85, 95]")
    return sorted(levels)


class SpaceConfig(Section):
    """[space]: when operators hear that a pool fills up."""

    levels: Annotated[list[float], AfterValidator(_are_levels)] = Field([70, 85, 95])


class ScrubConfig(Section):
    """[scrub]: when the data of each pool is read and verified, and how fast."""

    interval: Annotated[str, BeforeValidator(_as_interval), AfterValidator(_is_interval)] = "30d"
    window: Window = ""
    rate: Annotated[Size, Field(ge=0, le=1 << 50), AfterValidator(_is_rate)] = _SETTINGS.scrub_rate_bytes

    def plan(self) -> Plan:
        return Plan(interval_seconds(self.interval), window_minutes(self.window))


def _is_mountpoint(text: str) -> str:
    if text and not Path(text).is_absolute():
        raise ValueError(f"{text!r} is not an absolute path; write the whole path of an empty directory")
    return text


class FuseConfig(Section):
    """[fuse]: where the daemon shows volumes and snapshots as files."""

    mountpoint: Annotated[str, AfterValidator(_is_mountpoint)] = Field("", max_length=4095)


class LogConfig(Section):
    """[log]: what goes to standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"


def require_node_name(name: str) -> str:
    """A node's name, as it stands in certificates and records. Raises ValueError."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", name):
        raise ValueError(
            f'"{name}" can\'t be a node\'s name: up to 63 of A-Z a-z 0-9 . _ -, a letter or digit first, such as "a"'
        )
    return name


def is_loopback(host: str) -> bool:
    """Whether a host's name or address is this host's own, as far as that can be said without a look-up."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_node_name(name: str) -> str:
    return require_node_name(name) if name else name


class NodeConfig(Section):
    """[node]: who this host is among those that it mirrors volumes with. Relative paths begin at the home."""

    name: Annotated[str, AfterValidator(_is_node_name)] = ""
    listen: list[Address] = Field([])
    certificate: str = Field("", max_length=4095)
    key: str = Field("", max_length=4095, validate_default=True)
    keep_before_resync: bool = True

    @field_validator("key")
    @classmethod
    def _goes_with_its_certificate(cls, key: str, found: ValidationInfo) -> str:
        if bool(key) != bool(found.data.get("certificate")):
            raise ValueError("certificate and key go together: name both, or neither")
        return key


class PeerConfig(Section):
    """[peers.NAME]: another node, where it is reached and how its certificate is known."""

    address: Address
    subject: str = Field("", max_length=1024)
    plaintext: bool = False

    @field_validator("address")
    @classmethod
    def _can_be_connected_to(cls, address: str) -> str:
        if split_address(address)[1] == 0:
            raise ValueError(f"{address!r} has no port that can be connected to; write one such as 10809")
        return address

    @field_validator("subject")
    @classmethod
    def _is_subject(cls, text: str) -> str:
        if text == ANY:
            raise ValueError('a peer has to be told from others; write a subject such as "CN=b"')
        return require_subject(text) if text else text

    @field_validator("plaintext")
    @classmethod
    def _only_on_this_host(cls, plaintext: bool, found: ValidationInfo) -> bool:
        address = found.data.get("address")
        if plaintext and address is not None and not is_loopback(split_address(address)[0]):
            raise ValueError(
                f"{address} is not this host, and between hosts all is encrypted: take this key away, and make "
                "certificates with `terrace tls node`"
            )
        return plaintext

    def subjects(self, name: str) -> tuple[str, ...]:
        """Patterns, one of which its certificate must have among its facts (`terrace.access.facts_of`)."""
        return (self.subject,) if self.subject else (f"CN={name}",)


def _is_endpoint(text: str) -> str:
    try:
        url = judge_endpoint(text)
    except OSError as error:
        raise ValueError(error.strerror) from None
    if url.scheme == "http" and not is_loopback(url.hostname or ""):
        raise ValueError(f"{text} is not this host, and between hosts all is encrypted: write https://{url.netloc}")
    return text.rstrip("/")


class EtcdConfig(Section):
    """[etcd]: the arbiter of mirrors that want one. Relative paths begin at the home."""

    endpoints: list[Annotated[str, AfterValidator(_is_endpoint)]] = Field([], max_length=16)
    ca: str = Field("", max_length=4095)
    certificate: str = Field("", max_length=4095)
    key: str = Field("", max_length=4095, validate_default=True)
    user: str = Field("", max_length=255)
    password_file: str = Field("", max_length=4095, validate_default=True)
    prefix: str = Field(PREFIX, max_length=200)

    @field_validator("key")
    @classmethod
    def _goes_with_its_certificate(cls, key: str, found: ValidationInfo) -> str:
        if bool(key) != bool(found.data.get("certificate")):
            raise ValueError("certificate and key go together: name both, or neither")
        return key

    @field_validator("password_file")
    @classmethod
    def _goes_with_its_user(cls, path: str, found: ValidationInfo) -> str:
        if bool(path) != bool(found.data.get("user")):
            raise ValueError("user and password_file go together: name both, or neither")
        return path

    @field_validator("prefix")
    @classmethod
    def _is_a_key(cls, prefix: str) -> str:
        if not re.fullmatch(r"[!-~]+", prefix) or not prefix.strip("/"):
            raise ValueError(f'"{prefix}" can\'t begin a key: write one such as "{PREFIX}"')
        return prefix.rstrip("/")

    def client(self, home: Path) -> Etcd:
        """The client; its files are read when it is used."""
        # A daemon without etcd needn't load what this does.
        from replication.etcdclient import Etcd, EtcdLogin, EtcdTls

        tls = EtcdTls(
            home / self.ca if self.ca else None,
            home / self.certificate if self.certificate else None,
            home / self.key if self.key else None,
        )
        login = EtcdLogin(self.user, home / self.password_file) if self.user else None
        return Etcd(self.endpoints, tls=tls, login=login)

    def judge_files(self, home: Path) -> None:
        """Raises OSError for one that can't be used."""
        if self.endpoints:
            self.client(home).judge_files()


class Config(Section):
    """Everything that can be configured."""

    nbd: NbdConfig = NbdConfig()
    node: NodeConfig = NodeConfig()
    etcd: EtcdConfig = EtcdConfig()
    peers: dict[str, PeerConfig] = Field(default_factory=dict)
    pool: PoolConfig = PoolConfig()
    space: SpaceConfig = SpaceConfig()
    scrub: ScrubConfig = ScrubConfig()
    fuse: FuseConfig = FuseConfig()
    log: LogConfig = LogConfig()
    policy: dict[str, PolicyConfig] = Field(default_factory=dict)

    @field_validator("peers")
    @classmethod
    def _are_other_nodes(cls, peers: dict[str, PeerConfig], found: ValidationInfo) -> dict[str, PeerConfig]:
        node, nbd = found.data.get("node"), found.data.get("nbd")
        if node is None or nbd is None:  # which is an error of its own
            return peers
        own = {*nbd.listen, *node.listen}
        taken: dict[str, str] = {}
        for name, peer in peers.items():
            try:
                require_node_name(name)
            except ValueError as error:
                raise KeyedError(name, str(error)) from None
            if not node.name:
                raise KeyedError(name, 'there is no name for this node itself: set name = "..." under [node]')
            if name == node.name:
                raise KeyedError(name, f'"{name}" is this node itself, which is no peer of its own: take it away')
            if peer.address in own:
                raise KeyedError(name, f"{peer.address} is an address of this node itself; write that of {name}")
            if peer.address in taken:
                raise KeyedError(name, f"{peer.address} is the address of the peer {taken[peer.address]} already")
            taken[peer.address] = name
            if not peer.plaintext and nbd.tls.mode == "off":
                raise KeyedError(
                    name,
                    "nodes talk over TLS, which is off: make certificates with `terrace tls node` and set mode = "
                    '"required" under [nbd.tls]',
                )
            if not peer.plaintext and nbd.tls.clients == "any":
                raise KeyedError(
                    name, 'its certificate has to be verified: set clients = "verify" under [nbd.tls], the default'
                )
        return peers

    @field_validator("policy")
    @classmethod
    def _have_possible_names(cls, policies: dict[str, PolicyConfig]) -> dict[str, PolicyConfig]:
        for name in policies:
            require_policy_name(name)
        return policies

    def tls_files(self, home: Path) -> TlsFiles | None:
        """What clients and peers are shown, and who is let in; read here. Raises OSError with a sentence."""
        if self.nbd.tls.mode == "off":
            return None
        ca = home / self.nbd.tls.ca if self.nbd.tls.clients == "verify" else None
        return TlsFiles(*self.certificate_and_key(home), ca)

    def certificate_and_key(self, home: Path) -> tuple[Path, Path]:
        """A node's own where it has one, for both directions; else those of [nbd.tls]."""
        tls, node = self.nbd.tls, self.node
        if node.certificate:
            return home / node.certificate, home / node.key
        if node.name:
            beside = (home / tls.certificate).with_name("node-cert.pem"), (home / tls.key).with_name("node-key.pem")
            # Where there is neither, that of a node is what is missed: it needs no server's, unless one was named.
            is_named = {"certificate", "key"} & tls.model_fields_set
            if all(path.exists() for path in beside) or not (is_named or (home / tls.certificate).exists()):
                return beside
        return home / tls.certificate, home / tls.key

    def pool_settings(self) -> PoolSettings:
        """What every pool is opened with."""
        return replace(self.pool.settings(), scrub_rate_bytes=self.scrub.rate)

    def policies(self) -> dict[str, Policy]:
        """Every policy that volumes may have, by name; that of volumes that name none is always among them."""
        return {DEFAULT_NAME: DEFAULT} | {name: table.policy(name) for name, table in self.policy.items()}

    def schedules(self) -> dict[str, Schedule]:
        """What snapshots the volumes of each policy get, where a table says so; by policy."""
        return {name: schedule for name, table in self.policy.items() if (schedule := table.schedule())}

    def show_policy(self, name: str, volumes: Sequence[str] = ()) -> ShownPolicy:
        """One of `policies`, for people and programs; `volumes` have it. Raises KeyError."""
        table = self.policy.get(name) or PolicyConfig()
        return shown(self.policies()[name], table.schedule(), table.model_fields_set, volumes)


def load_config(path: Path | None) -> Config:
    """The configuration in `path`, or the defaults. Raises ConfigError."""
    if path is None:
        return Config()
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError([f"{path}: can't be read: {error.strerror}"]) from None
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: is not UTF-8 text (at byte {error.start})"]) from None
    return parse_config(text, str(path))


def parse_config(text: str, file_name: str) -> Config:
    """`text` as a Config; `file_name` is for the errors. Raises ConfigError."""
    return validate(Config, text, file_name)
