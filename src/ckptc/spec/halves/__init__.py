"""Two halves become rules: what a checkpoint on the Hub holds, and what a target's tree holds, in terms of logical tensors.

    family + parts ─┐
                    ├─ records ── derive ── lower ──► a mapping of explicit rules, each with its reasons
    block + parts ──┘

`docs/dialect.md` says what the dialect is and why.
"""
