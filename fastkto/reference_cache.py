"""Reference log-probabilities that are known already, by content.

A score's key is a digest of the reference (`fastkto.reference_fingerprint`), the prompt with its
images and the completion as it is scored. So it is found again in whatever order, data set or run
the sequence returns, and never for a sequence or a reference that differs in anything.
"""

from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor

from fastkto.data.batch import TokenSequence
from fastkto.score_store import ScoreStore

_KEY_BYTES = 16


class ReferenceCache:
    """What a store holds of one reference."""

    def __init__(self, store: ScoreStore, fingerprint: bytes) -> None:
        self.store = store
        self._digest = blake2b(fingerprint, digest_size=_KEY_BYTES, usedforsecurity=False)

    def keys(self, sequences: Sequence[TokenSequence]) -> list[bytes]:
        """The key of each sequence: of its tokens and the reference.

        Waits for the device once: what is known decides which passes there are.
        """
        if not sequences:
            return []
        if any(one.media is not None and one.media.whole is not None for one in sequences):
            raise ValueError(
                "precompute_ref_log_probs=True looks log-probabilities up row by row, and the "
                "images of a data_collator's batch cannot be told apart; leave one of them out"
            )
        pieces = [piece for one in sequences for piece in (one.prompt, one.completion)]
        tokens = torch.cat(pieces).cpu().numpy().data.cast("B")
        keys, start = [], 0
        for sequence in sequences:
            end = start + 8 * sequence.length
            digest = self._digest.copy()
            digest.update(len(sequence.prompt).to_bytes(8, "little"))
            digest.update(tokens[start:end])
            if sequence.media is not None:  # the prompt's key stands for its images too
                digest.update(sequence.prompt_key.to_bytes(8, "little"))
            keys.append(digest.digest())
            start = end
        return keys


class Lookup:
    """Sets of sequences, and what the cache has of them: nothing where there is no cache.

    `missing` are the sequences of each set that have to be scored; with a cache each content once.
    `hits` and `misses` count sequences; without a cache both are 0.
    """

    def __init__(
        self, cache: ReferenceCache | None, sets: Sequence[Sequence[TokenSequence]]
    ) -> None:
        self._cache = cache
        self.missing = [list(one) for one in sets]
        self.hits = self.misses = 0
        if cache is None:
            return
        self._keys = cache.keys([sequence for one in sets for sequence in one])
        self._known = cache.store.read(self._keys)
        self.misses = sum(key not in self._known for key in self._keys)
        self.hits = len(self._keys) - self.misses
        self._absent: dict[bytes, None] = {}  # in the order in which they are scored
        keys = iter(self._keys)
        self.missing = [[one for one in part if self._is_new(next(keys))] for part in sets]

    def _is_new(self, key: bytes) -> bool:
        if key in self._known or key in self._absent:
            return False
        self._absent[key] = None
        return True

    def complete(self, scored: Tensor) -> Tensor:
        """All log-probabilities, set after set, [B] fp64, from those of the missing, [M] fp64.

        Stores those. Waits for the device, but only where something has been scored.
        """
        if self._cache is None:
            return scored
        new: dict[bytes, float] = {}
        if self._absent:
            new = dict(zip(self._absent, scored.tolist(), strict=True))
            self._cache.store.write(new)
        logprobs = self._known | new
        values = torch.tensor([logprobs[key] for key in self._keys], dtype=torch.float64)
        return values.to(scored.device, non_blocking=True)
