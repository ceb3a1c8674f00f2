"""What a build is for: keys that change with what the compiler makes, and with nothing else."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lightkit.native import builder, cache, target, toolchain


def processor_of(monkeypatch: pytest.MonkeyPatch, words: set[str]) -> None:
    """Gives this machine another processor, as far as /proc/cpuinfo goes."""
    monkeypatch.setattr(target, "processor", lambda: frozenset(words))


def test_another_kernel_of_the_system_changes_no_key(tiny_sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flag in /proc/cpuinfo that the compiler makes nothing of leaves the build that it is."""
    library = builder.build()
    processor_of(monkeypatch, target.processor() | {"some_mitigation"})
    assert cache.find() == library


@pytest.mark.skipif(not target._is_x86(), reason="levels are x86's")
@pytest.mark.parametrize(("march", "simd"), [("x86-64-v3", "AVX2"), ("x86-64-v4", "AVX512")])
def test_levels_do_not_depend_on_the_builder(
    tiny_sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, march: str, simd: str
) -> None:
    """A level's build is the same whatever the processor of its builder, and names the instructions it needs."""
    monkeypatch.setenv("LIGHTKIT_MARCH", march)
    compiler = toolchain.require_compiler()
    place = cache.build_directory(compiler)
    processor_of(monkeypatch, {"fpu"})
    assert cache.build_directory(compiler) == place
    made = target.resolve(compiler, tmp_path)
    assert made.simd == simd and {"avx2", "fma"} <= set(made.instructions)
    assert f"-march={march}" in made.flags
    assert ("avx512f" in made.instructions) == (simd == "AVX512")


@pytest.mark.skipif(not target._is_x86(), reason="levels are x86's")
def test_native_and_a_level_are_two_builds(tiny_sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was compiled for a level does not answer for this machine's own processor."""
    place = cache.build_directory(toolchain.require_compiler())
    monkeypatch.setenv("LIGHTKIT_MARCH", "x86-64-v3")
    assert cache.build_directory(toolchain.require_compiler()) != place


def test_unknown_level_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A typing error in LIGHTKIT_MARCH is told, not taken for the default."""
    monkeypatch.setenv("LIGHTKIT_MARCH", "x86-64-v9")
    with pytest.raises(toolchain.ToolchainError, match="must be one of native, x86-64-v3, x86-64-v4, got 'x86-64-v9'"):
        target.march()


def test_library_beyond_the_processor_is_refused(tiny_sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library whose instructions this processor lacks is an error, not a process that an unknown one ends."""
    manifest = cache.read_manifest(builder.build().parent)
    processor_of(monkeypatch, set(manifest.instructions) | {"fpu"})
    cache.check_processor(manifest)
    processor_of(monkeypatch, {"fpu"})
    if manifest.instructions:
        with pytest.raises(cache.CacheError, match="and this processor lacks"):
            cache.check_processor(manifest)


def test_without_a_compiler_only_what_the_processor_runs_is_found(
    tiny_sources: Path, monkeypatch: pytest.MonkeyPatch, forget_keys: Callable[[], None]
) -> None:
    """One cache serves machines with different processors: each takes what it can run, or nothing."""
    library = builder.build()
    instructions = set(cache.read_manifest(library.parent).instructions)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    forget_keys()
    processor_of(monkeypatch, instructions)
    assert cache.find() == library
    if instructions:
        processor_of(monkeypatch, set())
        assert cache.find() is None


def test_a_comment_of_the_recipe_changes_no_key_but_a_flag_does(
    tiny_sources: Path, monkeypatch: pytest.MonkeyPatch, forget_keys: Callable[[], None]
) -> None:
    """The key holds the flags that the compiler gets, not the text of the files that make them."""
    key = target.base_key()
    flags = toolchain.common_flags
    monkeypatch.setattr(toolchain, "common_flags", lambda cuda: list(flags(cuda)))
    forget_keys()
    assert target.base_key() == key
    monkeypatch.setattr(toolchain, "common_flags", lambda cuda: [*flags(cuda), "-fsomething"])
    forget_keys()
    assert target.base_key() != key


def test_what_a_compiler_said_is_asked_once(tiny_sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that finds its library runs no compiler."""
    library = builder.build()
    monkeypatch.setattr(toolchain, "output", lambda *command: pytest.fail(f"{command} was run"))
    assert cache.find() == library
    (answer,) = cache.native_root().glob("target-*.json")
    answer.write_text("[]")
    with pytest.raises(pytest.fail.Exception):
        cache.find()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere torch is built with clang")
def test_clang_is_refused_by_name(tiny_sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler whose OpenMP would not work with torch's is told by name, not by an error of the linker."""
    clang = tmp_path / "some-compiler"
    clang.write_text("#!/bin/sh\necho 'Debian clang version 14.0.6'\n")
    clang.chmod(0o755)
    monkeypatch.setenv("CXX", str(clang))
    with pytest.raises(toolchain.ToolchainError, match=r"some-compiler is clang, .* set CXX to a g"):
        builder.build()


def test_warm_start_imports_no_build_tools(run_python, built_cache: Path) -> None:
    """Loading a library that is there imports neither torch's extension builder nor what compiles."""
    code = (
        "import sys\nfrom lightkit import native\nassert native.load() is not None\n"
        "print([name for name in ('torch.utils.cpp_extension', 'lightkit.native.builder') if name in sys.modules])"
    )
    result = run_python("-c", code, cache_dir=built_cache, LIGHTKIT_NATIVE="require")
    assert result.stdout.strip() == "[]", result.stderr
