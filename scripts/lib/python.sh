# shellcheck shell=bash
# run_python FILE [ARGUMENT...]: becomes that program, under .venv where scripts/test or scripts/quickstart has made it,
# else under the python3 on PATH, with the checkout importable.
run_python() {
  local root python=python3
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
  [ -x "$root/.venv/bin/python" ] && python=$root/.venv/bin/python
  if ! PYTHONPATH=$root "$python" -c 'import httpx, psutil, rich, terrace' 2>/dev/null; then
    echo "error: Terrace's dependencies are not installed for $python; run scripts/test once, which makes .venv" >&2
    return 1
  fi
  PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "$python" "$@"
}
