"""`terrace tls`: certificates for the NBD server, its clients, and nodes among themselves. Needs no daemon."""

from __future__ import annotations

import datetime
import errno
import shlex
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from terrace.cli.context import Context, pass_context
from terrace.cli.output import output_option, show_json, show_table
from terrace.extras import how_to_install

if TYPE_CHECKING:
    from terrace import certificates

_DAYS = click.IntRange(1, 36500)
_SOON_DAYS = 30


@click.group()
def tls() -> None:
    """Certificates for NBD over TLS: a private authority, the server's certificate, and one for each client and node.

    DIR is HOME/tls unless another is given.
    """


def _directory_option(command: Any) -> Any:
    return click.option(
        "--dir",
        "directory",
        type=click.Path(path_type=Path, file_okay=False),
        metavar="DIR",
        help="Where the authority lies (default: HOME/tls).",
    )(command)


@tls.command()
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False), required=False, metavar="[DIR]")
@click.option(
    "--name",
    "names",
    multiple=True,
    metavar="NAME",
    help="A name or address by which clients reach the server; may be repeated (default: this host's name). "
    "localhost, 127.0.0.1 and ::1 are always among them.",
)
@click.option("--days", type=_DAYS, default=825, show_default=True, help="How long the server's certificate holds.")
@click.option("--ca-days", type=_DAYS, default=3650, show_default=True, help="How long the authority does.")
@click.option("--force", is_flag=True, help="Replace those that exist. Clients of the old authority are shut out.")
@pass_context
def init(
    context: Context, directory: Path | None, names: tuple[str, ...], days: int, ca_days: int, force: bool
) -> None:
    """Make an authority and the server's certificate, and say how they are used."""
    made = _certificates()
    directory = _chosen(context, directory)
    called = list(names) or _this_host()
    for name in called:
        made.as_name(name)
    if not force:  # before anything is written
        for file in (directory / made.CA_KEY, directory / made.CA_CERTIFICATE):
            if file.exists():
                raise made.CertificateError(
                    errno.EEXIST,
                    f"{directory} has an authority already: `terrace tls server` makes another server certificate of "
                    "it, and `terrace tls init --force` another authority, which shuts all clients of this one out",
                )
    made.make_authority(directory, f"Terrace on {socket.gethostname()}"[:64], ca_days, force=force)
    made.make_server(directory, called, days, force=force)
    click.echo(f"{directory}: an authority, and a certificate for {', '.join(made.server_names(directory))}")
    click.echo("For the daemon's configuration:\n")
    for line in _configuration(context, directory):
        click.echo(f"  {line}".rstrip())
    click.echo("\nFor each client: terrace tls client NAME" + _dir_argument(context, directory))
    click.echo(f"{directory / made.CA_KEY} is only needed for that: whoever has it can make clients.")


@tls.command()
@click.option(
    "--name",
    "names",
    multiple=True,
    metavar="NAME",
    help="As for init (default: the names of the certificate that is there).",
)
@click.option("--days", type=_DAYS, default=825, show_default=True, help="How long the certificate holds.")
@click.option("--force", is_flag=True, help="Replace the one that exists.")
@_directory_option
@pass_context
def server(context: Context, directory: Path | None, names: tuple[str, ...], days: int, force: bool) -> None:
    """Make another server certificate of the same authority, as before the old one expires.

    A running daemon shows it to the next client.
    """
    made = _certificates()
    directory = _chosen(context, directory)
    called = list(names)
    if not called and (directory / "server-cert.pem").exists():
        called = [name for name in made.server_names(directory) if name not in made.LOOPBACK]
    made.make_server(directory, called or _this_host(), days, force=force)
    click.echo(f"{directory / 'server-cert.pem'}: for {', '.join(made.server_names(directory))}")


@tls.command()
@click.argument("name")
@click.option("--days", type=_DAYS, default=825, show_default=True, help="How long the certificate holds.")
@click.option("--force", is_flag=True, help="Replace one of that name.")
@_directory_option
@pass_context
def client(context: Context, name: str, directory: Path | None, days: int, force: bool) -> None:
    """Make a certificate for a client, CN=NAME, and say how clients use it."""
    made = _certificates()
    directory = _chosen(context, directory)
    into = made.make_client(directory, name, days, force=force)
    host = (made.server_names(directory) if (directory / "server-cert.pem").exists() else [*_this_host()])[0]
    click.echo(f"{into}: a certificate for CN={name}. Copy the directory to the client; there, with its path:\n")
    for line in client_commands(host, into):
        click.echo(f"  {line}")


