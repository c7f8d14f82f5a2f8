"""ckptc, the checkpoint compiler.

The package is the pipeline; a stage imports only stages before it:

    spec -> ops -> ir -> plan -> compile -> io -> run -> cli
"""

__version__ = "0.1.0"
