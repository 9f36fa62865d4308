"""Decide from a chat template's syntax tree whether the template only copies message contents.

If contents are only trimmed and concatenated, one conversation shows how all others of its pattern are
rendered. If a template compares, splits or measures contents, each record has to be rendered. The decision
errs on the safe side: any construct that is not known here counts as inspecting contents.
"""

from enum import IntEnum

from jinja2 import nodes

CONTENT_KEY = "content"
_TRIMS = ("strip", "lstrip", "rstrip")
_KINDS_OF_VALUES = ("string", "defined", "undefined", "none", "mapping", "sequence", "iterable")


class Kind(IntEnum):
    """The content that a template's value may hold; if two kinds are possible, the higher one counts."""

    CLEAN = 0  # no part of a content
    CONTENT = 1  # a text made of contents
    TEXTS = 2  # a list of such texts
    HOLDER = 3  # messages, or one message


class _LooksInsideError(Exception):
    """An error raised when the template does more with a content than copy it."""


def copies_contents(tree: nodes.Template) -> bool:
    """Return whether every content is only copied, trimmed, or tested for presence."""
    reader = _Reader()
    try:
        before: dict[str, Kind] | None = None
        while before != reader.kinds:  # a loop may carry a content back to its beginning
            before = dict(reader.kinds)
            reader.read(tree.body)
    except _LooksInsideError:
        return False
    return True


