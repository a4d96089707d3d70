"""A repository's page: its card as HTML, and its files."""

from html import escape

from markdown_it import MarkdownIt

from .metadata import head_of
from .store import Repo, Store


_STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:900px;margin:2em auto;padding:0 1em;color:#1a1a1a}
table{border-collapse:collapse;display:block;overflow-x:auto}td,th{border:1px solid #ccc;padding:.25em .6em}
pre,code{background:#f4f4f4;border-radius:4px}pre{padding:.8em;overflow-x:auto}img{max-width:100%}
header{color:#555;border-bottom:1px solid #ccc}.tag{background:#eef;border-radius:4px;padding:.1em .5em;margin-right:.3em}"""


def page_of(repo: Repo, store: Store, address: str) -> str:
    """Return the page of a repository.

    Args:
        repo: Which.
        store: Where its contents are.
        address: Of the repository, for the pictures of its card.
    """
    commit = repo.at("main")
    card = store.contents[commit.files["README.md"].sha256].decode() if "README.md" in commit.files else "No card."
    head = head_of(card)
    body = card[card.index("---", 3) + 3 :] if head else card
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = markdown.parse(body)
    for token in [inner for outer in tokens for inner in (outer.children or [])]:
        if token.type == "image" and "://" not in token.attrs["src"]:
            token.attrs["src"] = f"{address}/resolve/main/{token.attrs['src']}"
    files = "".join(f"<li>{escape(path)} ({file.size:,} bytes)</li>" for path, file in sorted(commit.files.items()))
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(repo.id)}</title><style>{_STYLE}</style>"
        f"<header><h2>{escape(repo.id)}</h2><p>{'private, ' * repo.private}{escape(commit.title)}, {commit.sha[:10]}</p>"
        f"<pre>{escape(head or 'no metadata')}</pre></header>{markdown.renderer.render(tokens, markdown.options, {})}"
        f"<h2>Files</h2><ul>{files}</ul></html>"
    )
