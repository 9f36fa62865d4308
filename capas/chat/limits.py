"""Render untrusted chat templates within limits: their work is counted, equally on every machine.

A chat template is a program that somebody else wrote. Loop items, calls, and the characters and items that an
operation works on are counted as steps, and one rendering may take MAX_STEPS. No clock is involved, so the
limit also holds in threads and on slow machines.
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
_MAX_BITS = 100_000  # size of an integer
_MAX_WRITTEN = 5 * MAX_LENGTH  # characters that one rendering outputs, macros and blocks included
_CALL, _ITEMS, _CHARACTERS = 20, 10, 1000  # steps per call; items per step; characters per step
# Filters that no template can name, because of the space.
_COUNT, _WEIGH, _JOIN = "capas count", "capas weigh", "capas join"
# A format whose width has six digits, or is taken from an argument.
_WIDTH = re.compile(r"[%{][^%{}]*?\d{6}|%[^%a-zA-Z]*\*")
# Filters that iterate over the items of their input but do not look inside the items.
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
    """An error raised when a rendering exceeds a limit."""


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """The Jinja environment of transformers' chat templates, with limits, for one rendering at a time."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols, _Generation],
            optimized=False,  # otherwise Jinja computes constants while compiling, without limits
        )
        self.finalize = self._written
        del self.globals["lipsum"], self.filters["random"]  # rendering must be deterministic
        self.filters = {name: self.limited(name, f) for name, f in self.filters.items()}
        self.filters |= {_COUNT: self._counted, _WEIGH: self._weighed, _JOIN: self._joined}
        self._num_steps = self._num_written = 0

    def compiled(self, tree: nodes.Template) -> jinja2.Template:
        """Return the template of a syntax tree, which is modified in place."""
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
        """Return a filter whose work is counted."""

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
        """Count the arguments of a method or filter, and check the size that they give to its result."""
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
        if name == "join":
            # The filter takes the items first, the method the separator.
            items = next((v for v in (text, *values) if not isinstance(v, str)), "")
            texts = [v for v in (text, *values) if isinstance(v, str)]
            between = max(map(len, texts), default=0) * len(items)
            self._check_length(between + sum(len(i) for i in items if isinstance(i, str)))

    def _check_operands(self, operator: str, left: Any, right: Any) -> None:
        """Check, before it is computed, that the result of an operator is not too large."""
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
        """Count the length of a value, and return the value."""
        if isinstance(value, str):
            self._check_length(len(value))
            self._step(len(value) // _CHARACTERS)
        elif isinstance(value, list | tuple | range | Mapping):
            self._check_length(len(value))
            self._step(len(value) // _ITEMS)
        return value

    def _weigh_all(self, value: Any) -> None:
        """Count a value and everything in it, because turning it into text visits everything."""
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
        """Count an output and return it; taking the context keeps Jinja from computing it while compiling."""
        if isinstance(value, str):
            self._step()
            self._num_written += len(value)
            if self._num_written > _MAX_WRITTEN:
                raise TooMuchError(f"it writes more than {_MAX_WRITTEN:,} characters")
        else:
            self._weigh_all(value)
        return value

    def _counted(self, items: Any) -> Any:
        """Return the iterable of a loop, its items counted."""
        if isinstance(items, str | list | tuple | Mapping | range):
            self._step(len(items) + 1)
            return items
        return items if isinstance(items, jinja2.Undefined) else self._counting(items)

    def _counting(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self._step()
            yield item

    def _joined(self, *values: Any) -> str:
        """Return the result of `first ~ other ~ ...`, with its length checked."""
        for value in values:
            self._weigh_all(value)
        texts = [str(value) for value in values]
        self._check_length(sum(map(len, texts)))
        return "".join(texts)


class _Counting(NodeTransformer):
    """A visitor that puts counters around loops, and around texts that are joined, cut or searched."""

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802  Jinja's naming of visitors
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
    """Return the node of `value | name(arguments)`, where `value` is an expression."""
    return nodes.Filter(value, name, list(arguments), [], None, None, lineno=value.lineno)


class _Generation(Extension):
    """The tag `{% generation %}`, which marks the assistant's part for other tools and changes no text."""

    tags = {"generation"}  # noqa: RUF012  Jinja's extensions declare tags this way

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


_CONTEXTS = (Context, nodes.EvalContext, jinja2.Environment)


def line_of(error: BaseException) -> int | None:
    """Return the template's line at which an error arose, which Jinja puts into the traceback, or None."""
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename in ("<template>", "<unknown>"):
            line = trace.tb_lineno
        trace = trace.tb_next
    return line
