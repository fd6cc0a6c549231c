"""Chat templates whose next turn is rendered from where the last one ended, with proof that the text is the same.

In: Jinja source, a conversation, and what was noted when its start was rendered. Out: the text from there on.

A template is a program. What it has written when it comes to message `k` depends on what it has read until then, and on
nothing else. So the program is run on objects that note what is read of them (watched.py):

    PRE     what stands before the loop over the messages: run for every request, on the whole conversation
    LOOP    begins at message k if PRE leaves the state that was noted: its text, and the variables that LOOP reads
    POST    what stands behind it: run for every request

Text of earlier turns is used again if all that their iterations have read is as it was: those messages (the caller has
compared them), the state, and for numbers in namespaces the outcome of every comparison. A turn that has looked at the
conversation's end or length, as `loop.last` does in the last one, is rendered again. Nothing is assumed of a template:
what cannot be watched raises, and the template is rendered whole, as transformers does it.

    Qwen 3      "loop.index0 > ns.last_query_index" was false for message 7, when the last question was message 8. It
                is false for any later question: turn 7 stays. It was true for message 9, which is rendered again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import msgspec
import xxhash
from jinja2 import nodes
from jinja2.runtime import LoopContext, Macro, Undefined
from jinja2.utils import missing

from serve_app.prompts.watched import Bounds, Messages, Turns, Unwatched, Watch, Written, attributes

_HOOK = "kvcache_turns"  # what the loop over the messages goes through
_NOT_REPEATABLE = frozenset({"cycler", "joiner", "lipsum", "random", "sameas", "strftime_now"})
_BUILT_OF_OTHERS = (nodes.Block, nodes.Extends, nodes.FromImport, nodes.Import, nodes.Include)
_Found = tuple[nodes.For, tuple[nodes.Node, ...]]


@dataclass(frozen=True, slots=True)
class Mark:
    """A point between two messages of a rendered conversation, from which it can be gone on with."""

    count: int  # messages before it
    needs: int  # messages that must be the same, at least `count`
    state: bytes  # digest of what the loop found when it began
    bounds: Bounds  # what the numbers in namespaces must be
    written: Written  # what the loop has written to namespaces


@dataclass(frozen=True, slots=True)
class Rendering:
    """A rendered chat, and the marks where a later one can go on."""

    text: str  # behind the mark that it began at, else the whole
    resumed: bool
    marks: Sequence[tuple[Mark, int]]  # with their places in `text`


class ResumableTemplate:
    """One template, compiled a second time with a hook at its loop over the messages. Safe to use from several threads.

    Attributes:
        reserved: variables that a request must not set: the hook's own.
    """

    reserved = frozenset({_HOOK, "namespace", "messages"})

    def __init__(self, environment: jinja2.Environment, source: str) -> None:
        """
        Raises:
            Unwatched: it has no such loop, or one whose state cannot be told.
        """
        tree = environment.parse(source)
        if any(True for _ in tree.find_all(_BUILT_OF_OTHERS)):
            raise Unwatched("it is built of other templates")
        loops = list(_loops(tree.body))
        if not loops:
            raise Unwatched("it has no loop over the messages that can be watched")
        for site, (loop, before) in enumerate(loops):
            _hook(loop, site, _state_names(tree, loop, before))
        code = environment.compile(tree)
        template = environment.template_class.from_code(environment, code, dict(environment.globals))
        template.root_render_func.__globals__["LoopContext"] = _Loop
        self._template = template
        self._namespace = _watched_namespace(environment.globals["namespace"])

    def render(
        self,
        variables: Mapping[str, Any],
        messages: Callable[[int], Any],
        count: int,
        known: Mark | None,
    ) -> Rendering:
        """
        Args:
            variables: for the template, without `messages`.
            messages: number -> message, as the template shall see it.
            count: of messages.
            known: a mark of a conversation that began with the same messages, rendered with the same variables.

        Raises:
            Exception: whatever the template raises; Unwatched: it does what cannot be watched.
        """
        run = _Run(messages, count, known)
        context = self._template.new_context(
            {
                **variables,
                "messages": Messages(run.watch),
                "namespace": lambda *args, **kwargs: self._namespace(run.watch, *args, **kwargs),
                _HOOK: run.turns,
            }
        )
        pieces = run.watch.pieces
        for piece in self._template.root_render_func(context):
            pieces.append(piece)
        return run.rendering()


class _Run:
    """One rendering."""

    def __init__(self, messages: Callable[[int], Any], count: int, known: Mark | None) -> None:
        self.watch = Watch(messages, count)
        self._known = known
        self._state = b""
        self._turns: Turns | None = None
        self._resumed = False

    def turns(self, site: int, iterable: Any, names: Mapping[str, Any]) -> Any:
        """What the loop shall go over instead of `iterable`. Called by the template, right before the loop."""
        if not isinstance(iterable, Messages) or not iterable.is_rest:
            return iterable
        if self._turns is not None:
            raise Unwatched("two loops over the messages")
        watch, known, first = self.watch, self._known, iterable.first
        self._state = self._digest(site, first, names)
        watch.needs = 0  # what was read so far counts by what came of it: the state
        turns = self._turns = Turns(watch, first)
        if known is not None and known.state == self._state and known.count > first and watch.within(known.bounds):
            self._resumed = True
            watch.go_on(known.bounds, known.written, known.needs)
            turns.skipped = known.count - first
        watch.in_loop = True
        return turns

    def _digest(self, site: int, first: int, names: Mapping[str, Any]) -> bytes:
        """Of the text so far and of all that the loop may read, but for numbers in namespaces: those are watched."""
        spaces = self.watch.namespaces
        state = (
            site,
            first,
            "".join(self.watch.pieces),
            [(name, *_told(value)) for name, value in names.items()],
            [[(key, *_told(value, of_namespace=True)) for key, value in attributes(n).items()] for n in spaces],
        )
        try:
            return xxhash.xxh3_128_digest(msgspec.msgpack.encode(state))
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise Unwatched(f"the state of the loop cannot be told: {error}") from error

    def rendering(self) -> Rendering:
        pieces = self.watch.pieces
        if self._turns is None:
            return Rendering("".join(pieces), False, [])
        start = self._turns.pieces_before if self._resumed else 0
        marks = []
        at, place = start, 0
        for count, pieces_then, needs, bounds, written in self._turns.marks:
            place += sum(map(len, pieces[at:pieces_then]))
            at = pieces_then
            marks.append((Mark(count, needs, self._state, bounds, written), place))
        return Rendering("".join(pieces[start:]), self._resumed, marks)


class _Loop(LoopContext):
    """Jinja's `loop`, which may begin in the middle."""

    def __init__(self, iterable: Any, *args: Any) -> None:
        super().__init__(iterable, *args)
        self._turns = iterable if isinstance(iterable, Turns) else None
        if self._turns is not None:
            self._turns.marked_by_loop = True
            if self._turns.skipped:
                self.index0 = self._turns.skipped - 1
                self._current = self._turns.last_skipped()

    def __next__(self) -> Any:
        if self._turns is not None:
            self._turns.mark(self.index0 + 1)
        return super().__next__()

    def changed(self, *value: Any) -> bool:
        if self._turns is not None:
            raise Unwatched("loop.changed")
        return super().changed(*value)


