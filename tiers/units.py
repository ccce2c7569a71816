"""Numbers of bytes as people read them: powers of 1024."""

_UNITS = "KMGTPE"


def format_size(size_bytes: int) -> str:
    """At most four significant characters and a unit: `0 B`, `10 GiB`, `1.46 TiB`. Rounded, for people only."""
    if abs(size_bytes) < 1024:
        return f"{size_bytes} B"
    value, power = size_bytes / 1024, 0
    # 1023.6 would print as 1024 of the smaller unit.
    while abs(value) >= 1023.5 and power < len(_UNITS) - 1:
        value, power = value / 1024, power + 1
    digits = 0 if value == int(value) or abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    text = f"{value:.{digits}f}"
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return f"{text} {_UNITS[power]}iB"


def exact_size(size_bytes: int) -> str:
    """As a configuration has it, in the largest unit that gives a whole number: `0`, `512`, `4M`."""
    power = 0
    while size_bytes and size_bytes % 1024 == 0 and power < len(_UNITS):
        size_bytes, power = size_bytes // 1024, power + 1
    return f"{size_bytes}{('', *_UNITS)[power]}"
