"""Passwords taken out of text. Uses nothing but the standard library."""

from __future__ import annotations

import re

# A user name or a password may hold an @, and (SQLAlchemy allows it) a password a space; it then
# ends at the first @, and does not reach into a path, as in "http://host:80/a b@c".
_IN_URL = re.compile(r"(://[^:/\s]*):(?:\S*|[^@/\n]*)@")
_IN_QUERY = re.compile(r"""(?i)(\w*passw(?:or)?d(?:=|["']\s*:\s*))(?:'[^']*'|"[^"]*"|[^&\s'"]+)""")


def redact(text: str) -> str:
    """``text`` with the password of every URL in it replaced by ``***``."""
    return _IN_QUERY.sub(r"\1***", _IN_URL.sub(r"\1:***@", text))
