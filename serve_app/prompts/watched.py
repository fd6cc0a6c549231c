"""What a chat template is given to read instead of plain lists and numbers: objects that note what is read.

    Messages    the conversation, or its rest from some message on: how far the template has looked
    Number      an integer in a namespace, while the loop over the messages runs: between which bounds it could be
                another without any difference
    Turns       what that loop goes over: from some message on, with a mark before each

Nothing here guesses. What a list can do and `Messages` cannot raises, so that nothing comes out different unseen.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NoReturn

_ANY = float("inf")
END = 2**62  # of `Watch.needs`: the conversation's end was looked at

Bounds = Mapping[tuple[int, str], tuple[float, float]]
"""(namespace, attribute) -> the least and the greatest that it may be."""
Written = Mapping[tuple[int, str], Any]
"""(namespace, attribute) -> what the loop has set it to."""
_NOTHING: Mapping[Any, Any] = MappingProxyType({})


class Unwatched(Exception):
    """The template does something that cannot be watched: render it whole."""


class Watch:
    """What one rendering has read and written. `bounds` and `written` are replaced, never changed: marks keep them."""

    def __init__(self, messages: Callable[[int], Any], count: int) -> None:
        self.message = messages
        self.count = count
        self.pieces: list[str] = []  # the text so far
        self.in_loop = False
        self.needs = 0  # messages that what the loop has written depends on
        self.bounds: Bounds = _NOTHING
        self.written: Written = _NOTHING
        self.namespaces: list[Any] = []  # those that there were before the loop

    def go_on(self, bounds: Bounds, written: Written, needs: int) -> None:
        """From where an earlier rendering was."""
        self.bounds, self.written, self.needs = bounds, written, needs
        for (number, name), value in written.items():
            self.namespaces[number][name] = value

    def within(self, bounds: Bounds) -> bool:
        """Whether the numbers in namespaces are such that an earlier rendering would not have seen a difference."""
        for (number, name), (least, most) in bounds.items():
            value = attributes(self.namespaces[number]).get(name)
            if type(value) is not int or not least <= value <= most:
                return False
        return True

    def look(self, end: int) -> None:
        """The messages before `end` were looked at."""
        self.needs = max(self.needs, end)

    def entered(self, namespace: Any) -> int:
        """A new namespace's number; -1 in the loop, whose namespaces are gone with the iteration."""
        if self.in_loop:
            return -1
        self.namespaces.append(namespace)
        return len(self.namespaces) - 1

    def read(self, number: int, name: str, value: Any) -> Any:
        if type(value) is not int or number < 0 or (number, name) in self.written:
            return value
        return Number(self, (number, name), value)

    def wrote(self, number: int, name: str, value: Any) -> Any:
        if isinstance(value, Number):
            value = value.exactly()
        if number >= 0:
            if not isinstance(value, str | int | float | None):
                raise Unwatched(f"the loop keeps a {type(value).__name__}")
            self.written = {**self.written, (number, name): value}
        return value

    def narrow(self, key: tuple[int, str], least: float, most: float) -> None:
        known_least, known_most = self.bounds.get(key, (-_ANY, _ANY))
        if least > known_least or most < known_most:
            self.bounds = {**self.bounds, key: (max(least, known_least), min(most, known_most))}


def attributes(namespace: Any) -> dict[str, Any]:
    """What is in a namespace, unwatched."""
    return dict(object.__getattribute__(namespace, "_Namespace__attrs"))


class Number:
    """An integer of which the outcome of comparisons is noted. Whatever else is done with it takes it as it is."""

    __slots__ = ("_key", "_value", "_watch")

    def __init__(self, watch: Watch, key: tuple[int, str], value: int) -> None:
        self._watch = watch
        self._key = key
        self._value = value

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # for `is integer`, `is number`
        return int

    def exactly(self) -> int:
        self._watch.narrow(self._key, self._value, self._value)
        return self._value

    def __lt__(self, other: Any) -> Any:
        return self._below(other) if type(other) is int else self.exactly() < other

    def __le__(self, other: Any) -> Any:
        return self._below(other + 1) if type(other) is int else self.exactly() <= other

    def __gt__(self, other: Any) -> Any:
        return not self._below(other + 1) if type(other) is int else self.exactly() > other

    def __ge__(self, other: Any) -> Any:
        return not self._below(other) if type(other) is int else self.exactly() >= other

    def _below(self, limit: int) -> bool:
        below = self._value < limit
        self._watch.narrow(self._key, *((-_ANY, limit - 1) if below else (limit, _ANY)))
        return below

    def __eq__(self, other: object) -> Any:
        return self.exactly() == other

    def __ne__(self, other: object) -> Any:
        return self.exactly() != other

    def __hash__(self) -> int:
        return hash(self.exactly())


