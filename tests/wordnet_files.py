"""A small WordNet database in the files that Princeton's has: data.noun and index.noun."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

LICENCE = "".join(f"  {n} A line of the licence.  \n" for n in range(1, 4))


def write_database(
    folder: Path,
    synsets: Mapping[str, tuple[str, str]],
    first: Mapping[str, str] | None = None,
) -> Path:
    """Write both files, as wndb(5WN) defines them.

    Args:
        folder: that the files are written into.
        synsets: by a name of the test's own its words and the names of its hypernyms, each as one
            string; a name that begins with `i:` is that of an instance hypernym.
        first: by lemma the name of its most frequent sense; its others follow as in `synsets`.
    """
    pointers: dict[str, list[tuple[str, str]]] = {name: [] for name in synsets}
    for name, (_, above) in synsets.items():
        for parent in above.split():
            kind, target = ("i" * parent.startswith("i:"), parent.removeprefix("i:"))
            pointers[name].append((f"@{kind}", target))
            pointers[target].append((f"~{kind}", name))
    offsets = dict.fromkeys(synsets, 0)
    for _ in range(2):  # an offset has eight digits, whatever it is
        place, lines = len(LICENCE), []
        for name, (words, _) in synsets.items():
            forms = " ".join(f"{word} 0" for word in words.split())
            to = "".join(f"{sign} {offsets[other]:08d} n 0000 " for sign, other in pointers[name])
            line = (
                f"{offsets[name]:08d} 03 n {len(words.split()):02x} {forms} "
                f"{len(pointers[name]):03d} {to}| what {name} is  \n"
            )
            offsets[name] = place
            lines.append(line)
            place += len(line)
    (folder / "data.noun").write_bytes((LICENCE + "".join(lines)).encode())
    senses: dict[str, list[str]] = {}
    for name, (words, _) in synsets.items():
        for word in words.split():
            senses.setdefault(word.lower(), []).append(name)
    rows = []
    for lemma, names in sorted(senses.items()):
        chosen = [name for name in names if name == (first or {}).get(lemma)]
        names = list(dict.fromkeys([*chosen, *names]))
        signs = sorted({sign for name in names for sign, _ in pointers[name]})
        at = " ".join(f"{offsets[name]:08d}" for name in names)
        count = len(names)
        rows.append(
            " ".join([lemma, "n", str(count), str(len(signs)), *signs, f"{count} 0 {at}  \n"])
        )
    (folder / "index.noun").write_bytes((LICENCE + "".join(rows)).encode())
    return folder
