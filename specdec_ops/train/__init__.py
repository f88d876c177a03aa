"""Training of drafts, each a program: `python -m specdec_ops.train.eagle --target FOLDER --out FOLDER`.

eagle    EAGLE's layer over the target's last rows, for `Eagle`
trainer  what they share: minutes, slices, progress, files
texts    the target's own answers to questions that it thinks up
"""
