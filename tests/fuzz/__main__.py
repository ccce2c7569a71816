"""`python -m tests.fuzz TARGET --minutes N`: fuzz one target, and keep what reaches new code in its corpus.

`python -m tests.fuzz TARGET... --inputs N`: so many inputs, of the targets in turn; none may crash, hang, or leave
memory behind. What the protocol is held to is `handshake request connection --inputs 1000000`.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import time
import traceback
from pathlib import Path

from tests.fuzz.engine import Campaign, Finding, GrowthError, Target, endure, minimal, save
from tests.fuzz.targets import TARGETS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", metavar="target", nargs="+", choices=sorted(TARGETS))
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--inputs", type=int, help="run so many, without coverage, and see that memory doesn't grow")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--blind", action="store_true", help="no coverage: more runs a second, for slow targets")
    parser.add_argument("--minimize", action="store_true", help="rewrite the corpus as few short inputs afterwards")
    parser.add_argument("--crash", type=Path, default=Path("fuzz-finding"), help="where to put an input that fails")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    targets = [TARGETS[name] for name in arguments.targets]
    if arguments.inputs:
        return _endure(targets, arguments)
    if len(targets) > 1:
        parser.error("several targets need --inputs")
    return _explore(targets[0], arguments)


def _endure(targets: list[Target], arguments: argparse.Namespace) -> int:
    print(f"{', '.join(target.name for target in targets)}: seed {arguments.seed}", file=sys.stderr)
    try:
        print(endure(targets, arguments.seed, arguments.inputs), file=sys.stderr)
    except Finding as finding:
        arguments.crash.write_bytes(finding.data)
        traceback.print_exception(finding)
        print(f"saved as {arguments.crash}", file=sys.stderr)
        return 1
    except GrowthError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _explore(target: Target, arguments: argparse.Namespace) -> int:
    campaign = Campaign(target, arguments.seed, arguments.blind)
    begun = time.monotonic()
    try:
        campaign.fuzz(arguments.minutes)
    except Finding as finding:
        arguments.crash.write_bytes(finding.data)
        traceback.print_exception(finding)
        print(f"saved as {arguments.crash}; put it into {target.corpus} when it is mended", file=sys.stderr)
        return 1
    finally:
        print(
            f"{target.name}: seed {arguments.seed}, {campaign.runs} runs in {time.monotonic() - begun:.0f} s, "
            f"{len(campaign.edges)} edges, {len(campaign.new)} new inputs",
            file=sys.stderr,
        )
        save(target, campaign.new)
    if arguments.minimize:
        inputs = minimal(target, target.inputs())
        for path in target.corpus.glob("*"):
            path.unlink()
        save(target, inputs)
        print(f"{len(inputs)} inputs, {sum(map(len, inputs))} bytes kept", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
