"""What `specdec_ops` offers: the names of the package that are neither private nor modules of its code."""

import inspect

import specdec_ops

MODULES_OFFERED = ("published_trees",)
PUBLIC = {
    name: thing
    for name, thing in sorted(vars(specdec_ops).items())
    if not name.startswith("_") and (name in MODULES_OFFERED or not inspect.ismodule(thing))
}
