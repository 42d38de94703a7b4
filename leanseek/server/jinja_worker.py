"""Renders one chat template. Run as a script, it is the confined process for templates of model folders.

It imports nothing from leanseek, so the process starts fast and holds nothing that a template could steal.
"""

from __future__ import annotations

import itertools
import json
import resource
import sys
from datetime import datetime
from typing import Any, NoReturn

import jinja2.debug  # noqa: F401  (Jinja loads it late, when files are out of reach)
from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY_BYTES = 1 << 30
CPU_SECONDS = 10  # per answer; ends the process even if its parent is gone
MAX_OUTPUT = 16_000_000  # characters


class _GenerationTag(Extension):
    """`{% generation %}`, with which templates mark the assistant's text; it does not change the output."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's interface)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> ImmutableSandboxedEnvironment:
    """The template dialect of `transformers`, without a loader."""
    extensions = [loopcontrols, _GenerationTag]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _to_json  # Jinja's own escapes HTML
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _iterates_content(tree: nodes.Template) -> bool:
    """Whether the template loops over a message's `content`, and so takes it as a list of parts."""
    names = {"content"}  # its usual name in macros, and every variable it is assigned to

    def is_content(node: nodes.Node | None) -> bool:
        while isinstance(node, nodes.Filter):
            node = node.node
        match node:
            case nodes.Name():
                return node.name in names
            case nodes.Getattr():
                return node.attr == "content"
            case nodes.Getitem():
                return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
        return False

    for assignment in tree.find_all(nodes.Assign):
        if isinstance(assignment.target, nodes.Name) and is_content(assignment.node):
            names.add(assignment.target.name)
    return any(is_content(loop.iter) for loop in tree.find_all(nodes.For))


class Template:
    """A compiled template.

    variables: names that it reads. takes_parts: whether it reads a message's content as a list of parts.

    Raises:
        jinja2.TemplateError: the source is not a template.
    """

    def __init__(self, source: str):
        environment = _environment()
        self._template = environment.from_string(source)
        tree = environment.parse(source)
        self.variables = frozenset(find_undeclared_variables(tree))
        self.takes_parts = _iterates_content(tree)

    def render(self, variables: dict[str, Any]) -> str:
        """Raises jinja2.TemplateError, or any Python exception if the template misuses a value."""
        parts, length = [], 0
        for part in self._template.generate(**variables):
            parts.append(part)
            length += len(part)
            if length > MAX_OUTPUT:
                raise TemplateError(f"wrote more than {MAX_OUTPUT:,} characters")
        return "".join(parts)


def _main() -> None:
    """Lines of JSON: first the source in and what it reads out; then variables in and a text out, repeatedly."""
    source = json.loads(sys.stdin.readline())
    # Reads codecs and the time zone while files are in reach.
    Template(r"{{ '\n' }}{{ strftime_now('%c') }}").render({})
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
    template: Template | None = None
    for line in itertools.chain([""], sys.stdin):
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(used.ru_utime + used.ru_stime) + CPU_SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        try:
            if template is None:
                template = Template(source)
                reads = {"variables": sorted(template.variables), "takes_parts": template.takes_parts}
                answer: dict[str, Any] = reads
            else:
                answer = {"text": template.render(json.loads(line))}
        except Exception as error:
            answer = {"error": str(error) or type(error).__name__}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _main()
