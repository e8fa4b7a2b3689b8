"""Ways to damage an adapter file: bytes, the header of the weights, the values of the config."""

import json
import random
import struct
from typing import Any

#: Values of each JSON type, at their limits.
ODD: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2,
        3,
        5,
        7,
        10**6,
        2**31,
        2**63,
        10**30,
        10**400,
        0.5,
        5.0,
        -0.0,
        1e300,
        1e-320,
        float("nan"),
    ),
    *(
        float("inf"),
        "",
        "0",
        "none",
        "all",
        "all-linear",
        "(",
        ".*",
        "\x00",
        "é" * 50,
        "../..",
        [],
        [[]],
        [None],
        ["body.0"],
        [1],
    ),
    *({}, {"body.0": 2}, {"body.0": "2"}, {"(": 3}, {"": 0}, [{}], {"a": {"b": []}}, "body.0", "x" * 5000),
]
DTYPES = ("F32", "F16", "F64", "I32", "BF16")


def flip(data: bytes, source: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(source.choice((1, 1, 2, 8))):
        changed[source.randrange(len(changed))] ^= 1 << source.randrange(8)
    return bytes(changed)


def cut(data: bytes, source: random.Random) -> bytes:
    start, end = sorted(source.choices(range(len(data) + 1), k=2))
    return source.choice(
        [data[:end], data[start:], data[:start] + data[end:], data + data[start:end], data[:start] + data[start:end] * 2]
    )


def garbage(data: bytes, source: random.Random) -> bytes:
    start, end = sorted(source.choices(range(len(data) + 1), k=2))
    return (
        data[:start] + source.choice([bytes(end - start), b"\xff" * (end - start), source.randbytes(end - start)]) + data[end:]
    )


def nested(data: bytes, source: random.Random) -> bytes:
    depth = source.choice((10, 1000, 100_000))
    return source.choice(
        [b"[" * depth, b'{"a":' * depth, b"[" * depth + b"]" * depth, b'{"r":' + b"[" * depth + b"]" * depth + b"}"]
    )


def edited(value: Any, source: random.Random) -> Any:
    """The JSON value with one change in it somewhere: another value, a missing key, a renamed one, a new one."""
    if isinstance(value, dict) and value and source.random() < 0.9:
        key = source.choice(list(value))
        match source.randrange(6):
            case 0:
                return {k: v for k, v in value.items() if k != key}
            case 1:
                return {(k + source.choice((".", "x", "\x00")) if k == key else k): v for k, v in value.items()}
            case 2:
                return value | {source.choice(["use_dora", "__metadata__", "r", "new", "alpha_pattern"]): source.choice(ODD)}
            case _:
                return value | {key: edited(value[key], source)}
    if isinstance(value, list) and value and source.random() < 0.6:
        at = source.randrange(len(value))
        return [*value[:at], edited(value[at], source), *value[at + 1 :]]
    if isinstance(value, int) and source.random() < 0.5:
        return value + source.choice((-4, -1, 1, 4, 1 << 40))
    if isinstance(value, str) and source.random() < 0.5:
        return source.choice([*DTYPES, "F8_E4M3", "BOOL", value[::-1]])
    return source.choice(ODD)


def header(data: bytes, source: random.Random) -> bytes:
    """The weights file with a change in its header, the header's length right."""
    (length,) = struct.unpack("<Q", data[:8])
    text = json.dumps(edited(json.loads(data[8 : 8 + length]), source)).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def options(data: bytes, source: random.Random) -> bytes:
    return json.dumps(edited(json.loads(data), source)).encode()
