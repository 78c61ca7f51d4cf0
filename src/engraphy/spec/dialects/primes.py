"""Prime numbers: the moduli of the heads."""

from __future__ import annotations

from collections.abc import Iterator

# These bases decide every value below 3.3e24 (Miller-Rabin).
_BASES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41)


def is_prime(value: int) -> bool:
    """Whether a number is prime. Exact for every value below 3.3e24.

    Args:
        value: Any integer.

    Returns:
        True if it is prime.
    """
    if value < 2:
        return False
    for base in _BASES:
        if value % base == 0:
            return value == base
    odd = value - 1
    twos = 0
    while odd % 2 == 0:
        odd //= 2
        twos += 1
    return all(_may_be_prime(value, base, odd, twos) for base in _BASES)


def primes_from(least: int) -> Iterator[int]:
    """All primes from `least` on, ascending."""
    value = least
    while True:
        if is_prime(value):
            yield value
        value += 1


def _may_be_prime(value: int, base: int, odd: int, twos: int) -> bool:
    """One round of Miller-Rabin for value = odd * 2**twos + 1."""
    power = pow(base, odd, value)
    if power in (1, value - 1):
        return True
    for _ in range(twos - 1):
        power = power * power % value
        if power == value - 1:
            return True
    return False
