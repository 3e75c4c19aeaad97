"""Wake-ups: how processes without a shared channel layer find each other's events at once."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Generator, Iterable

Groups = Collection[str] | None
"""The channel-layer groups of tokens with new events; ``None`` if it can be any token."""


class WakeUps(ABC):
    """The wake-ups of a store.

    A wake-up may be lost, late or superfluous: the history checks find the events. The methods
    block. Each is called in a thread of the package, and uses a database connection that is open
    only until the method ends.
    """

    sends = True
    """Whether a publisher must call :meth:`send`. If not, the store itself reports commits."""
    most_groups = 150
    """The number of groups that fit into one wake-up."""

    @abstractmethod
    def watch(self) -> Generator[Groups, None, None]:
        """Yield the groups of tokens to which other processes have published.

        It yields at least twice a second, and an empty collection without news. So its caller
        can close it at any time.

        :raises Exception: an error of the driver, if the database cannot be watched any more.
        """

    def send(self, batches: Iterable[Groups]) -> None:
        """Send a wake-up to all other processes for each batch of groups.

        :param batches: the groups, at most :attr:`most_groups` in each batch. The connection is
            open until they end.
        :raises Exception: an error of the driver.
        :raises NotImplementedError: if :attr:`sends` is false.
        """
        raise NotImplementedError("The store itself reports commits.")
