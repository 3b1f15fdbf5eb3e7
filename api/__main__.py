"""``python -m hocket`` is the command line."""

from hocket.compiler.cli.main import main

raise SystemExit(main())
