"""The dashboard as one WSGI application: hpsched's live page and the Optuna Dashboard, one gate.

::

    /                     → /hpsched/
    /hpsched/login        log-in; all that answers without one, with its style
    /hpsched/logout
    /hpsched/here         from a page of the Optuna Dashboard to the live page of its study
    /hpsched/…            the live page
    everything else       the Optuna Dashboard

The gate stands before everything, known or not, so that no route can be forgotten. Who looks may
GET and HEAD; whatever else a request does needs the role editor and has to come from a page of
ours: the Optuna Dashboard sends no CSRF token, so what counts is what browsers say of a request's
origin, which no page can change.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from flask import (
    Blueprint,
    Flask,
    Response,
    abort,
    g,
    redirect,
    render_template,
    request,
    session,
    url_for,
)
from flask.sessions import SecureCookieSessionInterface
from jinja2 import StrictUndefined
from optuna.storages import BaseStorage
from werkzeug.exceptions import HTTPException, TooManyRequests
from werkzeug.middleware.proxy_fix import ProxyFix
from werkzeug.wrappers import Response as BaseResponse

from hpsched.web.access import SESSION_SECONDS, Access, Account, Role
from hpsched.web.live import make_blueprint
from hpsched.web.optuna_side import OptunaDashboard

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

LOOKS, CHANGES = frozenset({"GET", "HEAD"}), frozenset({"POST", "PUT", "PATCH", "DELETE"})
PUBLIC_FILES = frozenset({"style.css", "theme.js", "icon.svg"})  # of the log-in page
LARGEST = 4 * 2**20  # bytes of a request; the largest that people write are notes
LARGEST_FORM = 16 * 2**10
HSTS_SECONDS = 30 * 86_400
#: For hpsched's own pages, whose scripts and styles are all in files.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "font-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_STUDY = re.compile(r"/dashboard/studies/(\d{1,18})(?:/|$)")
#: A path on this server; browsers read // and /\ as another one, and leave out tabs and newlines.
_LOCAL = re.compile(r"/(?:[!-.0-\[\]-~][!-\[\]-~]*)?")


def create_app(
    storage: BaseStorage, access: Access, *, prefix: str = "", proxy: bool = False
) -> Flask:
    """The whole dashboard.

    Args:
        storage: The studies'.
        access: Who gets in.
        prefix: What all addresses begin with, such as ``/search``, or an empty text.
        proxy: Whether requests come through one reverse proxy, whose X-Forwarded-For, -Proto and
            -Host are then believed.

    Raises:
        UsageError: The installed Optuna Dashboard cannot be served under a prefix.
    """
    app = Flask("hpsched.web", static_folder=None)
    app.jinja_options = {"autoescape": True, "undefined": StrictUndefined}
    app.secret_key = access.key
    app.session_interface = _Sessions()
    app.config.update(
        MAX_CONTENT_LENGTH=LARGEST,
        PERMANENT_SESSION_LIFETIME=SESSION_SECONDS,
        # Browsers keep one jar for all ports of a host: two dashboards there need two names.
        SESSION_COOKIE_NAME=f"hpsched-{access.fingerprint}",
        SESSION_COOKIE_PATH=prefix or "/",
        # A link to a study, in a chat or a wiki, should find one logged in; it can only look.
        SESSION_COOKIE_SAMESITE="Lax",
        SESSION_REFRESH_EACH_REQUEST=False,
    )
    gate = _Gate(access)
    app.before_request(gate.check)
    app.after_request(_harden)
    app.register_error_handler(HTTPException, _explain)
    app.context_processor(lambda: {"account": g.get("account"), "logs_in": access.anyone is None})
    app.register_blueprint(make_blueprint(storage), url_prefix="/hpsched")
    app.register_blueprint(_entrance(access), url_prefix="/hpsched")
    _serve_optuna(app, OptunaDashboard(storage, prefix))
    wsgi = _under(prefix, app.wsgi_app)
    if proxy:
        wsgi = ProxyFix(wsgi, x_for=1, x_proto=1, x_host=1)
    app.wsgi_app = wsgi  # type: ignore[assignment, method-assign]
    return app


class _Sessions(SecureCookieSessionInterface):
    """Flask's signed cookies, which keep to TLS where there is TLS."""

    def get_cookie_secure(self, app: Flask) -> bool:
        return request.is_secure


