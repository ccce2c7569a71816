"""`python -m tests.fuzz TARGET --minutes N`: fuzz one target, and keep what reaches new code in its corpus."""

from __future__ import annotations

import argparse
import logging
import random
import sys
import time
import traceback
from pathlib import Path

from tests.fuzz.engine import Campaign, Finding, minimal, save
from tests.fuzz.targets import TARGETS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--blind", action="store_true", help="no coverage: more runs a second, for slow targets")
    parser.add_argument("--minimize", action="store_true", help="rewrite the corpus as few short inputs afterwards")
    parser.add_argument("--crash", type=Path, default=Path("fuzz-finding"), help="where to put an input that fails")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    target = TARGETS[arguments.target]
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
