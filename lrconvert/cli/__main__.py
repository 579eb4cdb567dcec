"""``python -m lrconvert.cli``."""

from lrconvert.cli import main

main()
