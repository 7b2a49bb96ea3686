"""What this site needs beyond Sphinx: the command line's reference, and two small translations."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import typer
from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxDirective

import hpsched
from hpsched.cli import app as hpsched_app

_BOLD = re.compile(r"\[bold\](.*?)\[/\]")
_MARKUP = re.compile(r"\[/?[a-z ]*\]")  # Rich's, in help texts
_OPTION = re.compile(r"(?<![`\w-])--[a-z][a-z-]*(?![^`]*`)")  # outside of code
_SEVERAL = re.compile(r"^:(ivar|param) \w+(, \w+)+:")
_FILE = re.compile(r"^```(\w+) title=(\S+)$", re.MULTILINE)


class CliReference(SphinxDirective):
    """``{cli-reference}``: every command and option, read from the Typer application itself."""

    def run(self) -> list[nodes.Node]:
        """Write the reference as Markdown and let the page parse it."""
        command = typer.main.get_command(hpsched_app)
        text = "\n".join(_command(command, ("hpsched",), "HPSCHED"))
        return self.parse_text_to_nodes(text, allow_section_headings=True)


def _command(command: Any, path: tuple[str, ...], prefix: str) -> Iterator[str]:
    """Markdown for a command and, after it, those below it."""
    shown = [param for param in command.params if not param.hidden]
    arguments = [param for param in shown if param.param_type_name == "argument"]
    options = [param for param in shown if param.param_type_name == "option"]
    below = getattr(command, "commands", {})
    yield f"{'#' * (len(path) + 1)} {' '.join(path)}\n"
    yield f"{_plain(command.help or '')}\n"
    if not below:
        wanted = " ".join(_argument(argument) for argument in arguments)
        usage = f"{' '.join(path)} {wanted}".rstrip()
        yield f"```text\n{usage}{' [OPTIONS]' if options else ''}\n```\n"
    for param in (*arguments, *options):
        yield from _param(param, prefix)
    if command.epilog:
        yield f"{_example(_plain(command.epilog))}\n"
    for name, child in below.items():
        child_prefix = f"{prefix}_{name}".upper().replace("-", "_")
        yield from _command(child, (*path, name), child_prefix)


def _param(param: Any, prefix: str) -> Iterator[str]:
    """A term and its definition: names, help, default, environment variable."""
    is_argument = param.param_type_name == "argument"
    names = [_argument(param)] if is_argument else [*param.opts, *param.secondary_opts]
    value = "" if is_argument or param.is_flag else f" {param.metavar or param.name.upper()}"
    text = " ".join(_plain(param.help or "").split())
    facts = ["required"] if param.required and not is_argument else []
    if param.show_default and param.default is not None and param.default is not False:
        facts.append(f"default `{param.default}`")
    if not (is_argument or param.is_eager) and (variable := _variable(param, prefix)):
        facts.append(f"environment `{variable}`")
    known = f" ({'; '.join(facts)})" if facts else ""
    yield f"`{', '.join(names)}{value}`"
    yield f": {text}{known}\n"


def _variable(param: Any, prefix: str) -> str | None:
    automatic = f"{prefix}_{param.name}".upper() if param.allow_from_autoenv else None
    return str(param.envvar) if param.envvar else automatic


def _argument(param: Any) -> str:
    name = (param.metavar or param.name).upper()
    many = "..." if param.nargs == -1 or param.multiple else ""
    return f"{name}{many}" if param.required else f"[{name}{many}]"


def _plain(text: str) -> str:
    text = _OPTION.sub(r"`\g<0>`", _MARKUP.sub("", _BOLD.sub(r"`\1`", text)))
    return text.replace("*", r"\*").replace("<", r"\<").strip()


def _example(text: str) -> str:
    if text.startswith("Example: "):
        command = text.removeprefix("Example: ").replace("`", "")
        return f"Example: `{command}`"
    return text


def _name_files(app: Sphinx, page: str, source: list[str]) -> None:
    """Show the file name of ```` ```python title=train.py ````, which GitHub leaves out too."""
    source[0] = _FILE.sub(r"```{code-block} \1\n:caption: \2\n", source[0])


def _public_name(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.Element
) -> nodes.Element | None:
    """Link a type by its public name: annotations name the module that holds it."""
    name = node.get("reftarget", "").rpartition(".")[2]
    if node.get("refdomain") != "py" or name not in hpsched.__all__:
        return None
    return env.domains["py"].resolve_xref(
        env, node["refdoc"], app.builder, "obj", f"hpsched.{name}", node, content
    )


def _before_napoleon(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Keep Napoleon from reading "Rate of the lowest loss: …" of a property as a type."""
    if what in ("property", "data"):
        lines[:0] = ["..", ""]  # an empty comment


def _after_napoleon(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Keep Sphinx from reading "low, high: …" as an attribute "high" of type "low,"."""
    for index, line in enumerate(lines):
        lines[index] = _SEVERAL.sub(lambda found: found[0].replace(", ", ",\u2060"), line)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    app.add_directive("cli-reference", CliReference)
    app.connect("source-read", _name_files)
    app.connect("missing-reference", _public_name)
    app.connect("autodoc-process-docstring", _before_napoleon, priority=400)
    app.connect("autodoc-process-docstring", _after_napoleon, priority=600)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
