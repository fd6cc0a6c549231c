"""What an engine calls its blocks: engine hash -> canonical keys, and which block it follows.

A name is the same in every KV cache group and tier, for it is of the tokens up to the block's end. Names of blocks that
nobody holds any more are kept for a while: a block that was just evicted may be the parent of the next one, or be
offloaded a moment later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

from serve_app.blocks import KEY_BYTES, split_keys
from serve_app.types import BlockKey, BlockKeys, EngineHash

UNHELD_MAX = 16_384  # names of blocks that are not held; some 250 bytes each


class BlockNames:
    """Args: is_held: whether a block is held anywhere, by its (last) key."""

    def __init__(self, is_held: Callable[[BlockKey], bool]) -> None:
        self._is_held = is_held
        self._keys_of: dict[EngineHash, BlockKeys] = {}
        self._parents: dict[EngineHash, EngineHash] = {}
        self._digests: dict[EngineHash, bytes] = {}  # whole hashes, where they had to be computed
        self._unheld: deque[EngineHash] = deque()  # were not held when they were put here

    def __len__(self) -> int:
        return len(self._keys_of)

    def get(self, name: EngineHash) -> BlockKeys | None:
        """Keys of the block: several, if it is larger than a canonical one."""
        return self._keys_of.get(name)

    def key(self, name: EngineHash) -> BlockKey | None:
        """Key of its last canonical block."""
        packed = self._keys_of.get(name)
        return None if packed is None else last_key(packed)

    def all_keys(self, names: Iterable[EngineHash]) -> list[BlockKey] | None:
        """Keys of all these blocks; None if one is unknown."""
        keys: list[BlockKey] = []
        for name in names:
            packed = self._keys_of.get(name)
            if packed is None:
                return None
            keys += each_key(packed)
        return keys

    def digest(self, name: EngineHash) -> bytes | None:
        """The whole hash behind a name, if it is known; some engines send it as the name."""
        return name if isinstance(name, bytes) else self._digests.get(name)

    def learn(self, names: Sequence[EngineHash], keys: Sequence[BlockKeys], parent: EngineHash | None) -> None:
        """Consecutive blocks that follow `parent`."""
        chain = names if parent is None else [parent, *names]
        self._parents.update(zip(chain[1:], chain, strict=False))
        self._keys_of.update(zip(names, keys, strict=True))

    def learn_digest(self, name: EngineHash, key: BlockKey, digest: bytes) -> None:
        """A block whose hash was computed."""
        self._keys_of[name] = key
        if not isinstance(name, bytes):
            self._digests[name] = digest

    def unheld(self, name: EngineHash) -> None:
        """Nobody holds it, or not yet: forget it after `UNHELD_MAX` others."""
        self._unheld.append(name)
        while len(self._unheld) > UNHELD_MAX:
            oldest = self._unheld.popleft()
            key = self.key(oldest)
            if key is not None and not self._is_held(key):
                self._forget(oldest)

    def keep_held(self) -> None:
        """Forget what nobody holds."""
        self._unheld.clear()
        for name in [name for name, packed in self._keys_of.items() if not self._is_held(last_key(packed))]:
            self._forget(name)

    def clear(self) -> None:
        for known in (self._keys_of, self._parents, self._digests):
            known.clear()
        self._unheld.clear()

    def prefix(self, name: EngineHash | None) -> Iterator[BlockKeys]:
        """Keys of the block and of all that it follows, as far as they are known; the last first."""
        seen: set[EngineHash] = set()  # an engine may say that blocks follow each other in a ring
        while name is not None and name not in seen and (packed := self._keys_of.get(name)) is not None:
            yield packed
            seen.add(name)
            name = self._parents.get(name)

    def _forget(self, name: EngineHash) -> None:
        self._keys_of.pop(name, None)
        self._parents.pop(name, None)
        self._digests.pop(name, None)


def each_key(packed: BlockKeys) -> Sequence[BlockKey]:
    """As `split_keys`, quick for the one key that most engine blocks have."""
    return (BlockKey(packed),) if len(packed) == KEY_BYTES else split_keys(packed)


def last_key(packed: BlockKeys) -> BlockKey:
    """The last of the packed keys."""
    return BlockKey(packed[-KEY_BYTES:])