def _watched_namespace(base: Any) -> Any:
    """`namespace` for templates, on the one that transformers gives them."""

    class WatchedNamespace(base):  # type: ignore[misc]  # it is made when transformers makes the environment
        def __init__(*args: Any, **kwargs: Any) -> None:
            self, watch, *rest = args
            super(WatchedNamespace, self).__init__(*rest, **kwargs)
            object.__setattr__(self, "_number", watch.entered(self))
            object.__setattr__(self, "_watch", watch)

        def __getattribute__(self, name: str) -> Any:
            if name in ("_number", "_watch"):
                return object.__getattribute__(self, name)
            value = super().__getattribute__(name)
            watch = object.__getattribute__(self, "_watch")
            return watch.read(object.__getattribute__(self, "_number"), name, value) if watch.in_loop else value

        def __setitem__(self, name: str, value: Any) -> None:
            value = self._watch.wrote(self._number, name, value) if self._watch.in_loop else value
            super().__setitem__(name, value)

    return WatchedNamespace


def _told(value: Any, of_namespace: bool = False) -> tuple[str, Any]:
    """A value in a form that has a digest: equal forms, equal values, for a template."""
    if of_namespace and type(value) is int:
        return "watched", None
    if isinstance(value, Messages):
        return "messages", value.told()
    if isinstance(value, jinja2.utils.Namespace):
        return "namespace", object.__getattribute__(value, "_number")
    if isinstance(value, Undefined) or value is missing:
        return "undefined", None
    if isinstance(value, Macro):
        return "macro", value.name
    return "value", value