@tls.command()
@click.argument("name")
@click.option(
    "--name",
    "names",
    multiple=True,
    metavar="HOST",
    help="A name or address by which peers and NBD clients reach the node; may be repeated.",
)
@click.option("--here", is_flag=True, help="It is for this node: goes into DIR itself, where the daemon looks for it.")
@click.option("--days", type=_DAYS, default=825, show_default=True, help="How long the certificate holds.")
@click.option("--force", is_flag=True, help="Replace one of that name.")
@_directory_option
@pass_context
def node(
    context: Context, name: str, names: tuple[str, ...], here: bool, directory: Path | None, days: int, force: bool
) -> None:
    """Make a certificate for a node that mirrors volumes, CN=NAME, and say how it is used.

    One authority for all nodes: make it on one of them, and all certificates there. A node shows it to its peers, as
    server and as client, and to NBD clients.
    """
    made = _certificates()
    directory = _chosen(context, directory)
    called = list(names)
    if here and (directory / "server-cert.pem").exists():  # NBD clients know it by these
        called += [one for one in made.server_names(directory) if one not in made.LOOPBACK]
    into = made.make_node(directory, name, called, days, here=here, force=force)
    shown = ", ".join(dict.fromkeys((*called, name, *made.LOOPBACK)))
    click.echo(f"{into / 'node-cert.pem'}: for the node {name} ({shown})")
    if not here:
        where = shlex.quote(str(into))
        click.echo(f"Copy what is in {where} to HOME/tls on that node; its keys belong to nobody else.")
    click.echo("For the configuration of its daemon:\n")
    # All addresses: a host's own name is often its loopback there.
    listen = "[::]" if called and ":" in called[0] else "0.0.0.0"
    for line in (
        *("[nbd]", f'listen = ["{listen}:10809"]', "[nbd.tls]", 'mode = "required"', "[node]", f'name = "{name}"'),
        *("[peers.OTHER]", 'address = "HOST:10809"'),
    ):
        click.echo(f"  {line}")


@tls.command()
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False), required=False, metavar="[DIR]")
@output_option
@pass_context
def show(context: Context, directory: Path | None, output: str) -> None:
    """Show whom the certificates name, what for, and when they expire."""
    found = _certificates().show(_chosen(context, directory))
    now = datetime.datetime.now(datetime.UTC)
    if output == "json":
        show_json(
            [
                {
                    "file": one.file,
                    "subject": one.subject,
                    "names": one.names,
                    "not_before": one.not_before.isoformat(),
                    "not_after": one.not_after.isoformat(),
                    "state": _state(one, now),
                }
                for one in found
            ]
        )
        return
    rows = [
        (one.file, one.subject, f"{one.not_after:%Y-%m-%d}", _state(one, now), ", ".join(one.names) or "-")
        for one in found
    ]
    show_table(("File", "Subject", "Until", "State", "Names"), rows)


def _state(one: certificates.Shown, now: datetime.datetime) -> str:
    if now >= one.not_after:
        return "expired"
    if now < one.not_before:
        return "not valid yet"
    days = (one.not_after - now).days
    if days >= _SOON_DAYS:
        return "valid"
    return f"expires in {days} day{'s' * (days != 1)}" if days else "expires within a day"


def client_commands(host: str, directory: Path) -> list[str]:
    """What a client runs to use the certificates in a directory."""
    authority = f"[{host}]" if ":" in host else host
    where = shlex.quote(str(directory))
    credentials = f"tls-creds-x509,id=tls0,endpoint=client,dir={str(directory).replace(',', ',,')}"
    options = f"driver=nbd,host={host},port=10809,export=POOL/VOL,tls-creds=tls0"
    files = f"-certfile {where}/client-cert.pem -keyfile {where}/client-key.pem -cacertfile {where}/ca-cert.pem"
    return [
        f"nbdinfo {shlex.quote(f'nbds://{authority}/POOL/VOL?tls-certificates={directory}')}",
        f"qemu-img info --object {shlex.quote(credentials)} --image-opts {shlex.quote(options)}",
        f"nbd-client -N POOL/VOL {files} -tlshostname {host} {host} 10809 /dev/nbd0",
    ]


def _configuration(context: Context, directory: Path) -> list[str]:
    lines = ["[nbd]", 'listen = ["0.0.0.0:10809", "[::]:10809"]', "", "[nbd.tls]", 'mode = "required"']
    if directory != context.home.path / "tls":
        for key, file in (("certificate", "server-cert.pem"), ("key", "server-key.pem"), ("ca", "ca-cert.pem")):
            lines.append(f"{key} = {_toml(str(directory / file))}")
    return lines


def _toml(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _dir_argument(context: Context, directory: Path) -> str:
    return "" if directory == context.home.path / "tls" else f" --dir {shlex.quote(str(directory))}"


def _chosen(context: Context, directory: Path | None) -> Path:
    return context.home.path / "tls" if directory is None else directory.absolute()


def _this_host() -> list[str]:
    name = socket.gethostname()
    made = _certificates()
    try:
        made.as_name(name)
    except made.CertificateError:
        return ["localhost"]
    return [name]


def _certificates() -> Any:
    """The module, which needs a package that not everybody has."""
    try:
        from terrace import certificates
    except ImportError as error:
        raise click.ClickException(
            f"making certificates needs the Python package cryptography ({error}); install it with: "
            f"{how_to_install('cryptography')}"
        ) from None
    return certificates
