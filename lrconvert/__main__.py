"""``python -m lrconvert``."""

from lrconvert.cli import main

main()