def _loops(body: Sequence[nodes.Node], before: tuple[nodes.Node, ...] = ()) -> Iterator[_Found]:
    """Loops of the template itself that write straight to its output, each with what is done before it."""
    for at, node in enumerate(body):
        earlier = (*before, *body[:at])
        if isinstance(node, nodes.For) and any(map(_writes, node.find_all(nodes.Output))):
            if node.test is None and not node.recursive and not node.else_:
                yield node, earlier
        elif isinstance(node, nodes.If):
            for branch in (node.body, node.else_, *(elif_.body for elif_ in node.elif_)):
                yield from _loops(branch, earlier)


def _writes(output: nodes.Output) -> bool:
    """Whether it is more than a call of `raise_exception`."""
    return not all(
        isinstance(node, nodes.Call) and isinstance(node.node, nodes.Name) and node.node.name == "raise_exception"
        for node in output.nodes
    )


def _hook(loop: nodes.For, site: int, names: Sequence[str]) -> None:
    state = nodes.Dict([nodes.Pair(nodes.Const(name), nodes.Name(name, "load")) for name in names])
    call = nodes.Call(nodes.Name(_HOOK, "load"), [nodes.Const(site), loop.iter, state], [], None, None)
    loop.iter = call.set_lineno(loop.lineno)


def _state_names(tree: nodes.Template, loop: nodes.For, before: Sequence[nodes.Node]) -> list[str]:
    """Variables that the loop or a macro reads, and the template has set before.

    Raises:
        Unwatched: it reads what is another at another time.
    """
    inner = [loop, *tree.find_all(nodes.Macro)]
    read = {name.name for node in inner for name in node.find_all(nodes.Name) if name.ctx == "load"}
    read |= {reference.name for node in inner for reference in node.find_all(nodes.NSRef)}
    called = {part.name for node in inner for part in node.find_all((nodes.Filter, nodes.Test))}
    if found := (read | called) & _NOT_REPEATABLE:
        raise Unwatched(f"the loop uses {', '.join(sorted(found))}")
    return sorted(read & set(_set_by(before)))


def _set_by(body: Iterable[nodes.Node]) -> Iterator[str]:
    """Variables of the template itself: what is set in a loop or a macro ends with it."""
    for node in body:
        if isinstance(node, nodes.Assign | nodes.AssignBlock):
            yield from (name.name for name in _names(node.target))
        elif isinstance(node, nodes.Macro):
            yield node.name
        elif isinstance(node, nodes.If):
            yield from _set_by([*node.body, *node.else_, *node.elif_])


def _names(node: nodes.Node) -> Iterator[nodes.Name]:
    if isinstance(node, nodes.Name):
        yield node
    yield from node.find_all(nodes.Name)
