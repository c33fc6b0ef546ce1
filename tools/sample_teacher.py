"""Write texts that a teacher makes itself: `python tools/sample_teacher.py MODEL OUT.jsonl.gz --tokens 300000`."""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path

from ildlab.files import write_atomic
from ildlab.model.load import load_model
from ildlab.text.teacher_text import sample_steps


def main(argv: list[str] | None = None) -> None:
    """Sample from a model and write the texts, `{"text": ...}` a line; the bytes depend on the texts alone."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("model", help="smollm2-135m, a folder, a .gguf file or a Hub id")
    parser.add_argument("out", type=Path, help="a .jsonl.gz file")
    for name, default in {"tokens": 300_000, "rows": 32, "length": 256, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    given = vars(parser.parse_args(argv))
    loaded, out = load_model(given.pop("model")), given.pop("out")
    for progress in sample_steps(loaded.model, loaded.tokenizer, **given):  # written after each: it may take an hour
        lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in progress.partial)
        write_atomic(out, gzip.compress(lines.encode("utf-8", "replace"), mtime=0))
        print(f"{progress.done:,} of {progress.total:,} tokens, {progress.note} in {out}", flush=True)


if __name__ == "__main__":
    main()
