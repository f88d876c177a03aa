"""Training of drafts, each a program: `python -m specdec_ops.train.eagle --target FOLDER --out FOLDER`.

eagle    EAGLE's layer over the target's last rows, for `Eagle`
decision  networks that stop a draft, for `Decision`
soft     the leading layers of a model with an exit after some of them (SoFT), for `Sorted`
trainer  what they share: `trainer.Task`, minutes, slices, progress, files
texts    the target's own answers to questions that it thinks up
"""
