"""Passes that make a plan of a mapping and a checkpoint's headers. Pure: no I/O."""

import sys

import ckptc

sys.modules[__name__].__class__ = ckptc.CallableStage  # `ckptc.compile(…)`, of the interface
