# shellcheck shell=bash
# ensure_venv [EXTRA]: a virtual environment in .venv of the repository with Terrace installed in editable mode.
# Does nothing when neither pyproject.toml nor Python has changed since the last time; safe to run twice at once.

find_python() {
  local candidate candidates=(python3 python3.14 python3.13 python3.12 python3.11)
  [ -n "${PYTHON-}" ] && candidates=("$PYTHON")
  for candidate in "${candidates[@]}"; do
    if command -v "$candidate" >/dev/null &&
      "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  echo "error: Terrace needs Python 3.11 or later and found" \
    "${PYTHON:-python3} $("${PYTHON:-python3}" --version 2>/dev/null || echo '(not installed)');" \
    "install a newer one or set PYTHON=/path/to/python3" >&2
  return 1
}

ensure_venv() {
  local extra=${1:-} root python version wanted
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
  python=$(find_python) || return 1
  version=$("$python" --version)
  wanted="$version $(sha256sum <"$root/pyproject.toml")"
  # The lock goes with its file descriptor, so a killed run leaves nothing behind.
  exec 9>"$root/.venv.lock"
  flock 9
  if ! grep -qxF -e "$wanted dev" -e "$wanted $extra" "$root/.venv/installed" 2>/dev/null; then
    echo "Preparing .venv (once; about a minute) ..."
    rm -f "$root/.venv/installed"
    "$python" -c 'import ensurepip, venv' 2>/dev/null || "$root/scripts/install-tools" python3-venv || return 1
    if [ "$("$root/.venv/bin/python" --version 2>/dev/null)" != "$version" ] ||
      ! "$root/.venv/bin/python" -m pip --version >/dev/null 2>&1; then
      "$python" -m venv --clear "$root/.venv" || return 1
    fi
    "$root/.venv/bin/python" -m pip install -qq --disable-pip-version-check \
      --editable "$root${extra:+[$extra]}" || {
      echo "error: pip could not install Terrace into $root/.venv; its message is above" >&2
      return 1
    }
    echo "$wanted $extra" >"$root/.venv/installed"
  fi
  exec 9>&-
}
