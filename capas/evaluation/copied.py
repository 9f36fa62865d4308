"""Check whether an answer repeats the values of its prompt: numbers, names and quoted strings.

"I was charged 41 EUR" is answered by "We refund your 41 EUR". An answer that says 3 EUR may still share
most of its words with the reference, so that ROUGE and chrF hardly notice.
"""

import re
import unicodedata

_NUMBER = re.compile(r"\d+(?:[.,:/-]\d+)*")
_QUOTED = re.compile(
    r'"([^"\n]{1,80})"|“([^”\n]{1,80})”|«([^»\n]{1,80})»|„([^“\n]{1,80})“|`([^`\n]{1,80})`'
)
_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
_ENDS = '.!?¿¡:;\n"“”«»(['  # a capital after one of these may begin a sentence


def copied_values(completion: str, reference: str, prompt: str) -> bool | None:
    """Return whether the completion has every value that the reference repeats from the prompt.

    Values are numbers, strings in quotation marks, and words that the prompt capitalises within a
    sentence. None if the reference repeats none.
    """
    completion, reference, prompt = (
        unicodedata.normalize("NFKC", text) for text in (completion, reference, prompt)
    )
    wanted = {value for value in _candidates(reference, prompt) if _holds(prompt, value)}
    return all(_holds(completion, value) for value in wanted) if wanted else None


def _candidates(reference: str, prompt: str) -> set[str]:
    numbers = set(_NUMBER.findall(reference))
    quoted = {next(filter(None, found)).strip() for found in _QUOTED.findall(reference)}
    names = {name for name in _names(prompt) if _holds(reference, name)}
    return {value for value in numbers | quoted | names if value}


def _names(text: str) -> set[str]:
    """Return the words with a capital that do not begin a sentence."""
    found = set()
    for match in _WORD.finditer(text):
        before = text[: match.start()].rstrip(" ")
        if match[0][0].isupper() and len(match[0]) > 1 and before and before[-1] not in _ENDS:
            found.add(match[0])
    return found


def _holds(text: str, value: str) -> bool:
    """Return whether the text contains the value as a whole: 410 and 4.41 do not contain 41."""
    pattern = rf"(?<!\w){re.escape(value)}(?!\w)"
    if value[0].isdigit():
        pattern = rf"(?<![\w])(?<!\d[.,:/-]){re.escape(value)}(?!\w)(?![.,:/-]\d)"
    return re.search(pattern, text) is not None
