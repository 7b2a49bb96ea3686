"""The Optuna Dashboard, as it is installed, inside hpsched's web application.

Its pages get a link to hpsched's live page and a Content-Security-Policy; under a prefix, the
addresses in its page and in its script get the prefix in front, as a reverse proxy would do it.
Nothing else of it is changed, and without a prefix its script is served as it is.
"""

from __future__ import annotations

import gzip
from functools import cached_property
from typing import TYPE_CHECKING

import optuna_dashboard
from optuna.storages import BaseStorage
from werkzeug.test import create_environ
from werkzeug.wrappers import Response

from hpsched.errors import UsageError

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

#: The least with which its pages draw everything. Its parallel-coordinate plot makes code from
#: text (unsafe-eval), its components write styles (unsafe-inline).
POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SCRIPT = "/static/bundle.js"
#: The addresses in its script: what they begin with → where the prefix goes, as {}.
_ADDRESSES = {
    'url_prefix:"/dashboard"': 'url_prefix:"{}/dashboard"',
    "${this.baseURL}/api/": "${this.baseURL}{}/api/",
    "`/csv/": "`{}/csv/",
    "`/artifacts/": "`{}/artifacts/",
}
_LINK = (
    '<nav aria-label="hpsched" style="position:fixed;right:16px;bottom:16px;z-index:1300">'
    '<a href="{}/hpsched/here" style="display:block;padding:8px 14px;border-radius:18px;'
    "background:#0b5c8e;color:#fff;font:600 14px/1.3 system-ui,sans-serif;text-decoration:none;"
    'box-shadow:0 1px 4px rgba(0,0,0,.4)">hpsched live page</a></nav>'
)


class OptunaDashboard:
    """Answers for the Optuna Dashboard.

    Args:
        storage: The studies'.
        prefix: What all addresses begin with, such as ``/search``, or an empty text.

    Raises:
        UsageError: Its script keeps addresses elsewhere than is known here, and there is a prefix.
    """

    def __init__(self, storage: BaseStorage, prefix: str = "") -> None:
        self._wsgi = optuna_dashboard.wsgi(storage)
        self._prefix = prefix
        if prefix:
            self._script  # noqa: B018 (it raises now rather than at the first request)

    def answer(self, environ: WSGIEnvironment) -> Response:
        """The answer to a request."""
        path = environ["PATH_INFO"]
        if self._prefix and path == SCRIPT:
            answer = Response(self._script, mimetype="text/javascript")
            answer.headers["Content-Encoding"] = "gzip"
            answer.add_etag()
            return answer.make_conditional(environ)
        if path == "/dashboard" or path.startswith("/dashboard/"):
            return self._page(environ)
        # Without the header it fails.
        answer = self._ask({"HTTP_ACCEPT_ENCODING": "", **environ})
        if (place := answer.headers.get("Location", "")) and self._prefix:
            answer.headers["Location"] = self._prefix + "/" + place.split("/", 3)[-1]
        return answer

    def _page(self, environ: WSGIEnvironment) -> Response:
        asked = {key: value for key, value in environ.items() if not key.startswith("HTTP_IF_")}
        asked.pop("HTTP_RANGE", None)
        answer = self._ask({**asked, "REQUEST_METHOD": "GET"})
        text = answer.get_data(as_text=True)
        if self._prefix:
            text = text.replace('"/static/', f'"{self._prefix}/static/')
            # Browsers look for it at the root, unless told.
            text = text.replace(
                "</head>", f'<link rel="icon" href="{self._prefix}/favicon.ico"></head>'
            )
        answer.set_data(text.replace("</body>", _LINK.format(self._prefix) + "\n</body>"))
        for header in ("ETag", "Last-Modified", "Accept-Ranges"):  # those of the file as it lies
            answer.headers.pop(header, None)
        answer.headers["Content-Security-Policy"] = POLICY
        return answer

    def _ask(self, environ: WSGIEnvironment) -> Response:
        return Response.from_app(self._wsgi, environ, buffered=True)

    @cached_property
    def _script(self) -> bytes:
        """Its script with the prefix in front of all addresses, zipped."""
        asked = create_environ(path=SCRIPT, headers={"Accept-Encoding": ""})
        text = self._ask(asked).get_data(as_text=True)
        for known, wanted in _ADDRESSES.items():
            if known not in text:
                raise UsageError(
                    "--prefix: the installed Optuna Dashboard keeps its addresses elsewhere than "
                    "hpsched knows. Leave --prefix out and give the dashboard a host name of its "
                    "own."
                )
            text = text.replace(known, wanted.replace("{}", self._prefix, 1))
        return gzip.compress(text.encode(), 6)
