"""Proofs of meaning: a checkpoint's own model and the target's model compute the same, or differ from a point that has a name.

    case       one tiny configuration, written for both sides from one place
    prover     makes the checkpoint, converts it, runs both models in Pythons of their own, exports
    compare    where the two part, in words
    record     a proof that passed, kept beside the mapping

The programs in `sides/` run in those other Pythons; nothing of them is imported here.
"""