def _as_it_is(name: str) -> Callable[..., Any]:
    def method(self: Number, *args: Any) -> Any:
        return getattr(self.exactly(), name)(*(a.exactly() if type(a) is Number else a for a in args))

    return method


for _name in (
    *(
        f"__{r}{name}__"
        for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "divmod", "pow")
        for r in ("", "r")
    ),
    *(
        f"__{name}__"
        for name in ("neg", "pos", "abs", "bool", "int", "index", "float", "str", "repr", "format", "round")
    ),
):
    setattr(Number, _name, _as_it_is(_name))


class Messages:
    """A conversation that can be read as a list can, in all that templates do with it."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, watch: Watch, at: range | None = None, is_rest: bool = True) -> None:
        """
        Args:
            watch: is told what is read.
            at: numbers of the messages that are in it; None: of all.
            is_rest: it goes on to the conversation's end, however long that is.
        """
        self._watch = watch
        self._at = range(watch.count) if at is None else at
        self.is_rest = is_rest

    @property
    def first(self) -> int:
        return self._at.start

    def told(self) -> tuple[int | None, ...]:
        return (self._at.start, None if self.is_rest else self._at.stop, self._at.step)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            plain = key.stop is None and key.step in (None, 1) and (key.start is None or operator.index(key.start) >= 0)
            is_rest = self.is_rest and plain and (key.start or 0) <= len(self._at)
            if not is_rest:
                self._watch.look(END)
            return Messages(self._watch, self._at[key], is_rest)
        index = operator.index(key)
        if index < 0 or index >= len(self._at):
            self._watch.look(END)
        number = self._at[index]
        self._watch.look(number + 1)
        return self._watch.message(number)

    def __iter__(self) -> Iterator[Any]:
        for number in self._at:
            self._watch.look(number + 1)
            yield self._watch.message(number)
        self._watch.look(END)

    def __len__(self) -> int:
        self._watch.look(END)
        return len(self._at)

    def __bool__(self) -> bool:
        self._watch.look(self._at[0] + 1 if self._at else END)
        return bool(self._at)

    def __getattr__(self, name: str) -> NoReturn:
        raise Unwatched(f"messages.{name}")

    def __eq__(self, other: object) -> NoReturn:
        raise Unwatched("messages are compared")

    def __str__(self) -> NoReturn:
        raise Unwatched("messages are written out")

    __repr__ = __str__


class Turns:
    """The rest of the conversation, for the loop over the messages. `skipped` of them are left out."""

    def __init__(self, watch: Watch, first: int) -> None:
        self._watch = watch
        self._first = first
        self.skipped = 0
        self.marked_by_loop = False  # which alone knows where an iteration begins, since it looks ahead
        self.pieces_before = len(watch.pieces)
        self.marks: list[tuple[int, int, int, Bounds, Written]] = []  # messages, pieces, needs, bounds, written

    def __iter__(self) -> Iterator[Any]:
        watch = self._watch
        for number in range(self._first + self.skipped, watch.count):
            if not self.marked_by_loop:
                self.mark(number - self._first)
            watch.look(number + 1)
            yield watch.message(number)
        if not self.marked_by_loop:
            self.mark(watch.count - self._first)
        watch.look(END)
        watch.in_loop = False

    def __len__(self) -> int:
        self._watch.look(END)
        return self._watch.count - self._first

    def mark(self, done: int) -> None:
        """`done` messages of the loop are written."""
        watch = self._watch
        count = self._first + done
        self.marks.append((count, len(watch.pieces), max(watch.needs, count), watch.bounds, watch.written))

    def last_skipped(self) -> Any:
        return self._watch.message(self._first + self.skipped - 1)
