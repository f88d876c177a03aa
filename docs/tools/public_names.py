"""An extension of Griffe: public names are what specdec_ops/__init__.py imports, and backticks link to them."""

import re

import griffe


class PublicNames(griffe.Extension):
    """Griffe reads sources without importing them, so a module hides a function that has its name: this undoes it."""

    def on_package(self, *, pkg, loader, **_):
        """Put what the package imports in place of modules of the same names, then make links."""
        public = [str(name) for name in pkg.exports or ()]
        found = {name: pkg.modules_collection[pkg.imports[name]] for name in public if name in pkg.imports}
        linked = set()
        for name in found:
            linked.add(name)
            if found[name].is_class:
                linked |= {f"{name}.{member.name}" for member in found[name].members.values() if member.docstring}
        _link_docstrings(pkg, linked, set())
        for name, thing in found.items():
            if not thing.is_module:
                pkg.members[name] = griffe.Alias(name, thing, parent=pkg)


def _link_docstrings(thing, linked, seen):
    if thing.is_alias or thing.path in seen:
        return
    seen.add(thing.path)
    if thing.docstring:
        own = thing.name if thing.is_class else thing.parent.name if thing.parent and thing.parent.is_class else ""
        thing.docstring.value = _with_links(thing.docstring.value, linked, own)
    for member in list(thing.members.values()):
        _link_docstrings(member, linked, seen)


def _with_links(text, linked, own):
    """Backticked public names, and with a dot their members, as cross-references; examples stay as they are."""

    def link(match):
        if not match[1]:
            return r"]\["  # the shape of a nested list, [a][b], which is no link
        name = match[1].removeprefix("specdec_ops.")
        return f"[`{match[1]}`][specdec_ops.{name}]" if name in linked and name != own else match[0]

    lines = text.split("\n")
    for index, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            lines[index] = re.sub(r"`([^`\n]*)`|\]\[", link, line)
            lines[index] = re.sub("::$", ":", lines[index])  # before a sketch of code
    return "\n".join(lines)
