"""The story of one volume: made, filled by a foreign client, its server killed, and nothing lost.

In a home of its own with sparse files of 1 and 4 GiB and on a free port, so that it disturbs no daemon that runs.
Without --check it goes on serving until Ctrl-C and then removes everything it made.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

BIN = Path(sys.executable).parent
TOOLS = os.environ.get("PATH", os.defpath) + ":/usr/local/sbin:/usr/sbin:/sbin"
EXPORT = "demo/vol"
VOLUME_BYTES = 2 << 30
FILE_COUNT = 40
START_TIMEOUT_S = 30.0


class StepError(Exception):
    """The story does not go on; the message says why and what to do."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/quickstart", description="A volume, from nothing past a kill.")
    parser.add_argument("--check", action="store_true", help="stop when the story is told; exit status 0 or 1")
    options = parser.parse_args()
    # Both unwind everything below, started in the background too, where a shell has SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        with tempfile.TemporaryDirectory(prefix="terrace-") as directory:
            tell(Path(directory), keep_serving=not options.check)
    except StepError as error:
        print(f"\nFAIL: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped before the story was told.", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def tell(directory: Path, *, keep_serving: bool) -> None:
    started_s = time.monotonic()
    home = directory / "home"
    say("Terrace: from nothing to a volume that survives its server")

    with serving(home, directory) as daemon:
        step("started terraced", f"home {home}")
        fast, base = directory / "fast", directory / "base"
        terrace(home, "pool", "create", "demo", "--fast", f"{fast}=1G", "--base", f"{base}=4G")
        step("made a pool of two sparse files", "demo: 1 GiB fast, 4 GiB base")
        terrace(home, "volume", "create", EXPORT, str(VOLUME_BYTES))
        step("made a thin volume of 2 GiB", EXPORT)

        image, sums = build_image(directory)
        step(f"built an ext4 image with {len(sums)} files", "mke2fs -d")
        copy = copy_in(image, uri(daemon, EXPORT))
        step(f"wrote it to the volume with {copy}", uri(daemon, EXPORT))
        mapped_bytes = json.loads(terrace(home, "volume", "show", EXPORT, "-o", "json"))["mapped_bytes"]
        step("asked what the volume takes", f"{mapped_bytes >> 20} MiB of {VOLUME_BYTES >> 20}: zeros take nothing")
        os.kill(daemon.pid, signal.SIGKILL)
        daemon.process.wait()
        step("killed terraced with SIGKILL", "without a flush before it")

    with serving(home, directory) as daemon:
        step("started it again", f"ready after {daemon.start_s:.2f} s, the log replayed")
        copied = directory / "copied.img"
        copy = copy_out(uri(daemon, EXPORT), copied)
        step(f"read the volume back with {copy}", f"{copied.stat().st_blocks * 512 >> 20} MiB of data")
        run("e2fsck", "-f", "-n", str(copied), why="the filesystem that came back is damaged")
        step("checked the filesystem", "e2fsck -f: clean")
        compare_files(copied, sums, directory / "restored")
        step("compared all files", f"{len(sums)} SHA-256 sums, all as written")
        terrace(home, "pool", "check", "demo", "--full")
        step("checked the pool", "terrace pool check --full: every block's checksum is right")
        for leftover in (image, copied):
            leftover.unlink()
        say(f"\nPASS in {time.monotonic() - started_s:.0f} s: everything that was acknowledged is there.")
        if keep_serving:
            invite(daemon, home)
            try:
                # Returns when the daemon ends, which is not before somebody wants it to.
                status = daemon.process.wait()
            except KeyboardInterrupt:
                say("\nStopped.")
                return
            raise StepError(f"terraced ended with status {status}; its log:\n{daemon.tail()}")


def invite(daemon: Daemon, home: Path) -> None:
    """What a newcomer can do with the volume that is served now."""
    address, port = "127.0.0.1", daemon.port
    say(
        f"""
The volume is served until Ctrl-C:

    NBD URI      {uri(daemon, EXPORT)}
    locally      nbd+unix:///{EXPORT}?socket={home}/nbd.sock

Attach it as a block device (the kernel's client, root):

    modprobe nbd
    nbd-client -N {EXPORT} {address} {port} /dev/nbd0 && mount /dev/nbd0 /mnt
    umount /mnt && nbd-client -d /dev/nbd0

Look at it without root:

    nbdinfo {uri(daemon, EXPORT)}
    qemu-img info {uri(daemon, EXPORT)}

Manage it:

    export TERRACE_HOME={home} PATH={BIN}:$PATH
    terrace status
    terrace pool show demo
    terrace volume resize {EXPORT} 3G
"""
    )


# The daemon


class Daemon:
    """A `terraced` of this script, ready."""

    def __init__(self, process: subprocess.Popen[str], port: int, start_s: float, log: Path) -> None:
        self.process = process
        self.pid = process.pid
        self.port = port
        self.start_s = start_s
        self._log = log

    def tail(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-10:])


