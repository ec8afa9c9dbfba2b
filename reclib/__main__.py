"""`python -m reclib`: see `reclib.cli`."""

from reclib.cli import entry

raise SystemExit(entry())
