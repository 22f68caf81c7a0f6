"""``python -m tests.fuzz TARGET [libFuzzer options]``: coverage-guided fuzzing of one parser.

Needs atheris (``make fuzz`` installs it). Without a target, lists them. What is found lies in
``build/fuzz/TARGET/``: a crash file is an input that raised something the target does not document;
give its path as an option to run just that one.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["mesh", "gateway"]):
    from tests.fuzz.targets import Target, targets


def main() -> int:
    """Fuzz the target that the command line names."""
    known = {target.name: target for target in targets()}
    if len(sys.argv) < 2 or sys.argv[1] not in known:
        print("\n".join(known))
        return 0 if len(sys.argv) < 2 else 2
    fuzz(known[sys.argv[1]], sys.argv[2:])
    return 0


def fuzz(target: Target, options: list[str]) -> None:
    """Run libFuzzer; does not return when it finds something."""
    logging.disable(logging.CRITICAL)
    folder = Path("build/fuzz") / target.name
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    names = [option for option in options if not option.startswith("-")]
    atheris.Setup(
        [sys.argv[0], f"-artifact_prefix={folder}/", *options, *([] if names else [str(corpus)])],
        target.try_one,
    )
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
