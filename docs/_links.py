"""Pages of the site that lie elsewhere in the repository, and links that lead out of docs/.

The Markdown files are written to be read in the repository, so their links are paths in it.
"""

from __future__ import annotations

import re
from pathlib import Path
from posixpath import dirname, normpath, relpath

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
ELSEWHERE = {  # in the repository -> in the site, where README.md would be a folder's index
    "README.md": "overview.md",
    "csrc/cuda/README.md": "csrc/cuda/README.md",
}
ELSEWHERE |= {name: name for name in (page.relative_to(ROOT).as_posix() for page in sorted((ROOT / "bench").rglob("*.md")))}
LINK = re.compile(r"\[([^\]]+)\]\(([^)#:\s]+)(#[^)]*)?\)")


def on_files(files, config):
    for source, page in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown, page, config, files):
    here = page.file.src_uri
    source = next((source for source, name in ELSEWHERE.items() if name == here), f"docs/{here}")

    def follow(link: re.Match) -> str:
        text, target, anchor = link.groups()
        path = normpath(f"{dirname(source)}/{target}" if dirname(source) else target)
        name = ELSEWHERE.get(path) or path.removeprefix("docs/")
        if files.get_file_from_path(name) is None and (ROOT / path).exists():
            return text  # a source file: the site has no page of it
        return f"[{text}]({relpath(name, dirname(here) or '.')}{anchor or ''})"

    return LINK.sub(follow, markdown)