@contextmanager
def serving(home: Path, directory: Path) -> Iterator[Daemon]:
    """Start terraced on `home` and a free port; stop it, if it still lives, when the block ends."""
    config, log = directory / "terraced.toml", directory / "terraced.log"
    config.write_text('[nbd]\nlisten = ["127.0.0.1:0"]\n')
    start_s = time.monotonic()
    with log.open("a") as log_file:
        # A session of its own: Ctrl-C is for this script, which then ends the daemon properly.
        process = subprocess.Popen(
            [BIN / "terraced", "--home", home, "--config", config],
            stdout=subprocess.PIPE,
            stderr=log_file,
            text=True,
            start_new_session=True,
        )
    try:
        assert process.stdout is not None
        # It prints one line when it is ready, or ends.
        ready = re.search(r"nbd://127\.0\.0\.1:(\d+)/", process.stdout.readline())
        if ready is None:
            process.wait()
            raise StepError(f"terraced did not start; its log:\n{log.read_text()}")
        yield Daemon(process, int(ready[1]), time.monotonic() - start_s, log)
    finally:
        process.terminate()
        try:
            process.wait(START_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


def uri(daemon: Daemon, export: str) -> str:
    return f"nbd://127.0.0.1:{daemon.port}/{export}"


def terrace(home: Path, *arguments: str) -> str:
    """The command line, as a user would call it."""
    return run(str(BIN / "terrace"), "--home", str(home), *arguments, why="the command line refused")


# The image


def build_image(directory: Path) -> tuple[Path, dict[str, str]]:
    """An ext4 image of the volume's size with files in it, and their checksums by path."""
    tree = directory / "tree"
    sums = {}
    # The same files each time: what fails once can be looked at again.
    noise = random.Random("terrace")
    for number in range(FILE_COUNT):
        name = f"directory{number % 4}/file{number:02}"
        content = noise.randbytes(noise.randrange(1, 2 << 20)) if number else b""
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        sums[name] = hashlib.sha256(content).hexdigest()
    image = directory / "image.ext4"
    with image.open("wb") as file:
        file.truncate(VOLUME_BYTES)
    run("mke2fs", "-q", "-t", "ext4", "-d", str(tree), str(image), why="the ext4 image could not be built")
    shutil.rmtree(tree)
    return image, sums


def copy_in(image: Path, target: str) -> str:
    """Copy with whichever client is there; returns its name."""
    if found("nbdcopy"):
        run("nbdcopy", str(image), target, why="nbdcopy could not write the volume")
        return "nbdcopy"
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", str(image), target, why="qemu-img could not write")
    return "qemu-img"


def copy_out(source: str, copied: Path) -> str:
    if found("nbdcopy"):
        run("nbdcopy", source, str(copied), why="nbdcopy could not read the volume")
        return "nbdcopy"
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", source, str(copied), why="qemu-img could not read")
    return "qemu-img"


def compare_files(image: Path, sums: dict[str, str], into: Path) -> None:
    """Read every file out of the image without mounting it."""
    into.mkdir()
    run("debugfs", "-R", f"rdump / {into}", str(image), why="debugfs could not read the image")
    for name, expected in sums.items():
        path = into / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != expected:
            raise StepError(f"the file {name} is not what was written; please report this")
    shutil.rmtree(into)


# Running and telling


def found(tool: str) -> str | None:
    return shutil.which(tool, path=TOOLS)


def run(tool: str, *arguments: str, why: str) -> str:
    """The standard output of a command that must succeed. Run from /, for libnbd must not find our `nbd`."""
    program = found(tool)
    if program is None:
        raise StepError(f"{tool} is not installed; run scripts/install-tools")
    command: Sequence[str] = [program, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd="/", check=False)
    if result.returncode != 0:
        said = (result.stderr or result.stdout).strip()
        raise StepError(f"{why}: {' '.join(command)} ended with status {result.returncode}:\n{said}")
    return result.stdout


def say(text: str) -> None:
    print(text, flush=True)


_count = 0


def step(done: str, detail: str) -> None:
    global _count
    _count += 1
    say(f"{_count:3}. {done:42} {detail}")


if __name__ == "__main__":
    sys.exit(main())
