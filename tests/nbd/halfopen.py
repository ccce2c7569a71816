"""Run in a network namespace of its own: a server in another one, whose address goes away without a word.

Prints for an idle connection and for one with a request in flight how it ended, and after how many seconds.
"""

from __future__ import annotations

import errno
import subprocess
import sys
import time
from pathlib import Path

import trio

from nbd.client import Client, ClientLimits, connect

SERVER = "10.99.0.2"


def ip(*arguments: str, inside: int | None = None) -> None:
    enter = [] if inside is None else ["nsenter", f"--net=/proc/{inside}/ns/net"]
    subprocess.run([*enter, "ip", *arguments], check=True)


async def main(dead_after_s: float) -> None:
    server = subprocess.Popen(["unshare", "--net", "nbdkit", "-f", "-p", "10809", "memory", "1M"])
    try:
        while not Path(f"/proc/{server.pid}/cmdline").read_bytes().startswith(b"nbdkit"):
            await trio.sleep(0.01)
        ip("link", "add", "here", "type", "veth", "peer", "name", "there", "netns", str(server.pid))
        ip("addr", "add", "10.99.0.1/24", "dev", "here")
        ip("addr", "add", f"{SERVER}/24", "dev", "there", inside=server.pid)
        ip("link", "set", "there", "up", inside=server.pid)
        ip("link", "set", "here", "up")
        limits = ClientLimits(dead_after_s=dead_after_s)
        deadline = time.monotonic() + 5
        while True:
            try:
                async with connect((SERVER, 10809), limits=ClientLimits(handshake_timeout_s=1)):
                    break
            except OSError:
                assert time.monotonic() < deadline
                await trio.sleep(0.02)
        async with (
            connect((SERVER, 10809), limits=limits) as idle,
            connect((SERVER, 10809), limits=limits) as busy,
        ):
            assert await idle.read(0, 4) == await busy.read(0, 4) == bytes(4)
            ip("addr", "flush", "dev", "there", inside=server.pid)
            gone = time.monotonic()

            async def wait(name: str, client: Client) -> None:
                error = await client.failed()
                print(name, errno.errorcode[error.errno or 0], round(time.monotonic() - gone, 2), flush=True)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait, "idle", idle)
                nursery.start_soon(wait, "busy", busy)
                try:
                    await busy.read(0, 4096)
                except OSError as error:
                    print("read", errno.errorcode[error.errno or 0], flush=True)
    finally:
        server.kill()
        server.wait()


if __name__ == "__main__":
    trio.run(main, float(sys.argv[1]))
