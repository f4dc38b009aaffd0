"""Bugs planted in the kernels, one at a time: what ``test_mutations.py`` expects the tests to catch.

A mutation replaces text that must occur exactly once in its file, so it cannot rot silently. The changed
file is compiled, linked with the objects of the unchanged ones, and its kernel's tests run on the result in a
process of their own. ``python tests/emulator/mutations.py [name]`` prints what every variant says about it.
"""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from emulator import build

SECONDS = 120  # that the tests of one mutation may take


@dataclass(frozen=True)
class Mutation:
    """One planted bug."""

    name: str
    file: str  # below the root of the repository
    old: str
    new: str
    tests: str  # arguments of pytest, below this folder
    way: str  # variant:seed that catches it
    says: str  # a regular expression that the failure's report matches
    unit: str | None = None  # the source to compile, if it is not `file`

    def text(self) -> str:
        """The file with the bug."""
        original = (build.ROOT / self.file).read_text()
        found = original.count(self.old)
        assert found == 1, (
            f"mutation {self.name}: {self.old!r} occurs {found} times in {self.file}, not once: "
            "the kernel changed, adapt the mutation"
        )
        return original.replace(self.old, self.new)


def build_mutant(mutation: Mutation, variant: str) -> Path:
    """The module with the bug in it; every other object is the unchanged build's."""
    folder = build.OUTPUT / "mutants" / mutation.name
    changed = folder / mutation.file
    changed.parent.mkdir(parents=True, exist_ok=True)
    if not changed.exists() or changed.read_text() != mutation.text():
        changed.write_text(mutation.text())
    original = build.ROOT / (mutation.unit or mutation.file)
    source = folder / mutation.unit if mutation.unit else changed
    if mutation.unit:  # a copy, so that the changed header is found before the original
        source.parent.mkdir(parents=True, exist_ok=True)
        source.write_text(original.read_text())
    # Headers: first those of the copy, then those beside the original.
    first = ["-w", f"-I{folder / 'csrc'}", f"-iquote{original.parent}"]
    target = folder / variant / "changed.o"
    # Unoptimised: its tests end with their first failure, and compiling takes twice as long as they do. But
    # where a call gives what is stored, and is not inlined, GCC does not instrument the store.
    unoptimised = [] if variant == "tsan" else ["-O0"]
    build.compile_source(variant, source, target, first, [*unoptimised, "-g0"])
    objects = [build.object_of(variant, source) for source in build.sources(variant)]
    objects.remove(build.object_of(variant, original))
    objects.insert(0, target)  # of an inline function in several objects the linker keeps the first
    module = folder / variant / f"emulated_{variant}.so"
    build.link(variant, objects, module)
    return module


def run_tests(module: Path, tests: str, way: str) -> tuple[int, str]:
    """Exit status (negative: the signal that ended it) and output of the tests on a module."""
    here = Path(__file__).resolve().parent
    env = {**build.ENVIRONMENT, "MOA_EMULATOR": way, "MOA_EMULATOR_MODULE": str(module)}
    if way.startswith("asan"):
        env.update(build.asan_environment(module))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "--tb=short",
        "--capture=sys",
        "-p",
        "no:cacheprovider",
    ]
    run = subprocess.run(
        [*command, f"--confcutdir={here}", *shlex.split(tests)],
        cwd=here,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=SECONDS,
    )
    return run.returncode, run.stdout


def outcome(mutation: Mutation, way: str | None = None) -> tuple[bool, str]:
    """Whether the tests caught the bug as expected, and what they said."""
    way = way or mutation.way
    status, said = run_tests(build_mutant(mutation, way.split(":")[0]), mutation.tests, way)
    failed = status == 1 or status < 0  # pytest's 1: tests failed; the rest is about pytest itself
    said = f"exit status {status}\n{said}"
    return failed and re.search(mutation.says, said) is not None, said


MUTATIONS: list[Mutation] = []  # filled by planted_*.py


def plant(file: str, tests: str, unit: str | None = None):
    """Adds mutations of one kernel: name, old, new, way, says."""

    def add(name: str, old: str, new: str, way: str, says: str) -> None:
        MUTATIONS.append(Mutation(name, file, old, new, tests, way, says, unit))

    return add


# What a failure's report says: numbers far from the reference, or a crash; a stray access; a race; work
# memory that is read before it is written.
WRONG = r"error (inf|nan|\d)|not equal|assert |exit status -|behind the end of a buffer"
OUT = "out of bounds|AddressSanitizer|behind the end of a buffer|no buffer in global memory"
RACE = "a race: this thread"
UNWRITTEN = "reads what nobody has written"


def planted() -> list[Mutation]:
    """Every mutation there is."""
    for path in sorted(Path(__file__).parent.glob("planted_*.py")):
        importlib.import_module(f"emulator.{path.stem}")
    return MUTATIONS


def word(said: str) -> str:
    """What a variant said that does not catch the bug as expected."""
    status = int(said.split()[2])
    return "-" if status == 0 else "fails" if status in (1, -6, -11) else f"status {status}"


def main() -> None:
    """Every mutation under every variant."""
    chosen = [m for m in planted() if len(sys.argv) < 2 or sys.argv[1] in m.name]
    variants = list(build.VARIANTS)
    for variant in variants:
        build.build(variant)
    print(f"{'':34}" + "".join(f"{variant:10}" for variant in variants))
    with ThreadPoolExecutor(build.jobs()) as pool:
        futures = [
            [pool.submit(outcome, m, m.way if m.way.startswith(v) else f"{v}:0") for v in variants]
            for m in chosen
        ]
        for mutation, row in zip(chosen, futures, strict=True):
            results = [future.result() for future in row]
            words = ["caught" if ok else word(said) for ok, said in results]
            print(f"{mutation.name:34}" + "".join(f"{word:10}" for word in words), flush=True)
            if len(chosen) == 1:
                print("\n".join(said for _, said in results))


if __name__ == "__main__":
    from emulator import mutations  # the instance that planted_*.py fill

    mutations.main()
