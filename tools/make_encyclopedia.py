"""Make `data/encyclopedia`: articles of the English Wikipedia, from the sample of a dump that gensim's wheel carries.

    pip download --no-deps gensim==4.4.0
    python tools/make_encyclopedia.py gensim-4.4.0-*.whl data/encyclopedia/articles.jsonl.gz

Wants the package mwparserfromhell. Running text alone is kept: no tables, lists, notes, headings or templates.
"""

from __future__ import annotations

import argparse
import bz2
import gzip
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

DUMP = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
LEAST_PARAGRAPH, LEAST_ARTICLE = 120, 1500  # characters
_END = re.compile(
    r"\n(See also|References|External links|Notes|Further reading|Bibliography|Sources) *\n.*", re.DOTALL
)
_LINKED = r"\[\[(?:File|Image|Category|[a-z-]{2,12}):(?:[^\[\]]|\[\[[^\]]*\]\])*\]\]"  # pictures, other languages
_DROPPED = re.compile(r"<ref[^>]*?/>|<ref.*?</ref>|<!--.*?-->|\{\|.*?\|\}|" + _LINKED, re.DOTALL)


def pages(wheel: Path) -> Iterator[tuple[str, str]]:
    """Title and wikitext of each page of the dump, which ends in the middle of one."""
    with zipfile.ZipFile(wheel) as archive, archive.open(DUMP) as file:
        title = ""
        try:
            for _, element in ElementTree.iterparse(bz2.open(file)):
                tag = element.tag.rpartition("}")[2]
                if tag == "title":
                    title = element.text
                elif tag == "text":
                    yield title, element.text or ""
                    element.clear()
        except ElementTree.ParseError:
            return


def prose(wikitext: str) -> str:
    """The running text of an article, a paragraph a line; empty where it is too short, or no article."""
    import mwparserfromhell

    if wikitext[:9].lower() == "#redirect":
        return ""
    text = _END.sub("", mwparserfromhell.parse(_DROPPED.sub("", wikitext)).strip_code())
    kept = [tidied(line) for line in text.split("\n")]
    kept = [
        line
        for line in kept
        if len(line) >= LEAST_PARAGRAPH
        and line[-1] in '.!?"'
        and not re.search(r"\[\[|\]\]|\{\{|\}\}|\||''|^[*#:;!]", line)
    ]
    return "\n".join(kept) if sum(map(len, kept)) >= LEAST_ARTICLE else ""


def tidied(line: str) -> str:
    """A line without what templates leave behind when they are taken out: empty brackets, lone commas, double spaces."""
    line = re.sub(r"\(\s*(?:(?:[,;:]|or|and)\s*)*", "(", line)
    line = re.sub(r"\(\s*\)|\[\s*\]", "", line)
    line = re.sub(r"\s+([,.;:)])", r"\1", line)
    return re.sub(r"\s+", " ", line).strip()


def main() -> None:
    """Write the articles, and say how many there are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    rows = [
        {"title": title, "text": text}
        for title, wikitext in pages(args.wheel)
        if ":" not in title and (text := prose(wikitext))
    ]
    with (
        open(args.out, "wb") as raw,
        gzip.GzipFile(fileobj=raw, mode="wb", filename="", mtime=0, compresslevel=9) as file,
    ):
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8"))
    print(f"{len(rows)} articles, {sum(len(row['text']) for row in rows):,} characters: {args.out}")


if __name__ == "__main__":
    main()
