"""Arithmetic of launchers. Triton's functions of these names first look for compile-time constants: 1.5 us a call."""


def cdiv(x: int, y: int) -> int:
    """``x / y``, rounded up."""
    return -(-x // y)


def next_power_of_2(x: int) -> int:
    """The smallest power of 2 that is at least ``x``, for x >= 1."""
    return 1 << (x - 1).bit_length()
