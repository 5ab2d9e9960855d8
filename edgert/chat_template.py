"""Chat templates, rendered as Hugging Face does and held in a sandbox.

A template comes with a model and is a program: it has run code on its reader's machine (CVE-2024-34359, CVE-2026-5760)
and needs no more than `'a' * 10**10` to exhaust it. Jinja's immutable sandbox keeps it from Python's internals; on top
of that a meter charges every loop step, call, filter and piece of text, so that memory and time are bounded too.

Rendering agrees with `transformers/utils/chat_template_utils.py`: trim_blocks, lstrip_blocks, loop controls, the
`generation` tag, `raise_exception`, `strftime_now`, `tojson` without HTML escapes, plain Undefined. What no chat
template needs is absent: filters that pad, wrap, or make HTML, and `lipsum`.
"""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from functools import wraps
from typing import Any, cast

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from edgert.errors import ChatTemplateError

MAX_TEMPLATE_CHARS = 256 * 1024  # the largest published ones have some 30 thousand
MAX_WORK = 16 * 1024 * 1024  # characters made, list items touched and steps taken in one rendering
CALL_WORK = 32  # a call takes about as long as this many steps
MAX_SECONDS = 10.0  # of one rendering
MAX_INT_BITS = 1024
MAX_INDENT = 64

_FILTERS = (
    *("abs", "attr", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "format"),
    *("groupby", "indent", "int", "items", "join", "last", "length", "list", "lower", "map", "max", "min", "reject"),
    *("rejectattr", "replace", "reverse", "safe", "select", "selectattr", "sort", "string", "title", "trim"),
    *("truncate", "unique", "upper", "urlencode", "wordcount"),
)
# Methods that make much out of little; none of the others does.
_UNSAFE_METHODS = {"center", "encode", "expandtabs", "ljust", "rjust", "to_bytes", "translate", "zfill"}
# A width of four digits or one taken from an argument: `%9999d`, `%*d`, `{:9999}`, `{:{}}`.
_WIDE_FORMAT = re.compile(r"%(?:\([^)]*\))?[-+ #0.\d]*?(?:\*|\d{4})|\{[^{}]*(?:\d{4}|\{)")


class ChatTemplate:
    """A compiled template; may be rendered from several threads at once.

    Raises:
        ChatTemplateError: the source is too long or no valid template.
    """

    def __init__(self, source: str) -> None:
        if len(source) > MAX_TEMPLATE_CHARS:
            raise ChatTemplateError(f"chat template has {len(source)} characters, at most {MAX_TEMPLATE_CHARS} allowed")
        self._environment = _Environment()
        try:
            tree = _Metering().visit(self._environment.parse(source))
            self._template = self._environment.from_string(tree)
        except Exception as error:  # a hostile source can make parser and compiler fail in any way
            raise ChatTemplateError(f"chat template does not compile: {_one_line(error)}") from error

    def render(self, **variables: Any) -> str:
        """The text for these variables (`messages`, `tools`, `add_generation_prompt`, `bos_token` …).

        Raises:
            ChatTemplateError: the template fails, refuses the messages, or oversteps its sandbox.
        """
        self._environment.start()
        try:
            return self._template.render(**variables)
        except Exception as error:  # whatever the template's code raises
            raise ChatTemplateError(f"chat template failed: {_one_line(error)}") from error


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's words for training; here it only groups."""

    tags = {"generation"}  # noqa: RUF012  (declared so by Jinja)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Metering(NodeTransformer):
    """Sends what Jinja compiles to plain Python, past every hook of the sandbox, through a metered filter."""

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        return nodes.Const(node.data, lineno=node.lineno)  # a constant passes `finalize`, template data does not

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        return self._filter(nodes.List(node.nodes, lineno=node.lineno), "join")

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _call_filter(cast(nodes.Expr, node.iter), "_steps")
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        bounds = [bound or nodes.Const(None) for bound in (node.arg.start, node.arg.stop, node.arg.step)]
        return _call_filter(node.node, "_slice", bounds)

    def visit_List(self, node: nodes.List) -> nodes.Node:
        return self._filter(node, "_weighed")

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        return self._filter(node, "_weighed")

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        return self._filter(node, "_weighed") if node.ctx == "load" else self.generic_visit(node)

    def _filter(self, node: nodes.Expr, name: str) -> nodes.Node:
        return _call_filter(cast(nodes.Expr, self.generic_visit(node)), name)


