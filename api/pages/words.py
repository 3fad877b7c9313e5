"""What strangers typed, as pages show it; and where their changes are looked at."""

import re
from typing import Final
from urllib.parse import urlsplit

from millrace.webhook import Provider, SourceEvent

_UNSEEN: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]")
_MOST_CHARS: Final = 300


def plain(text: object) -> str:
    """`text` without characters that are not seen, or turn others round. Escaping is the template's."""
    return _UNSEEN.sub("\N{REPLACEMENT CHARACTER}", str(text or ""))[:_MOST_CHARS]


def changes_at(provider: Provider, event: SourceEvent) -> str | None:
    """The address at which the server shows the changes; None where it is no address for a browser."""
    page = event.page or ""
    try:
        address = urlsplit(page)
    except ValueError:
        return None
    if address.scheme not in ("http", "https") or not address.hostname or address.username or _UNSEEN.search(page):
        return None
    page = page.rstrip("/")
    if provider is Provider.GITHUB:
        return f"{page}/files/{event.commit}"
    return f"{page}/diffs" if provider is Provider.GITLAB else f"{page}/diff" if "/pull-requests/" in page else page
