"""`python -m terrace.cli`."""

from terrace.cli import main

main()
