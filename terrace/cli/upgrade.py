"""`terrace upgrade`: another terraced takes over from the running one, and clients stay connected."""

from __future__ import annotations

import errno
import time
from typing import Any

import click
from rich.console import Console
from rich.status import Status

from terrace.apiclient import ApiError
from terrace.cli.context import Context, pass_context
from terrace.cli.output import count, output_option, show_json

_PAUSE_S = 0.1
_PATIENCE_S = 180.0
"""More than the daemons take to give up (`terrace.handover`)."""


@click.command()
@click.option("--force", is_flag=True, help="Also where that cuts operations or open files short.")
@output_option
@pass_context
def upgrade(context: Context, force: bool, output: str) -> None:
    """Replace the running terraced by the one that is installed now, without disconnecting NBD clients.

    The new process reads the configuration anew, and takes over with the old one's sockets. Clients
    see a pause, usually well under a second; those over TLS are disconnected. If it fails the old process goes on.
    """
    with context.connect() as client:
        before = client.get("status")["nbd"]["connections"]
        asked = client.request("POST", "upgrade", body={"force": force})
    with Status("starting the new terraced", console=Console(stderr=True)) as status:
        try:
            done = _wait(context, asked, status)
        except KeyboardInterrupt:
            raise click.ClickException("not waiting any longer; the upgrade goes on: see `terrace status`") from None
    if output == "json":
        show_json(done)
        return
    how = done["succession"]
    click.echo(
        f"terraced {done['version']} (process {done['pid']}) has taken over from {how['from_version']} (process "
        f"{how['from_pid']}); {how['clients']} client{'s' * (how['clients'] != 1)} waited for {how['pause_s']:.2f} s."
        + _cut_off(before)
    )


def _cut_off(connections: list[dict[str, Any]]) -> str:
    """A sentence on those of these that were over TLS, which no other process can go on with; empty without.

    It is the daemon before that has told of them, which may be an older one.
    """
    over_tls = sum(bool(one.get("tls")) and one.get("kind", "client") == "client" for one in connections)
    if not over_tls:
        return ""
    return f" {count(over_tls, 'client')} over TLS {'was' if over_tls == 1 else 'were'} disconnected."


def _wait(context: Context, asked: dict[str, Any], status: Status) -> dict[str, Any]:
    """The status of the process that has taken over."""
    deadline_s = time.monotonic() + _PATIENCE_S
    while True:
        time.sleep(_PAUSE_S)
        try:
            with context.connect() as client:
                now: dict[str, Any] = client.get("upgrade")
        except ApiError as error:
            # Between the two nobody answers; whoever listens does when the pools are open.
            if error.errno not in (errno.ECONNRESET, errno.EPROTO, errno.ETIMEDOUT) or time.monotonic() > deadline_s:
                raise
            continue
        if now["pid"] != asked["pid"]:
            if now["succession"] is None:
                raise ApiError(
                    errno.EIO,
                    "terraced has ended meanwhile, which disconnected clients, and was started anew; its log says why",
                )
            return now
        if now["attempt"] == asked["attempt"] and now["state"] == "idle":
            raise ApiError(errno.EIO, f"the running terraced goes on: {now['error']}")
        if time.monotonic() > deadline_s:
            raise ApiError(errno.ETIMEDOUT, f"no new terraced after {_PATIENCE_S:.0f} s; its log says why")
        status.update("the new terraced opens the pools" if now["state"] == "handing over" else status.status)