def _under(prefix: str, wsgi: WSGIApplication) -> WSGIApplication:
    """``wsgi`` under a prefix, whether or not the proxy in front has taken it off."""
    if not prefix:
        return wsgi

    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Any:
        path = environ["PATH_INFO"]
        if path == prefix or path.startswith(f"{prefix}/"):
            path = path.removeprefix(prefix) or "/"
        return wsgi({**environ, "SCRIPT_NAME": prefix, "PATH_INFO": path}, start_response)

    return answer


# -- the gate --------------------------------------------------------------------------------------


class _Gate:
    """Lets a request through, or answers it."""

    def __init__(self, access: Access) -> None:
        self._access = access

    def check(self) -> BaseResponse | None:
        """None for a request that may go on.

        Raises:
            HTTPException: It may not.
        """
        self._check_host()
        if (request.content_length or 0) > LARGEST:
            abort(413)
        bearer = self._bearer()
        g.account = self._access.anyone or bearer or self._access.resume(session)
        if request.endpoint == "entrance.login" or _is_public_file():
            pass
        elif g.account is None:
            return _turned_away()
        if request.method in LOOKS:
            return None
        if request.method not in CHANGES:
            abort(405, valid_methods=sorted(LOOKS | CHANGES))
        if bearer is None and not _is_from_here():
            abort(403, "This request does not come from a page of this dashboard.")
        if (request.blueprint or "") != "entrance" and g.account.role != Role.EDITOR:
            abort(403, "You may look, and change nothing: that takes the role editor.")
        return None

    def _check_host(self) -> None:
        if self._access.hosts is not None and _host() not in self._access.hosts:
            abort(
                403,
                "This dashboard has no log-in and answers to the names of this machine alone: "
                "open it as http://127.0.0.1 or http://localhost, with its port.",
            )

    def _bearer(self) -> Account | None:
        """The account of a token in the request's header; a wrong one is refused."""
        given = request.authorization
        if self._access.anyone or given is None or given.type != "bearer":
            return None
        found = self._access.log_in("", given.token or "", request.remote_addr or "")
        return found or abort(_unauthorized("This token is not, or no longer, valid."))


def _host() -> str:
    """The name in the Host header, without the port; empty for one that cannot be read."""
    try:
        return urlsplit(f"//{request.host}").hostname or ""
    except (ValueError, HTTPException):
        return ""


def _is_public_file() -> bool:
    arguments = request.view_args or {}
    is_file = request.endpoint == "hpsched.static" and arguments.get("filename") in PUBLIC_FILES
    return is_file and request.method in LOOKS


def _is_from_here() -> bool:
    """Whether a browser says that a page of ours made this request."""
    if site := request.headers.get("Sec-Fetch-Site"):
        return site == "same-origin"
    return request.headers.get("Origin") == f"{request.scheme}://{request.host}"


def _turned_away() -> BaseResponse:
    if request.method in LOOKS and _wants_page():
        wanted = request.full_path.rstrip("?")
        return redirect(url_for("entrance.login", next=wanted if wanted != "/" else None), 303)
    abort(_unauthorized("Log in first, or send a token: Authorization: Bearer TOKEN."))


def _unauthorized(why: str) -> BaseResponse:
    answer = Response(_reason(why), 401, mimetype="application/json")
    answer.headers["WWW-Authenticate"] = "Bearer"
    return answer


# -- log-in and log-out ----------------------------------------------------------------------------


