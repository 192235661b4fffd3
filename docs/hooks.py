"""For mkdocs: cross-reference roles in docstrings are shown as the name they mean."""

from __future__ import annotations

import re
from typing import Any

_ROLE = re.compile(r":(?:func|class|meth|attr|mod|data|math):<code>([^<]*)</code>")


def on_page_content(html: str, **_: Any) -> str:
    """``:func:`~pomona.data.load``` becomes ``load``, in code type."""
    return _ROLE.sub(lambda match: f"<code>{_shown(match[1])}</code>", html)


def _shown(name: str) -> str:
    return name.rsplit(".", 1)[-1] if name.startswith("~") else name
