"""The nbdkit plugin: `nbdkit python terrace/nbdkit_plugin.py pool=... volume=...`; see docs/nbdkit.md.

nbdkit runs this file in a Python of its own, which knows nothing of the environment that Terrace is installed in. So
what is here, and needs nothing but the standard library, finds that environment beside this file: the `site-packages`
that it lies in, or the checkout's `.venv`, or the environment that is active (`$VIRTUAL_ENV`). What nbdkit calls then
is in `terrace.nbdkit_callbacks`, and how its threads use the engine in `terrace.lending`.

NumPy and others come as binaries for one minor version of Python, so the environment must be of the version that nbdkit
was built with (`nbdkit python --dump-plugin` tells it).

Whatever is missing ends nbdkit with one line and status 1: an exception at this point would be a traceback.
"""

from __future__ import annotations

import importlib.util
import os
import site
import sys
from pathlib import Path

OLDEST = (3, 11)
NEEDED = ("trio", "xxhash", "zstandard", "numpy", "psutil", "pydantic")
"""What the engine, the configuration's policies and `lending` import."""


def environments(root: Path, active: str | None) -> list[Path]:
    """Where dependencies may lie, for a `terrace` package in `root`: site-packages without Python's version in them.

    A path with `*` in the place of the version.
    """
    if root.name in ("site-packages", "dist-packages"):
        if root.parent.name.startswith("python"):
            return [root.parent.parent / "python*" / root.name]
        return [root]
    found = [root / ".venv"] + ([Path(active)] if active else [])
    return [environment / "lib" / "python*" / "site-packages" for environment in found]


def choose(patterns: list[Path], version: tuple[int, int]) -> tuple[Path | None, str]:
    """The first of these directories that exists for this Python; or None, and what to do about it."""
    wanted = "python" + ".".join(map(str, version))
    others: list[str] = []
    for pattern in patterns:
        fitting = Path(str(pattern).replace("python*", wanted))
        if fitting.is_dir():
            return fitting, ""
        head, star, tail = str(pattern).partition("python*")
        if star and Path(head).is_dir():
            others += [str(path) for path in sorted(Path(head).glob("python*" + tail)) if path.is_dir()]
    need = f"nbdkit's Python is {wanted[6:]}"
    if others:
        return None, (
            f"{need}, and Terrace's environment is of another version ({others[0]}): make one with {wanted}, "
            f"as with `PYTHON={wanted} scripts/quickstart` in a checkout or with `pipx install --python {wanted}`"
        )
    return None, (
        f"{need}, and there is no environment with Terrace's dependencies beside this plugin "
        f"({' or '.join(str(pattern) for pattern in patterns)}): make .venv in the checkout, or activate one"
    )


def own_library(path: list[str], base_prefix: str, loaded: list[str], version: tuple[int, int]) -> list[str]:
    """`path` with the standard library that belongs to the libpython among the `loaded` files of this process.

    A Python that is embedded asks the PATH where it lies. Where an environment of another build comes first there, as
    one that is activated does, it takes that build's library, whose compiled modules don't fit.
    """
    name = f"python{version[0]}.{version[1]}"
    for library in loaded:
        if not Path(library).name.startswith(f"lib{name}"):
            continue
        for prefix in Path(library).parents:
            mine = prefix / "lib" / name
            if (mine / "os.py").exists():
                other = Path(base_prefix) / "lib" / name
                if mine.resolve() == other.resolve():
                    return path
                theirs = str(other)
                return [str(mine) + at.removeprefix(theirs) if at.startswith(theirs) else at for at in path]
    return path


def files_loaded() -> list[str]:
    """What this process has mapped, by path."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    return sorted({line[line.index("/") :] for line in lines if "/" in line})


def prepare(file: Path) -> str | None:
    """Make `terrace` and what it needs importable; returns what stands in the way, in a sentence, or None."""
    root = file.parent.parent
    sys.path[:] = own_library(sys.path, sys.base_prefix, files_loaded(), sys.version_info[:2])
    version = sys.version_info[:2]
    if version < OLDEST:
        return f"Terrace needs Python {OLDEST[0]}.{OLDEST[1]} or later and nbdkit's is {version[0]}.{version[1]}"
    directory, refusal = choose(environments(root, os.environ.get("VIRTUAL_ENV")), version)
    if directory is not None:
        before = list(sys.path)
        site.addsitedir(str(directory))
        # Before the distribution's own packages: those may be older, and one of them is another `nbd`.
        sys.path[:] = [path for path in sys.path if path not in before] + before
        sys.path.insert(0, str(directory))
    sys.path.insert(0, str(root))
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    if directory is None:
        return refusal
    return (
        f"{directory} lacks {', '.join(missing)}, which Terrace needs: install it there (`pip install terrace`, or "
        "`scripts/test` in a checkout)"
    )


if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy's would not survive nbdkit's fork, and aren't used
    if _refusal := prepare(Path(__file__).resolve()):
        sys.exit(f"nbdkit: error: terrace: {_refusal}")

    from terrace.nbdkit_callbacks import (  # noqa: F401 (nbdkit looks for these names here)
        API_VERSION,
        after_fork,
        block_size,
        cache,
        can_cache,
        can_extents,
        can_fast_zero,
        can_flush,
        can_fua,
        can_multi_conn,
        can_trim,
        can_write,
        can_zero,
        cleanup,
        close,
        config,
        config_complete,
        default_export,
        dump_plugin,
        export_description,
        extents,
        flush,
        get_ready,
        get_size,
        is_rotational,
        list_exports,
        open,
        pread,
        pwrite,
        speak_shortly,
        thread_model,
        trim,
        zero,
    )

    speak_shortly()
