"""``python -m resode``."""

from resode.cli import main

main()
