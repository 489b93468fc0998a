"""Whether a passage is text that somebody could read."""

from __future__ import annotations

import unicodedata
from collections import Counter

CONTROLS = ("Cc", "Cn", "Co", "Cs")
"""Unicode's categories of control characters, and of what stands for nothing that all agree on."""


def hardly_text(text: str, tokens: int) -> bool:
    """Whether `text`, which was `tokens` tokens, is mostly something else: binary, broken characters, numbers, base64.

    GPT-2's tokens are 4 letters of English, 2 to 3 of code, and one or two of what has no words. Languages that GPT-2
    has no words of have short tokens too, so that only ASCII without blanks is judged by that.
    """
    seen = [character for character in text if not character.isspace()]
    if len(seen) < 40:  # too little to judge
        return False
    categories = Counter(map(unicodedata.category, seen))
    broken = seen.count("\N{REPLACEMENT CHARACTER}") + sum(categories[name] for name in CONTROLS)
    letters = sum(number for name, number in categories.items() if name[0] in "LM")
    if broken * 20 > len(seen) or letters * 5 < 2 * len(seen):
        return True
    return text.isascii() and len(text) < 2 * tokens and len(seen) * 20 > 19 * len(text)
