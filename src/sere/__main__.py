"""`python -m sere`."""

from sere.cli import main

raise SystemExit(main())
