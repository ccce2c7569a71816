"""Installing units: what is written, what is shown, and what somebody changed is left alone."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from terrace.cli.root import root as cli
from terrace.config import parse_config
from terrace.unitfiles import TARGETS, Installation, UnitError, render, this_installation, writable_by_others
from tests.system.daemon import REPOSITORY

SERVICE = "etc/systemd/system/terraced.service"


def install(root: Path, *options: str, status: int = 0, home: str = "") -> str:
    """`terrace install-units`; what it said."""
    result = CliRunner().invoke(
        cli, [*(["--home", home] if home else []), "install-units", "--root", str(root), *options]
    )
    assert result.exit_code == status, result.output
    assert not status or result.stderr.count("\n") == 1
    return result.stdout + result.stderr


def content(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): path.read_text() for path in sorted(root.rglob("*")) if path.is_file()}


def test_every_file_is_written_for_this_installation_and_a_second_time_changes_nothing(tmp_path: Path) -> None:
    install(tmp_path)
    written = content(tmp_path)
    assert written.keys() == {str(place / name) for name, place in TARGETS.items()}
    service = written[SERVICE]
    assert f"\nExecStart={sys.prefix}/bin/terraced\n" in service
    assert "\nStateDirectory=terrace\n" in service
    assert "ListenStream=/var/lib/terrace/api.sock\n" in written["etc/systemd/system/terraced.socket"]
    assert not [name for name, text in written.items() if "@TERRACE" in text or "@HOME@" in text]
    assert all((tmp_path / name).stat().st_mode & 0o777 == 0o644 for name in written)
    assert "as it should be" in install(tmp_path)
    assert content(tmp_path) == written


def test_a_dry_run_shows_everything_and_writes_nothing(tmp_path: Path) -> None:
    said = install(tmp_path, "--dry-run")
    assert "+ExecStart=" in said and "would be written" in said
    assert content(tmp_path) == {}


def test_a_file_of_another_version_is_replaced_and_the_difference_shown(tmp_path: Path) -> None:
    install(tmp_path)
    before = content(tmp_path)
    said = install(tmp_path, home="/srv/terrace")
    assert "-StateDirectory=terrace" in said and "+ReadWritePaths=/srv/terrace" in said
    assert "--home /srv/terrace" in content(tmp_path)[SERVICE]
    install(tmp_path)
    assert content(tmp_path) == before


def test_a_file_that_was_changed_here_is_shown_and_stays_without_force(tmp_path: Path) -> None:
    install(tmp_path)
    wanted = content(tmp_path)
    changed = wanted[SERVICE].replace("WatchdogSec=30", "WatchdogSec=99")
    (tmp_path / SERVICE).write_text(changed)
    (tmp_path / "etc/udev/rules.d/60-terrace.rules").unlink()
    said = install(tmp_path, status=1)
    assert "-WatchdogSec=99\n+WatchdogSec=30" in said
    assert "Error: changed here" in said and "systemctl edit" in said and "--force" in said
    assert content(tmp_path)[SERVICE] == changed
    assert "etc/udev/rules.d/60-terrace.rules" not in content(tmp_path), "all or nothing"
    assert "nothing was removed" in install(tmp_path, "--uninstall", status=1)
    install(tmp_path, "--force")
    assert content(tmp_path) == wanted


def test_somebody_else_s_file_in_the_place_of_ours_stays(tmp_path: Path) -> None:
    (tmp_path / SERVICE).parent.mkdir(parents=True)
    (tmp_path / SERVICE).write_text("[Service]\nExecStart=/mine\n")
    assert "-ExecStart=/mine" in install(tmp_path, status=1)
    assert content(tmp_path) == {SERVICE: "[Service]\nExecStart=/mine\n"}


def test_uninstalling_removes_what_was_installed_once_nothing_is_enabled(tmp_path: Path) -> None:
    install(tmp_path)
    wants = tmp_path / "etc/systemd/system/multi-user.target.wants"
    wants.mkdir()
    (wants / "terraced.service").symlink_to("/etc/systemd/system/terraced.service")
    said = install(tmp_path, "--uninstall", status=1)
    assert "systemctl disable --now terraced.service" in said
    (wants / "terraced.service").unlink()
    assert "would be removed" in install(tmp_path, "--uninstall", "--dry-run")
    assert content(tmp_path)
    install(tmp_path, "--uninstall")
    assert content(tmp_path) == {}
    assert "Nothing is installed" in install(tmp_path, "--uninstall")


def test_the_configuration_s_addresses_are_those_of_the_socket_unit(tmp_path: Path) -> None:
    file = tmp_path / "etc/terrace/terraced.toml"
    file.parent.mkdir(parents=True)
    file.write_text('nbd.listen = ["[::1]:10900", "0.0.0.0:10809", "localhost:7", "127.0.0.1:0"]\nnbd.socket = "n"\n')
    install(tmp_path)
    written = content(tmp_path)
    listening = [line for line in written["etc/systemd/system/terraced.socket"].splitlines() if "ListenStream" in line]
    assert listening == [
        "ListenStream=[::1]:10900",
        "ListenStream=0.0.0.0:10809",
        "ListenStream=/var/lib/terrace/n",
        "ListenStream=/var/lib/terrace/api.sock",
    ]
    assert "terraced --config /etc/terrace/terraced.toml\n" in written[SERVICE]
    file.write_text("nbd.listne = []\n")
    assert "terraced.toml:1: nbd.listne" in install(tmp_path, status=1)
    assert content(tmp_path).keys() == written.keys()
    assert "no-such.toml: can't be read" in install(tmp_path, "--config", "/no-such.toml", status=1)


def test_signs_in_paths_that_mean_something_to_systemd_are_written_so_that_they_do_not() -> None:
    home = Path('/srv/100% "my" disks/$HOME')
    files = render(Installation(Path("/opt/a b/bin"), home, None, parse_config("", "none")))
    service = files["terraced.service"]
    assert '\nExecStart="/opt/a b/bin/terraced" --home "/srv/100%% \\"my\\" disks/$$HOME"\n' in service
    assert '\nReadWritePaths="/srv/100%% \\"my\\" disks/$HOME"\n' in service
    assert '\nListenStream=/srv/100%% "my" disks/$HOME/nbd.sock\n' in files["terraced.socket"]
    with pytest.raises(UnitError, match="character"):
        this_installation(Path("/srv/a\nb"), None, parse_config("", "none"))


def test_a_place_that_can_not_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "etc").write_text("")
    said = install(tmp_path, status=1)
    assert "etc/systemd/system/terraced.service" in said and said.startswith("Error: ")


def test_programs_that_others_can_change_are_noticed(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "terraced"
    program.touch()
    (tmp_path / "bin").chmod(0o777)
    assert writable_by_others(program) in (tmp_path / "bin", program)
    assert writable_by_others(Path("/bin/sh")) is None


def test_a_mount_point_that_the_sandbox_would_hide_is_warned_of(tmp_path: Path) -> None:
    file = tmp_path / "etc/terrace/terraced.toml"
    file.parent.mkdir(parents=True)
    file.write_text('fuse.mountpoint = "/srv/volumes"\n')
    assert "terrace mount /srv/volumes" in install(tmp_path)


def test_a_wheel_has_the_templates(tmp_path: Path) -> None:
    """Without the network: by the build backend itself."""
    script = f"import hatchling.build; print(hatchling.build.build_wheel({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert {f"terrace/units/{name}" for name in TARGETS} < set(zipfile.ZipFile(wheel).namelist())