class _Reader:
    def __init__(self) -> None:
        self.kinds = {"messages": Kind.HOLDER}

    def read(self, statements: list[nodes.Node]) -> None:
        for statement in statements:
            self._statement(statement)

    def _statement(self, node: nodes.Node) -> None:
        if isinstance(node, nodes.Output):
            for part in node.nodes:
                _only(self._kind(part), Kind.CLEAN, Kind.CONTENT)
        elif isinstance(node, nodes.Assign):
            self._assign(node.target, self._kind(node.node))
        elif isinstance(node, nodes.If):
            # A test for presence is true of an ordinary content: blank ones have patterns of their own.
            self._kind(node.test)
            self.read([*([] if _asks_for_tool(node.test) else node.body), *node.elif_, *node.else_])
        elif isinstance(node, nodes.For):
            items = _only(self._kind(node.iter), Kind.CLEAN, Kind.TEXTS, Kind.HOLDER)
            self._assign(node.target, Kind.CONTENT if items is Kind.TEXTS else items)
            if node.test is not None:
                self._kind(node.test)
            self.read([*node.body, *node.else_])
        elif isinstance(node, nodes.Scope):
            self.read(node.body)
        elif not isinstance(node, nodes.Continue | nodes.Break):
            raise _LooksInsideError

    def _assign(self, target: nodes.Node, kind: Kind) -> None:
        if isinstance(target, nodes.Name):
            name = target.name
        elif isinstance(target, nodes.NSRef):
            name = f"{target.name}.{target.attr}"
        else:
            raise _LooksInsideError
        self.kinds[name] = max(kind, self.kinds.get(name, Kind.CLEAN))

    def _kind(self, node: nodes.Node) -> Kind:
        reader = getattr(self, f"_{type(node).__name__.lower()}", None)
        if reader is None:
            raise _LooksInsideError
        found: Kind = reader(node)
        return found

    def _const(self, node: nodes.Const) -> Kind:
        return Kind.CLEAN

    _templatedata = _const

    def _name(self, node: nodes.Name) -> Kind:
        return self.kinds.get(node.name, Kind.CLEAN)

    def _getattr(self, node: nodes.Getattr) -> Kind:
        if isinstance(node.node, nodes.Name) and node.node.name == "loop":
            return Kind.HOLDER if node.attr in ("previtem", "nextitem") else Kind.CLEAN
        if isinstance(node.node, nodes.Name) and f"{node.node.name}.{node.attr}" in self.kinds:
            return self.kinds[f"{node.node.name}.{node.attr}"]
        return self._item(node.node, node.attr)

    def _getitem(self, node: nodes.Getitem) -> Kind:
        if isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str):
            return self._item(node.node, node.arg.value)
        counted = isinstance(node.arg, nodes.Const | nodes.Neg | nodes.Sub | nodes.Slice)
        if not counted:  # a variable may hold the key of a content
            _only(self._kind(node.node), Kind.CLEAN)
        return _only(self._kind(node.node), Kind.CLEAN, Kind.HOLDER)

    def _item(self, of: nodes.Node, key: str) -> Kind:
        kind = _only(self._kind(of), Kind.CLEAN, Kind.HOLDER)
        return Kind.CONTENT if kind is Kind.HOLDER and key == CONTENT_KEY else Kind.CLEAN

    def _add(self, node: nodes.BinExpr) -> Kind:
        left, right = self._kind(node.left), self._kind(node.right)
        if Kind.CONTENT in (left, right):
            _only(max(left, right), Kind.CONTENT)
        return max(left, right)

    def _sub(self, node: nodes.BinExpr) -> Kind:
        _only(self._kind(node.left), Kind.CLEAN)
        return _only(self._kind(node.right), Kind.CLEAN)

    _mul = _mod = _sub

    def _concat(self, node: nodes.Concat) -> Kind:
        return max(_only(self._kind(part), Kind.CLEAN, Kind.CONTENT) for part in node.nodes)

    def _compare(self, node: nodes.Compare) -> Kind:
        _only(self._kind(node.expr), Kind.CLEAN)
        for operand in node.ops:
            _only(self._kind(operand.expr), Kind.CLEAN)
        return Kind.CLEAN

    def _and(self, node: nodes.BinExpr) -> Kind:
        return max(self._kind(node.left), self._kind(node.right))

    _or = _and

    def _not(self, node: nodes.Not) -> Kind:
        self._kind(node.node)
        return Kind.CLEAN

    def _condexpr(self, node: nodes.CondExpr) -> Kind:
        self._kind(node.test)
        other = Kind.CLEAN if node.expr2 is None else self._kind(node.expr2)
        return max(self._kind(node.expr1), other)

    def _test(self, node: nodes.Test) -> Kind:
        if self._kind(node.node) is not Kind.CLEAN and node.name not in _KINDS_OF_VALUES:
            raise _LooksInsideError
        self._clean(node.args)
        return Kind.CLEAN

    def _list(self, node: nodes.List) -> Kind:
        kinds = [
            _only(self._kind(item), Kind.CLEAN, Kind.CONTENT, Kind.HOLDER) for item in node.items
        ]
        highest = max(kinds, default=Kind.CLEAN)
        return Kind.TEXTS if highest is Kind.CONTENT else highest

    _tuple = _list

    def _dict(self, node: nodes.Dict) -> Kind:
        highest = Kind.CLEAN
        for pair in node.items:
            kind = self._kind(pair.value)
            is_content = isinstance(pair.key, nodes.Const) and pair.key.value == CONTENT_KEY
            _only(kind, Kind.CLEAN, *([Kind.CONTENT] if is_content else []))
            highest = Kind.HOLDER if kind is Kind.CONTENT else highest
        return highest

    def _filter(self, node: nodes.Filter) -> Kind:
        self._clean(node.args)
        kind = Kind.CLEAN if node.node is None else self._kind(node.node)
        if kind is Kind.CLEAN or (kind is Kind.CONTENT and node.name in ("trim", "string", "safe")):
            return kind
        if kind is Kind.TEXTS and node.name == "join":
            return Kind.CONTENT
        if kind is Kind.HOLDER and node.name in ("list", "first", "last"):
            return kind
        if kind is Kind.HOLDER and node.name in ("length", "count"):
            return Kind.CLEAN
        if kind is Kind.HOLDER and node.name in ("selectattr", "rejectattr", "map"):
            return self._attribute_filter(node)
        raise _LooksInsideError

    def _attribute_filter(self, node: nodes.Filter) -> Kind:
        """Return the kind of `selectattr('role', ...)`, `rejectattr` or `map(attribute='content')`."""
        given = [*node.args[:1], *(pair.value for pair in node.kwargs if pair.key == "attribute")]
        if len(given) != 1 or not isinstance(given[0], nodes.Const):
            raise _LooksInsideError
        about_content = given[0].value == CONTENT_KEY
        if node.name == "map":
            return Kind.TEXTS if about_content else Kind.CLEAN
        if about_content:
            raise _LooksInsideError
        return Kind.HOLDER

    def _call(self, node: nodes.Call) -> Kind:
        self._clean(node.args)
        if isinstance(node.node, nodes.Getattr) and node.node.attr in _TRIMS:
            return _only(self._kind(node.node.node), Kind.CLEAN, Kind.CONTENT)
        self._clean([pair.value for pair in node.kwargs])
        of = node.node.node if isinstance(node.node, nodes.Getattr | nodes.Getitem) else node.node
        return _only(self._kind(of), Kind.CLEAN)

    def _clean(self, arguments: list[nodes.Expr]) -> None:
        for argument in arguments:
            _only(self._kind(argument), Kind.CLEAN)


def _asks_for_tool(test: nodes.Node) -> bool:
    """Return whether a test is `message.role == 'tool'`.

    Records with tool messages are always rendered, whatever this analysis finds.
    """
    if not isinstance(test, nodes.Compare) or len(test.ops) != 1 or test.ops[0].op != "eq":
        return False
    left, right = test.expr, test.ops[0].expr
    of_role = isinstance(left, nodes.Getattr) and left.attr == "role"
    of_role |= isinstance(left, nodes.Getitem) and getattr(left.arg, "value", None) == "role"
    return of_role and isinstance(right, nodes.Const) and right.value == "tool"


def _only(kind: Kind, *allowed: Kind) -> Kind:
    if kind not in allowed:
        raise _LooksInsideError
    return kind
