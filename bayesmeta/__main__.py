"""``python -m bayesmeta``."""

from .cli import main

raise SystemExit(main())
