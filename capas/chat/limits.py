"""A Jinja environment whose templates come to an end: what they do is counted, the same on every machine.

A chat template is a program that somebody else wrote. Each item of a loop, each call, and every so many
characters or items that an operation works on take a step, and one rendering may take so many. No clock takes
part: this holds in threads, and on slow machines.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import wraps
from typing import Any

import jinja2
from jinja2 import nodes, pass_context
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_STEPS = 2_000_000  # a conversation of 1,000 messages takes some 50,000
MAX_LENGTH = 10_000_000  # characters of a text, items of a list
_MAX_BITS = 100_000  # of a number
_MAX_WRITTEN = 5 * MAX_LENGTH  # characters that one rendering puts out, macros and blocks included
_CALL, _ITEMS, _CHARACTERS = 20, 10, 1000  # steps of a call; items and characters that are one step
_COUNT, _WEIGH, _JOIN = (
    "capas count",
    "capas weigh",
    "capas join",
)  # filters that no template can name
_WIDTH = re.compile(
    r"[%{][^%{}]*?\d{6}|%[^%a-zA-Z]*\*"
)  # a format as wide as a number of six digits says
# Filters that go through the items of what they get, but not into these.
_ORDERING = ("dictsort", "groupby", "sort", "unique")
_SHALLOW = (
    *(
        "attr",
        "batch",
        "count",
        "d",
        "default",
        "first",
        "items",
        "last",
        "length",
        "list",
        "map",
        "max",
    ),
    *("min", "reject", "rejectattr", "reverse", "select", "selectattr", "slice", "sum", *_ORDERING),
)


class TooMuchError(jinja2.TemplateError):
    """A rendering does more than a chat template has to."""


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """What transformers renders chat templates with, and limits. One rendering at a time."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols, _Generation],
            optimized=False,  # Jinja would compute constant expressions when it compiles, without limits
        )
        self.finalize = self._written
        del self.globals["lipsum"], self.filters["random"]  # the same conversation is the same text
        self.filters = {name: self.limited(name, f) for name, f in self.filters.items()}
        self.filters |= {_COUNT: self._counted, _WEIGH: self._weighed, _JOIN: self._joined}
        self._num_steps = self._num_written = 0

    def compiled(self, tree: nodes.Template) -> jinja2.Template:
        """The template of a parsed text, which is changed."""
        return self.from_string(_Counting().visit(tree))

    def begin(self) -> None:
        """Give the next rendering the whole budget."""
        self._num_steps = self._num_written = 0

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator != "+":
            self._check_operands(operator, left, right)
        return self._weighed(self.binop_table[operator](left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        __self._step(_CALL)
        owner = getattr(__obj, "__self__", None)
        given = (__self._weighed(owner) if isinstance(owner, str) else "", *args, *kwargs.values())
        __self._check_call(getattr(__obj, "__name__", ""), given)
        return __self._weighed(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        found = super().wrap_str_format(value)
        if found is not None:
            self._check_format(value.__self__)
        return found

    def limited(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that is counted."""

        @wraps(function)
        def limited(*args: Any, **kwargs: Any) -> Any:
            self._step(_CALL)
            given = [v for v in (*args, *kwargs.values()) if not isinstance(v, _CONTEXTS)]
            if name == "join" and not isinstance(given[0], str | list | tuple | Mapping):
                given[0] = list(self._counting(given[0]))
                args = (*args[:1], given[0], *args[2:])
            self._check_call(name, given)
            return self._weighed(function(*args, **kwargs))

        return limited

    def _check_call(self, name: str, given: Iterable[Any]) -> None:
        """Count what a method or filter works on, and check the numbers that say how much it makes."""
        text, *values = given
        for value in (text, *values):
            if isinstance(value, int):
                self._check_length(abs(value) if name not in ("range", "safe_range") else 0)
            elif name in _SHALLOW:
                self._weighed(value)
            else:
                self._weigh_all(value)
            if name in _ORDERING and isinstance(value, str | list | tuple | range | Mapping):
                self._step(len(value))
        if isinstance(text, str) and name == "format":
            self._check_format(text)
        if isinstance(text, str) and name == "replace":
            old, new = ([v for v in values if isinstance(v, str)] + ["", ""])[:2]
            self._check_length((text.count(old) if old else len(text) + 1) * len(new))
        if (
            name == "join"
        ):  # of the filter the items come first, of the method the text between them
            items = next((v for v in (text, *values) if not isinstance(v, str)), "")
            texts = [v for v in (text, *values) if isinstance(v, str)]
            between = max(map(len, texts), default=0) * len(items)
            self._check_length(between + sum(len(i) for i in items if isinstance(i, str)))

    def _check_operands(self, operator: str, left: Any, right: Any) -> None:
        """Check that the result of an operator is not too large, before it is computed."""
        if operator == "*":
            for some, count in ((left, right), (right, left)):
                if isinstance(some, str | list | tuple) and isinstance(count, int):
                    self._check_length(len(some) * max(0, count))
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length()
            if bits > _MAX_BITS:
                raise TooMuchError(f"a number of more than {_MAX_BITS:,} bits")
        if operator == "%" and isinstance(left, str):
            self._check_format(left)
            self._weigh_all(right)

    def _check_format(self, text: str) -> None:
        if _WIDTH.search(text):
            raise TooMuchError(f"a format width is too large: {text[:60]!r}")

    def _check_length(self, length: int) -> None:
        if length > MAX_LENGTH:
            raise TooMuchError(f"a text or list of more than {MAX_LENGTH:,} characters or items")

    def _step(self, count: int = 1) -> None:
        self._num_steps += count
        if self._num_steps > MAX_STEPS:
            raise TooMuchError(
                f"its loops and calls exceed {MAX_STEPS:,} steps for one conversation"
            )

    def _weighed(self, value: Any) -> Any:
        """The value, its length counted."""
        if isinstance(value, str):
            self._check_length(len(value))
            self._step(len(value) // _CHARACTERS)
        elif isinstance(value, list | tuple | range | Mapping):
            self._check_length(len(value))
            self._step(len(value) // _ITEMS)
        return value

    def _weigh_all(self, value: Any) -> None:
        """Count a value and everything in it: what becomes text is gone through."""
        self._weighed(value)
        if isinstance(value, Mapping):
            value = value.values()
        elif not isinstance(value, list | tuple):
            return
        for item in value:
            self._step()
            self._weigh_all(item)

    @pass_context
    def _written(self, _context: Context, value: Any) -> Any:
        """What is put out. It gets a context, so that Jinja does not compute constants when it compiles."""
        if isinstance(value, str):
            self._step()
            self._num_written += len(value)
            if self._num_written > _MAX_WRITTEN:
                raise TooMuchError(f"it writes more than {_MAX_WRITTEN:,} characters")
        else:
            self._weigh_all(value)
        return value

    def _counted(self, items: Any) -> Any:
        """What a loop goes through."""
        if isinstance(items, str | list | tuple | Mapping | range):
            self._step(len(items) + 1)
            return items
        return items if isinstance(items, jinja2.Undefined) else self._counting(items)

    def _counting(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self._step()
            yield item

    def _joined(self, *values: Any) -> str:
        """`first ~ other ~ ...`"""
        for value in values:
            self._weigh_all(value)
        texts = [str(value) for value in values]
        self._check_length(sum(map(len, texts)))
        return "".join(texts)


class _Counting(NodeTransformer):
    """Puts counters around what loops go through and where texts are joined, cut or searched."""

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802  as Jinja's visitors are called
        self.generic_visit(node)
        node.iter = _filter(_COUNT, node.iter)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:  # noqa: N802
        self.generic_visit(node)
        return _filter(_JOIN, *node.nodes)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Getitem:  # noqa: N802
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _filter(_WEIGH, node.node)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:  # noqa: N802
        self.generic_visit(node)
        for operand in node.ops:
            if operand.op in ("in", "notin"):
                operand.expr = _filter(_WEIGH, operand.expr)
        return node


def _filter(name: str, value: Any, *arguments: nodes.Expr) -> nodes.Filter:
    """`value | name(arguments)`; `value` is an expression."""
    return nodes.Filter(value, name, list(arguments), [], None, None, lineno=value.lineno)


class _Generation(Extension):
    """`{% generation %}` marks the assistant's part for other tools; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012  as Jinja's extensions declare it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


_CONTEXTS = (Context, nodes.EvalContext, jinja2.Environment)


def line_of(error: BaseException) -> int | None:
    """The line of a template at which it failed: as Jinja wrote it into the traceback."""
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename in ("<template>", "<unknown>"):
            line = trace.tb_lineno
        trace = trace.tb_next
    return line
