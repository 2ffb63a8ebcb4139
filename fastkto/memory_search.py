"""The most tokens that fit, found by trying."""

from collections.abc import Callable

# `largest` looks no further, and answers in multiples of the other.
MOST_TOKENS = 2**24
TOKEN_MULTIPLE = 128


def largest(bytes_of: Callable[[int], int], limit: int) -> int:
    """The most tokens for which `bytes_of` is at most `limit`, to 1 %; 0 if there are none.

    `bytes_of` must not fall. The answer is one that was tried, a multiple of TOKEN_MULTIPLE and at
    most MOST_TOKENS.
    """
    low, low_size = TOKEN_MULTIPLE, bytes_of(TOKEN_MULTIPLE)
    if low_size > limit:
        return 0
    high, high_size = MOST_TOKENS, None
    tokens, slope = 32 * TOKEN_MULTIPLE, 0.0
    while high - low > max(TOKEN_MULTIPLE, low // 100):
        tokens = min(max(tokens, low + TOKEN_MULTIPLE), high - TOKEN_MULTIPLE)
        size = bytes_of(tokens)
        if size > limit:
            high, high_size = tokens, size
        else:
            slope = (size - low_size) / (tokens - low)
            low, low_size = tokens, size
        if high_size is not None:
            slope = (high_size - low_size) / (high - low)
        guess = low + (limit - low_size) / slope if slope else 2.0 * low
        # A guess that was right leaves the bracket open above it, and is closed a little higher.
        guess = max(guess, low * 1.008) if size <= limit else guess
        tokens = int(min(guess, 1e9)) // TOKEN_MULTIPLE * TOKEN_MULTIPLE
    return low
