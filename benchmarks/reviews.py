"""Writes made-up reviews: JSON lines shaped like Amazon Electronics 2018 5-core, gzip-compressed.

    python benchmarks/reviews.py FILE N

N lines with the fields of the real file, about 600 bytes each, whole days, grouped by item; as many reviews
for each user and item as there, long-tailed, none below five. The same N gives the same lines.
"""

from __future__ import annotations

import gzip
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

REVIEWS_PER_USER, REVIEWS_PER_ITEM = 9.25, 42.1  # of the real file: 6,739,590 / 728,719 / 160,052
FIRST_DAY, DAYS = 11_000, 6_800  # since 1970: February 2000 to September 2018
LINE = (
    b'{"overall": %d.0, %b"verified": %b, "reviewTime": "%b", "reviewerID": "%b", "asin": "%b", %b'
    b'"reviewerName": %b, "reviewText": %b, "summary": %b, "unixReviewTime": %d}\n'
)


def letters(numbers: Any, width: int, prefix: str) -> list[bytes]:
    """Return distinct keys of capital letters and digits, such as A3CIUOJXQ5VDQ2, in no order."""
    digits = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    step, keys = 0x9E3779B97F4A7C15 % 36**width, []
    while step % 2 == 0 or step % 3 == 0:  # no factor in common with 36: a permutation
        step += 1
    for number in numbers:
        value, text = number * step % 36**width, ""
        for _ in range(width):
            value, digit = divmod(value, 36)
            text += digits[digit]
        keys.append((prefix + text).encode())
    return keys


def texts(rng: Any, count: int, mean_words: float) -> list[bytes]:
    """Return `count` JSON strings of made-up words with Zipf's frequencies; some hold what JSON escapes."""
    syllables = [c + v + e for c in "bcdfglmnprstvw" for v in "aeiou" for e in ("", "n", "r", "st")]
    picked = rng.integers(0, len(syllables), (20_000, 3))
    parts = rng.integers(1, 4, 20_000)
    words = [
        "".join(syllables[s] for s in row[:n]) for row, n in zip(picked.tolist(), parts.tolist(), strict=True)
    ]
    weight = 1 / np.arange(1, len(words) + 1)
    edges = np.cumsum(weight / weight.sum())
    lengths = np.maximum(1, rng.lognormal(np.log(mean_words) - 0.5, 1.0, count)).astype(int)
    drawn = np.searchsorted(edges, rng.random(lengths.sum())).clip(max=len(words) - 1).tolist()
    made, at = [], 0
    for number, length in enumerate(lengths.tolist()):
        text = " ".join(words[w] for w in drawn[at : at + length]).capitalize() + "."
        at += length
        if number % 7 == 0:
            text = text.replace(" b", '\n\n"B', 1).replace("co", "c\u00f6", 1)
        made.append(json.dumps(text).encode())
    return made


def shares(rng: Any, groups: int, total: int) -> Any:
    """Return int64 (groups,) that add up to `total`, long-tailed, none below five."""
    weight = 1 / (rng.permutation(groups) + groups / 50) ** 0.9
    return 5 + rng.multinomial(total - 5 * groups, weight / weight.sum())


def generate(path: Path, reviews: int) -> None:
    """Write a file of `reviews` lines."""
    rng = np.random.default_rng(reviews)
    users, items = (max(1, int(reviews / per)) for per in (REVIEWS_PER_USER, REVIEWS_PER_ITEM))
    user_keys, item_keys = letters(range(users), 13, "A"), letters(range(items), 8, "B0")
    user = np.repeat(np.arange(users, dtype=np.int32), shares(rng, users, reviews))
    rng.shuffle(user)
    item = np.repeat(np.arange(items, dtype=np.int32), shares(rng, items, reviews))
    words = np.random.default_rng(0)  # the same at every size: so is the work of a line
    body, title = texts(words, 20_000, 48.0), texts(words, 5_000, 4.0)
    names = [
        json.dumps(f"{a}. {b}").encode() for a in "ABCDEFGHIJKLM" for b in ("Reader", "Smith", "k\u00f6")
    ]
    days = [time.gmtime(86_400 * day) for day in range(FIRST_DAY, FIRST_DAY + DAYS)]
    dates = [f"{d.tm_mon:02d} {d.tm_mday}, {d.tm_year}".encode() for d in days]
    votes = [b""] * 17 + [b'"vote": "2", ', b'"vote": "14", ', b'"vote": "1,204", ']
    styles = [b"", b'"style": {"Color:": " Black"}, ', b'"style": {"Size:": " 7.0 oz", "Color:": " Red"}, ']
    pools = (votes, (b"true", b"false"), styles, names, body, title)
    with gzip.open(path, "wb", compresslevel=4) as out:
        for start in range(0, reviews, 100_000):
            part = slice(start, min(start + 100_000, reviews))
            count = part.stop - part.start
            day = rng.integers(0, DAYS, count)
            fields = [[pool[n] for n in rng.integers(0, len(pool), count).tolist()] for pool in pools]
            vote, verified, style, name, text, summary = fields
            stars = rng.integers(1, 6, count).tolist()
            date, seconds = [dates[d] for d in day.tolist()], (86_400 * (FIRST_DAY + day)).tolist()
            who = [user_keys[u] for u in user[part].tolist()]
            what = [item_keys[i] for i in item[part].tolist()]
            columns = (stars, vote, verified, date, who, what, style, name, text, summary, seconds)
            out.write(b"".join(map(LINE.__mod__, zip(*columns, strict=True))))


if __name__ == "__main__":
    generate(Path(sys.argv[1]), int(sys.argv[2]))
