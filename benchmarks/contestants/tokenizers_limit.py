"""(a) The limit of `tokenizers`: texts that are rendered already become ids; no mask, nothing is written.

python tokenizers_limit.py FOLDER TOKENIZER
"""

import json
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
from tokenizers import Tokenizer

TEXTS_AT_ONCE = 2000  # all in one call is slower: it fills memory


def main(folder: Path, tokenizer_dir: Path) -> None:
    texts = pq.read_table(folder / "texts.parquet")["text"].to_pylist()
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    num_tokens, seconds = 0, 0.0
    for first in range(0, len(texts), TEXTS_AT_ONCE):
        some = texts[first : first + TEXTS_AT_ONCE]
        started = time.perf_counter()
        encodings = tokenizer.encode_batch_fast(some, add_special_tokens=False)
        seconds += time.perf_counter() - started
        num_tokens += sum(map(len, encodings))
    print(json.dumps({"seconds": seconds, "num_tokens": num_tokens}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
