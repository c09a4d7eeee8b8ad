"""``python -m penex`` is the command ``penex``."""

from penex.cli import main

main()