def _entrance(access: Access) -> Blueprint:
    made = Blueprint("entrance", __name__)

    @made.route("/login", methods=["GET", "POST"])
    def login() -> BaseResponse | tuple[str, int] | tuple[str, int, dict[str, str]]:
        request.max_content_length = LARGEST_FORM
        wanted = request.values.get("next", "")
        target = request.script_root + (wanted if _LOCAL.fullmatch(wanted) else "/")
        if g.account is not None:
            return redirect(target, 303)
        if request.method != "POST":
            return _form(access, wanted), 200
        name, secret = request.form.get("name", "").strip(), request.form.get("secret", "")
        try:
            account = access.log_in(name, secret, request.remote_addr or "")
        except TooManyRequests as error:
            wait = {"Retry-After": str(error.retry_after)}
            return _form(access, wanted, name, str(error.description)), 429, wait
        if account is None:
            what = "User name or password is wrong." if access.users else "The token is wrong."
            return _form(access, wanted, name, what), 401
        session.clear()
        session.update(access.begin(account))
        session.permanent = True
        return redirect(target, 303)

    @made.post("/logout")
    def logout() -> BaseResponse:
        if "id" in session:
            access.end(session)
        session.clear()
        return redirect(url_for("entrance.login"), 303)

    @made.get("/here")
    def here() -> BaseResponse:
        """From the Optuna Dashboard to the live page of the study that it shows."""
        if found := _STUDY.search(urlsplit(request.referrer or "").path):
            return redirect(url_for("hpsched.study", study_id=int(found[1])), 303)
        return redirect(url_for("hpsched.index"), 303)

    return made


def _form(access: Access, wanted: str, name: str = "", error: str = "") -> str:
    return render_template(
        "login.html.jinja",
        wanted=wanted,
        name=name,
        error=error,
        with_users=access.users is not None,
        with_tokens=bool(access.tokens),
    )


# -- the Optuna Dashboard, headers, errors ---------------------------------------------------------


def _serve_optuna(app: Flask, optuna: OptunaDashboard) -> None:
    methods = sorted(LOOKS | CHANGES)

    @app.route("/<path:path>", methods=methods, provide_automatic_options=False)
    def theirs(path: str) -> BaseResponse:
        if path.startswith("hpsched/"):
            abort(404)
        answer = optuna.answer(request.environ)
        if answer.status_code >= 400 and answer.mimetype == "text/html":
            abort(answer.status_code)
        return answer

    @app.get("/")
    def root() -> BaseResponse:
        return redirect(url_for("hpsched.index"), 303)


def _harden(answer: Response) -> Response:
    """Add the headers that every answer has, errors too."""
    for name, value in HEADERS.items():
        answer.headers.setdefault(name, value)
    answer.headers.pop("Access-Control-Allow-Origin", None)
    if request.is_secure:
        answer.headers["Strict-Transport-Security"] = f"max-age={HSTS_SECONDS}"
    if request.path.startswith("/static/") or request.endpoint == "hpsched.static":
        answer.headers["Cache-Control"] = "private, no-cache"  # kept, and asked for again
    elif not answer.cache_control.private:
        answer.headers["Cache-Control"] = "no-store"
    return answer


def _explain(error: HTTPException) -> BaseResponse:
    """An error as a page for people, as JSON for programs (the Optuna Dashboard shows that)."""
    if error.response is not None:
        return error.get_response()
    answer = error.get_response(request.environ)
    if answer.status_code < 400:  # a redirect
        return answer
    why = error.description or error.name
    if _wants_page():
        answer.set_data(render_template("problem.html.jinja", title=error.name, why=why))
        answer.mimetype = "text/html"
    else:
        answer.set_data(_reason(why))
        answer.mimetype = "application/json"
    return answer


def _reason(why: str) -> str:
    return json.dumps({"reason": why})


def _wants_page() -> bool:
    return "text/html" in request.headers.get("Accept", "")
