"""`python -m ckptc`."""

from ckptc.cli.main import main

main()
