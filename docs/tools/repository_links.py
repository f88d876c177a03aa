"""A hook of MkDocs: links that leave docs/ work on the site as they do in the repository.

Inside of MkDocs every page gets its path in the repository. Files outside of docs/ that a page links to come along:
Markdown as a page of its own, anything else as it is. A link to a file that isn't there stays one, and --strict fails.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File, Files

_LINK = re.compile(r"\]\((?!\w+:|#)([^)\s#]+)")


def on_files(files, config):
    """Rename the files of docs/, and add what they link to, and what that links to."""
    folder = Path(config.docs_dir)
    root = folder.parent
    found, pages = {}, []
    for file in files:
        file.url, file.abs_dest_path  # noqa: B018 (both are found once, from the path below docs/, and kept)
        if file.src_dir == config.docs_dir:
            file.src_dir, file.src_uri = str(root), f"{folder.name}/{file.src_uri}"
        found[file.src_uri] = file
        pages += [file] if file.is_documentation_page() else []
    while pages:
        page = pages.pop()
        for link in _LINK.findall((root / page.src_uri).read_text()):
            path = posixpath.normpath(posixpath.join(posixpath.dirname(page.src_uri), link))
            if path in found or path.startswith("..") or not (root / path).is_file():
                continue
            found[path] = File(path, str(root), config.site_dir, config.use_directory_urls)
            pages += [found[path]] if path.endswith(".md") else []
    return Files(found.values())
