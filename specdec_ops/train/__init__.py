"""Training of drafts, each a program: `python -m specdec_ops.train.eagle --target FOLDER --out FOLDER`.

eagle    EAGLE's layer over the target's last rows, for `Eagle`
"""
