"""Chat templates: compiled as transformers does, rendered with traced strings and a limited amount of work.

A template comes with a model, so it is untrusted code. It runs in jinja's sandbox. A budget that depends only on its
input pays for every loop step, call and character. So nested loops, recursion and growing strings end in an error, at
the same place each time.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import wraps
from typing import Any, cast

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter, SecurityError
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer
from markupsafe import Markup

from packllm.chat.traced import Traced, formatted, joined, leaves, own, placed, shown, trusted

WORK = 2**24  # budget of any template, in characters
WORK_PER_CHARACTER = 256  # more budget for each character of its input
STEP, CALL = 16, 128  # cost of a loop step and of a call, in characters
LONGEST = 2**20  # maximum length of a template's source, in characters


class TooMuchWork(TemplateError):
    """A template needs more steps or text than its budget allows."""


class Template:
    """One chat template.

    Args:
        source: jinja source.
        tokens: the tokenizer's special tokens by name, such as bos_token.

    Attributes:
        variables: names that it reads and does not set itself.

    Raises:
        TemplateError: the source is invalid, or far too long.
    """

    def __init__(self, source: str, tokens: Mapping[str, str] | None = None) -> None:
        if len(source) > LONGEST:
            raise TooMuchWork(f"the chat template has {len(source)} characters; the limit is {LONGEST}")
        self._environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self._tokens = {name: own(token) for name, token in (tokens or {}).items()}
        self._environment.begin(len(source))
        try:
            tree = self._environment.parse(source)
            self.variables = frozenset(find_undeclared_variables(tree))
            self._compiled = self._environment.from_string(_Tracing(self._environment).traced(tree))
        except RecursionError:
            raise TemplateError("the chat template is nested too deeply") from None

    def render(self, size: int, values: Mapping[str, Any]) -> Traced:
        """The rendered text; `size` is the number of characters in `values`.

        Raises:
            TemplateError: the template raises it, or exceeds its budget. Its operations may raise other errors too.
        """
        self._environment.begin(size)
        return shown(self._compiled.render({**self._tokens, **values}))


class _Environment(ImmutableSandboxedEnvironment):
    """transformers' environment, which also traces where text is from and counts the work."""

    intercepted_binops = frozenset({"+", "*", "%", "**"})

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, finalize=_finalized)
        self.constants: list[Traced] = []
        self._budget = threading.local()
        self.filters |= {"tojson": _tojson, "safe": _safe}
        self.filters = {name: self._accounted(name, one) for name, one in self.filters.items()}
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "dict": _Dict(),
            "namespace": _Namespace,
        }

    def begin(self, size: int) -> None:
        """Start the budget of a rendering with an input of `size` characters."""
        self._budget.left = WORK + WORK_PER_CHARACTER * size

    def charge(self, work: int) -> None:
        self._budget.left -= work
        if self._budget.left < 0:
            raise TooMuchWork("it makes far more steps or text than its input can ask for")

    # Called by the rewritten template

    def counted(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self.charge(STEP)
            yield value

    def weighed(self, value: Any) -> Any:
        self.charge(_size(value))
        return value

    def joined(self, values: Sequence[Any]) -> Traced:
        return self.concat(map(shown, values))

    # Called by jinja

    def concat(self, pieces: Iterable[str]) -> Traced:
        texts = []
        for piece in pieces:
            self.charge(len(piece) + 1)
            texts.append(piece)
        return joined(texts)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # names as in jinja
        __self.charge(CALL)
        text = getattr(__obj, "__self__", None)
        if isinstance(text, str):
            args = __self._before(__obj.__name__, text, args)
        __self.charge(_numbers((*args, *kwargs.values())))
        result = ImmutableSandboxedEnvironment.call(__self, __context, __obj, *args, **kwargs)
        __self.charge(_size(result))
        return result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            self.charge(_size(left) + _size(right))
        elif operator == "*":
            bits = [n.bit_length() if isinstance(n, int) else 0 for n in (left, right)]
            self.charge(_size(left) * _count(right) + _size(right) * _count(left) + bits[0] * bits[1] // STEP)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            self.charge(left.bit_length() * abs(right))
        elif operator == "%" and isinstance(left, str):
            self.charge(_form_size(left, "%", right if isinstance(right, tuple) else (right,)))
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Any:
        plain = super().wrap_str_format(value)
        if plain is None:
            return None
        form = value.__self__

        @wraps(plain)
        def traced(*args: Any, **kwargs: Any) -> str:
            self.charge(_form_size(form, "{", (*args, *kwargs.values())))
            if not isinstance(form, Traced) or value.__name__ == "format_map":
                return plain(*args, **kwargs)
            field = SandboxedFormatter(self).get_field
            return formatted(form, lambda name: field(name, args, kwargs)[0], lambda: plain(*args, **kwargs))

        return traced

    def _before(self, name: str, text: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Charge for the text that a string method is about to make."""
        if name == "replace" and len(args) >= 2 and isinstance(args[0], str) and isinstance(args[1], str):
            self.charge(text.count(args[0]) * len(args[1]))
        elif name == "join" and args:
            parts = list(self.counted(args[0]))
            self.charge(sum(map(_size, parts)) + len(parts) * len(text))
            return (parts,)
        else:
            self.charge(len(text))
        return args

    def _accounted(self, name: str, function: Any) -> Any:
        """A filter with its cost charged; its result is trusted if all its arguments are."""
        passes = hasattr(function, "jinja_pass_arg")

        @wraps(function)
        def charged(*args: Any, **kwargs: Any) -> Any:
            arguments = [*(args[1:] if passes else args), *kwargs.values()]
            self.charge(STEP + _numbers(arguments) + sum(map(_size, arguments)))
            if name == "join" and len(arguments) == 1:
                args = (*args, own(""))  # a traced separator keeps the trace of the strings
            elif name == "replace":
                old, new = (str(text) for text in arguments[1:3])
                self.charge(str(arguments[0]).count(old) * len(new))
            elif name == "format":
                self.charge(_form_size(str(arguments[0]), "%", arguments[1:]))
            result = function(*args, **kwargs)
            self.charge(_size(result))
            return own(result) if type(result) is str and all(map(trusted, arguments)) else result

        return charged


class _Tracing(NodeTransformer):
    """Rewrites a template: constants become traced strings, and loop steps are counted."""

    def __init__(self, environment: _Environment) -> None:
        self._environment = environment

    def traced(self, tree: nodes.Template) -> nodes.Template:
        self.visit(tree)
        tree.set_environment(self._environment)
        return tree

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        return self._constant(node.data, node)

    def visit_Const(self, node: nodes.Const) -> nodes.Node:
        return self._constant(node.value, node) if isinstance(node.value, str) else node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._call("joined", nodes.List(node.nodes), node)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        node.node = self.visit(node.node)
        if not isinstance(node.arg, nodes.Const):  # a constant key is never shown
            node.arg = self.visit(node.arg)
        return self._call("weighed", node, node) if isinstance(node.arg, nodes.Slice) else node

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = self._call("counted", node.iter, node)
        return node

    def _constant(self, text: str, at: nodes.Node) -> nodes.Node:
        self._environment.constants.append(own(text))
        place = nodes.Const(len(self._environment.constants) - 1)
        return nodes.Getitem(nodes.EnvironmentAttribute("constants"), place, "load").set_lineno(at.lineno)

    def _call(self, name: str, argument: nodes.Node, at: nodes.Node) -> nodes.Node:
        return nodes.Call(nodes.EnvironmentAttribute(name), [cast(nodes.Expr, argument)], [], None, None).set_lineno(
            at.lineno
        )


class _Generation(Extension):
    """{% generation %} marks what an assistant wrote; only its body is rendered."""

    tags = {"generation"}  # noqa: RUF012 (as jinja declares it)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Any) -> str:
        return caller()


class _Dict:
    """`dict` without access to dict's other attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace(...)` without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


class _Safe(Markup):
    """A text that the template marked as safe. Text that is joined to it becomes an untrusted Markup."""

    _trusted = False


def _check_name(name: str) -> None:
    if name.startswith("_"):
        raise SecurityError(f"a chat template cannot store {name!r} on a namespace")


def _finalized(value: Any) -> Any:
    if isinstance(value, int | float | None) or (isinstance(value, _Safe) and value._trusted):
        return own(str(value))
    return value


def _safe(value: Any) -> Markup:
    safe = _Safe(value)
    safe._trusted = trusted(value)
    return safe


def _raise_exception(message: Any) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    text = datetime.now().strftime(form)
    return own(text) if trusted(form) else text


def _tojson(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> Traced:
    text = json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return placed(text, ((leaf, json.dumps(leaf, ensure_ascii=ensure_ascii)[1:-1]) for leaf in leaves(x)))


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple | dict | range) else 0


def _count(value: Any) -> int:
    return max(value, 0) if isinstance(value, int) else 0


def _numbers(values: Iterable[Any]) -> int:
    """Upper bound of the characters that numbers may stand for, such as a width or a length."""
    return sum(_count(inner) for value in values for inner in (value if isinstance(value, tuple) else (value,)))


def _form_size(form: str, mark: str, values: Sequence[Any]) -> int:
    """Upper bound of the characters that a format produces."""
    widths = sum(int(number[:9]) for number in re.findall(r"\d+", form))
    argument_size = sum(len(value) if isinstance(value, str) else _size(value) * STEP for value in values)
    return widths + _numbers(values) + form.count(mark) * argument_size
