"""Adds README.md and the files of the repository that the documentation links to, such as results, to the site."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"(\]\(|src=\"|href=\")([^)#:\s\"]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds files at their paths in the repository, those of docs/ at the top, and README.md as the first page."""
    files.append(File.generated(config, "index.md", abs_src_path=str(ROOT / "README.md")))
    pages = [file for file in files.documentation_pages() if not file.src_uri.startswith("api/")]
    while pages:
        source = Path(pages.pop().abs_src_path or "")
        for _, link in _LINK.findall(source.read_text("utf-8")):
            target = (source.parent / link).resolve()
            uri = _find_uri(target)
            if target.is_file() and files.get_file_from_path(uri) is None:
                files.append(file := File.generated(config, uri, abs_src_path=str(target)))
                pages += [file] if file.is_documentation_page() else []
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrites links for the pages' places in the site; a link to a folder becomes its text."""
    source = Path(page.file.abs_src_path or "")

    def rewrite(match: re.Match[str]) -> str:
        target = (source.parent / match[2]).resolve()
        if not target.is_file():
            return match[0]
        depth = page.file.src_uri.count("/")
        return match[1] + "../" * depth + _find_uri(target)

    markdown = re.sub(r"\[([^\]]+)\]\(([^)#:\s]+/)\)", r"\1", markdown)
    return _LINK.sub(rewrite, markdown)


def _find_uri(target: Path) -> str:
    """The place of a file in the site."""
    if target == ROOT / "README.md":
        return "index.md"
    folder = ROOT / "docs" if target.is_relative_to(ROOT / "docs") else ROOT
    return target.relative_to(folder).as_posix() if target.is_relative_to(ROOT) else target.name