def _call_filter(node: nodes.Expr, name: str, args: list[nodes.Expr] | None = None) -> nodes.Filter:
    return nodes.Filter(node, name, args or [], [], None, None, lineno=node.lineno)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            optimized=False,  # nothing is computed while compiling, where nothing is metered
            finalize=self._finalize,
        )
        self._meter = threading.local()
        self.globals.pop("lipsum")
        self.globals["namespace"] = _Namespace
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        own: dict[str, Callable[..., Any]] = {
            "tojson": self._tojson,
            "_slice": lambda value, start, stop, step: value[start:stop:step],
            "_weighed": self._weighed,
        }
        self.filters = {name: self._metered(name, self.filters[name]) for name in _FILTERS}
        self.filters |= {name: self._metered(name, function) for name, function in own.items()}
        self.filters["_steps"] = self._steps

    def start(self) -> None:
        """Reset this thread's meter."""
        self._meter.work = 0
        self._meter.deadline = time.monotonic() + MAX_SECONDS

    def charge(self, amount: int) -> None:
        self._meter.work += amount + 1
        if self._meter.work > MAX_WORK:
            raise jinja2.TemplateRuntimeError(f"it makes more than {MAX_WORK} characters and steps")
        if time.monotonic() > self._meter.deadline:
            raise jinja2.TemplateRuntimeError(f"it takes longer than {MAX_SECONDS:g} seconds")

    def weigh(self, value: Any, *, text: bool) -> None:
        """Charge all that `value` holds, nested lists as often as they are named; with `text` their characters too."""
        if isinstance(value, str):
            self.charge(len(value) if text else 0)
        elif isinstance(value, Mapping):
            for key, item in value.items():
                self.weigh(key, text=text)
                self.weigh(item, text=text)
        elif isinstance(value, (list, tuple, set, frozenset)):
            for item in value:
                self.weigh(item, text=text)
        self.charge(0)

    def weight(self, value: Any) -> int:
        """Characters and items in `value`, which are charged."""
        before = self._meter.work
        self.weigh(value, text=True)
        weight: int = self._meter.work - before
        return weight

    @jinja2.pass_context
    def _finalize(self, context: Context, value: Any) -> Any:
        # Declared to want the context, so that Jinja cannot call it while compiling.
        self.weigh(value, text=True)
        return value

    def _metered(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        first = int(hasattr(function, "jinja_pass_arg"))  # before the value Jinja may pass its context

        @wraps(function)
        def metered(*args: Any, **kwargs: Any) -> Any:
            values = self._admit(name, args[first:], kwargs)
            if name == "format" and values:
                self._admit_format(values[0], (values[1:], kwargs))
            result = function(*args[:first], *values, **kwargs)
            self.charge(_size(result))
            return result

        return metered

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __self.charge(CALL_WORK)
        bound = getattr(__obj, "__self__", None)
        if isinstance(bound, (str, list, tuple, dict)):
            args = __self._admit(__obj.__name__, (bound, *args), kwargs)[1:]
        else:
            args = __self._admit("", args, kwargs)
        result = super().call(__context, __obj, *args, **kwargs)
        __self.charge(_size(result))
        return result

    def _admit(self, name: str, values: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """Charge the arguments of a filter or method, and beforehand what can be made of them.

        Returns the positional arguments; where a product is charged, lazy ones are lists now.
        """
        if name == "join":
            values = tuple(list(v) if isinstance(v, Iterable) and not _is_sized(v) else v for v in values)
        for value in (*values, *kwargs.values()):
            self.charge(_size(value))
        if name in {"string", "tojson", "title", "upper", "lower", "capitalize", "trim", "urlencode", "e", "escape"}:
            self.weigh(values, text=True)
        elif name == "join":
            # Method and filter name separator and items in opposite order; the product is the same.
            sizes = [_size(value) for value in (*values, *kwargs.values())]
            self.weigh(values, text=True)
            self.charge(math.prod(sorted(sizes)[-2:]))
        elif name == "replace":
            text, old, new = (*values, *([""] * 3))[:3]
            old, new = str(kwargs.get("old", old)), str(kwargs.get("new", new))
            self.charge(str(text).count(old) * len(new))
        elif name == "indent":
            width = kwargs.get("width", values[1] if len(values) > 1 else 4)
            _check_indent(width)
            self.charge(str(values[0]).count("\n") * MAX_INDENT)
        return values

    def _admit_format(self, pattern: Any, arguments: Any) -> None:
        text = str(pattern)
        if _WIDE_FORMAT.search(text):
            raise SecurityError("a format with a width over 999 or taken from an argument")
        self.charge(self.weight(arguments) * (text.count("%") + text.count("{")))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for sequence, count in ((left, right), (right, left)):
                if _is_sized(sequence) and isinstance(count, int) and count > 0:
                    self.charge(self.weight(sequence) * count)
        elif operator == "%" and isinstance(left, str):
            self._admit_format(left, right)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * abs(right) > MAX_INT_BITS:
                raise SecurityError(f"a power of more than {MAX_INT_BITS} bits")
        elif operator == "+":
            self.charge(_size(left) + _size(right))
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, int) and result.bit_length() > MAX_INT_BITS:
            raise SecurityError(f"a number of more than {MAX_INT_BITS} bits")
        return result

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        amplifies = attr in _UNSAFE_METHODS and isinstance(obj, (str, bytes, int))
        return not amplifies and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def metered(*args: Any, **kwargs: Any) -> str:
            self._admit_format(value.__self__, (args, kwargs))
            return wrapped(*args, **kwargs)

        return metered

    def _steps(self, iterable: Iterable[Any]) -> Iterator[Any]:
        for item in iterable:
            self.charge(0)
            yield item

    def _weighed(self, value: Any) -> Any:
        self.weigh(value, text=False)
        return value

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        _check_indent(indent)
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Namespace(Namespace):
    def __repr__(self) -> str:  # the inherited one prints what it holds, and that may hold it
        return "<Namespace>"


def _is_sized(value: Any) -> bool:
    return isinstance(value, (str, bytes, list, tuple, dict, set, frozenset))


def _size(value: Any) -> int:
    return len(value) if _is_sized(value) else 0


def _check_indent(width: Any) -> None:
    if (isinstance(width, int) and width > MAX_INDENT) or (isinstance(width, str) and len(width) > MAX_INDENT):
        raise SecurityError(f"an indent over {MAX_INDENT}")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    if len(format) > 256 or re.search(r"%[^a-zA-Z%-]", format):  # the C library takes widths: %999999999d
        raise SecurityError("a time format that is too long or has a width")
    return datetime.now().strftime(format)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:299] + "…"
