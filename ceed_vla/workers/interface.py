"""`Workers`: functions that process item after item, somewhere."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

# Processes one item; yields its results as they are ready.
Function = Callable[[Any], Iterable[Any]]
# Makes such a function, once per worker, from arguments.
Make = Callable[..., Function]


class Workers(AbstractContextManager["Workers"], ABC):
    """Workers of equal functions; as a context manager, it ends them.

    The results of an item must depend neither on the worker nor on earlier items.

    Attributes:
        here: The function for work in this process, for a command that has loaded its models
            anyway. Other processes always make their own.
    """

    here: Function | None = None

    @abstractmethod
    def stream(self, items: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        """Yield (item, result) as the results arrive.

        A result comes again if its worker was lost before the item was complete: whoever counts
        results must identify them.

        Raises:
            CeedVLAError: The function raised it, or too many workers were lost.
        """

    @abstractmethod
    def map(self, items: Iterable[Any]) -> Iterator[list[Any]]:
        """Yield the results of every complete item, in the order of the items.

        Raises:
            CeedVLAError: As in `stream`.
        """


class InProcess(Workers):
    """This process does the work, with its own threads."""

    def __init__(self, make: Make, arguments: tuple[Any, ...]) -> None:
        self._make = make
        self._arguments = arguments

    def stream(self, items: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        for item in items:
            for result in self._function()(item):
                yield item, result

    def map(self, items: Iterable[Any]) -> Iterator[list[Any]]:
        for item in items:
            yield list(self._function()(item))

    def _function(self) -> Function:
        if self.here is None:
            self.here = self._make(*self._arguments)
        return self.here

    def __exit__(self, *_: Any) -> None:
        """There is nothing to end."""
