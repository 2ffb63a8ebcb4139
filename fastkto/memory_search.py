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
    high, slope = MOST_TOKENS, 0.0
    tokens = 32 * TOKEN_MULTIPLE
    while high - low > max(TOKEN_MULTIPLE, low // 100):
        tokens = min(max(tokens, low + TOKEN_MULTIPLE), high - TOKEN_MULTIPLE)
        size = bytes_of(tokens)
        if size > limit:
            high = tokens
            slope = max(slope, (size - low_size) / (tokens - low))
            guess = low + (limit - low_size) / slope
            if guess < low * 1.01:  # a curve: what lies between says more than a line
                guess = (low * high) ** 0.5
        else:
            slope = (size - low_size) / (tokens - low)
            low, low_size = tokens, size
            guess = low + (limit - low_size) / slope if slope else 2.0 * low
            # A guess that was right leaves the bracket open above it; it is closed a little higher.
            guess = max(guess, low * 1.008)
        tokens = int(min(guess, MOST_TOKENS)) // TOKEN_MULTIPLE * TOKEN_MULTIPLE
    return low
