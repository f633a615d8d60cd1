"""Compiling, keeping and calling compiled kernels: what may go wrong on a user's machine, and threads and processes."""

import concurrent.futures
import errno
import importlib.util
import multiprocessing
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from fast.ops import native

KERNEL = str(Path(__file__).with_name("kernel.cpp"))
ROOT = Path(__file__).parents[2]
needs_compiler = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


def forget():
    """Make native.py start anew: as in a process that has compiled and loaded nothing."""
    for function in (native._search, native._library, native._entry, native._warn):
        function.cache_clear()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, in a process that has loaded nothing."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("AFF_CACHE", str(folder))
    forget()
    yield folder
    forget()


@pytest.fixture
def threads():
    """Two threads; the other tests have one."""
    torch.set_num_threads(2)
    yield 2
    torch.set_num_threads(1)


def scaled(kernel=KERNEL, n=1000):
    """Run the kernel and assert what it computed."""
    x, out = torch.arange(n, dtype=torch.float64), torch.empty(n, dtype=torch.float64)
    native.call(kernel, "scaled", x, out, n, 3, 0.5)
    assert out.tolist() == [3 * i + 0.5 for i in range(n)]


def builds(folder):
    return sorted(path for path in folder.iterdir() if path.suffix == ".so")


def script(path, text):
    """Write a shell script that stands for a compiler."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def compiled_sources(monkeypatch):
    """Return a list to which every source that is compiled from now on adds its name."""
    compiled, run = [], native._run

    def watched(command, *rest):
        compiled.extend(Path(word).name for word in command if word.endswith(".cpp"))
        return run(command, *rest)

    monkeypatch.setattr(native, "_run", watched)
    return compiled


# ---- compilers


def test_without_a_compiler_one_line_says_what_to_install(cache, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert native.unavailable() == f"no C++ compiler; {native.INSTALL}, or pip install ziglang"
    with pytest.raises(native.CompilerError, match="no C"):
        native.load("probe.cpp")


def test_the_compilers_are_torch_compiles_then_ziglang(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name != "c++" else None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "ziglang")
    monkeypatch.delenv("CXX", raising=False)
    zig = (sys.executable, "-m", "ziglang", "c++")
    assert native._commands() == [("g++",), ("clang++",), zig]
    monkeypatch.setattr(sys, "platform", "darwin")
    assert native._commands() == [("clang++",), ("g++",), zig]
    monkeypatch.setenv("CXX", "ccache 'my c++'")
    assert native._commands() == [("ccache", "my c++")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("exit 1", "does not start: exit status 1"),
        ("echo 'cannot execute cc1plus: no such file' >&2; exit 1", "does not start: cannot execute cc1plus"),
        ("sleep 30", "does not start: not done after 0.5 s"),
        (
            "case $* in *--version*) echo broken 1;; *) echo note; echo 'x.h: error: missing' >&2; exit 1;; esac",
            "missing",
        ),
        ("case $* in *--version*) echo broken 2;; esac", "makes no file"),
        ("for last; do :; done; case $* in *--version*) echo broken 3;; *) echo > $last;; esac", "cannot be loaded"),
    ],
    ids=["false", "message", "hangs", "does_not_compile", "makes_nothing", "makes_nonsense"],
)
def test_a_broken_compiler_is_named_in_one_line(cache, tmp_path, monkeypatch, text, said):
    monkeypatch.setattr(native, "VERSION_SECONDS", 0.5 if "sleep" in text else 60)
    monkeypatch.setenv("CXX", script(tmp_path / "broken", text))
    reason = native.unavailable()
    assert said in reason and "\n" not in reason
    assert "CXX" in reason or "broken" in reason


def test_a_compiler_that_is_not_there_is_named(cache, monkeypatch):
    monkeypatch.setenv("CXX", "/no/such/c++ -v")
    assert native.unavailable() == "the C++ compiler /no/such/c++ -v does not start: No such file or directory"


@pytest.mark.parametrize("text", ["'", "g++ 'a"])
def test_a_compiler_with_wrong_quotes_is_named(cache, monkeypatch, text):
    monkeypatch.setenv("CXX", text)
    assert native.unavailable() == f"CXX={text}: No closing quotation"


@needs_compiler
def test_a_broken_compiler_gives_way_to_the_next(cache, tmp_path, monkeypatch):
    working = native._search()[0].command
    forget()
    broken = script(tmp_path / "broken", "exit 1")
    monkeypatch.setattr(native, "_commands", lambda: [(broken,), working])
    assert native._search()[0].command == working
    scaled()


@needs_compiler
def test_a_compiler_that_rejects_a_flag_gets_fewer(cache, tmp_path, monkeypatch):
    working = " ".join(native._search()[0].command)
    forget()
    text = f"case $* in *=native*) echo 'error: unknown flag' >&2; exit 1;; *) exec {working} \"$@\";; esac"
    monkeypatch.setenv("CXX", script(tmp_path / "old", text))
    monkeypatch.setenv("AFF_NATIVE_FLAGS", "-DNOTHING")
    assert native._search()[0].flags == (*native.PLAIN_FLAGS, "-DNOTHING")
    scaled()


@needs_compiler
def test_a_source_that_does_not_compile_is_one_line_and_its_output_is_kept(cache, tmp_path):
    source = tmp_path / "wrong.cpp"
    source.write_text("int f() { return nothing_of_that_name; }")
    with pytest.raises(native.CompilerError, match="wrong.cpp does not compile: .*nothing_of_that_name.*") as caught:
        native.load(str(source))
    message = str(caught.value)
    assert "\n" not in message and f"command: {native._search()[0].command[0]}" in message
    assert "nothing_of_that_name" in Path(message.partition("output: ")[2]).read_text()


# ---- the cache


@needs_compiler
def test_a_second_process_compiles_nothing(cache, monkeypatch):
    scaled()
    assert len(builds(cache)) == 2  # the probe's too
    assert cache.stat().st_mode & 0o777 == 0o700
    forget()
    compiled = compiled_sources(monkeypatch)
    scaled()
    assert not compiled


@needs_compiler
@pytest.mark.parametrize(
    "harm",
    [
        lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\x7fELF" + bytes(500)),
        lambda path: path.chmod(0o666),
        lambda path: (path.rename(path.with_suffix(".moved")), path.symlink_to(path.with_suffix(".moved"))),
        lambda path: (path.unlink(), os.mkfifo(path, 0o600)),
    ],
    ids=["truncated", "empty", "foreign", "world_writable", "a_link", "a_pipe"],
)
def test_a_build_that_is_not_to_be_trusted_is_built_again(cache, tmp_path, monkeypatch, harm):
    scaled()
    forget()
    copy = shutil.copytree(cache, tmp_path / "copy")  # of which nothing is mapped into this process
    monkeypatch.setenv("AFF_CACHE", str(copy))
    path = next(path for path in builds(copy) if "kernel" in path.name)
    harm(path)
    compiled = compiled_sources(monkeypatch)
    scaled()
    assert compiled == ["kernel.cpp"]
    assert native._intact(path, path.name.rpartition("-")[0])  # and mended


@needs_compiler
@pytest.mark.parametrize(
    "change",
    [
        lambda patch, folder: patch.setattr(native, "processor", lambda: ("linux", "x86_64", "flags : of another one")),
        lambda patch, folder: patch.setenv("AFF_NATIVE_FLAGS", "-DSOMETHING"),
        lambda patch, folder: (folder / "beside.h").write_text("// changed"),
        lambda patch, folder: patch.setattr(native, "_version", lambda command: "the next version"),
    ],
    ids=["processor", "flags", "header", "compiler"],
)
def test_a_build_for_something_else_is_not_taken(cache, tmp_path, monkeypatch, change):
    source = shutil.copy(KERNEL, tmp_path)
    scaled(str(source))
    before = builds(cache)
    forget()
    change(monkeypatch, tmp_path)
    scaled(str(source))
    assert len([path for path in builds(cache) if "kernel" in path.name]) == 2
    assert set(before) < set(builds(cache))


@needs_compiler
def test_paths_with_spaces_brackets_and_letters_of_any_language(cache, tmp_path, monkeypatch):
    folder = tmp_path / "mit Leerzeichen, ä [a] 中 '"
    folder.mkdir()
    source = shutil.copy(KERNEL, folder)
    monkeypatch.setenv("AFF_CACHE", str(folder / "cache"))
    scaled(str(source))
    forget()
    compiled = compiled_sources(monkeypatch)
    scaled(str(source))
    assert not compiled


def a_file(cache, patch):
    cache.write_text("")


def inside_a_file(cache, patch):
    cache.write_text("")
    patch.setenv("AFF_CACHE", str(cache / "deeper"))


def nowhere(cache, patch):
    patch.setenv("AFF_CACHE", "/proc/nowhere")


def no_home(cache, patch):
    patch.delenv("AFF_CACHE")
    patch.delenv("XDG_CACHE_HOME", raising=False)
    patch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory.")))


def world_writable(cache, patch):
    cache.mkdir()
    cache.chmod(0o777)


def in_a_world_writable_folder(cache, patch):
    cache.mkdir(mode=0o700)
    cache.parent.chmod(0o777)


def of_another_user(cache, patch):
    cache.mkdir(mode=0o700)
    me = os.getuid()
    patch.setattr(os, "getuid", lambda: me + 1)


def full(cache, patch):
    def refuse(*paths):
        raise OSError(errno.ENOSPC, "No space left on device", *map(str, paths))

    patch.setattr(os, "replace", refuse)


@needs_compiler
@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (a_file, "File exists"),
        (inside_a_file, "Not a directory"),
        (nowhere, "/proc/nowhere: No such file"),
        (no_home, "home directory"),
        (world_writable, "others may write to"),
        (in_a_world_writable_folder, "others may write to"),
        (of_another_user, "belongs to another user"),
        (full, "No space left on device"),
    ],
)
def test_a_cache_folder_that_cannot_be_used_is_one_warning_and_the_result_is_right(cache, monkeypatch, prepare, said):
    monkeypatch.setattr("tempfile.tempdir", None)
    prepare(cache, monkeypatch)
    with pytest.warns(UserWarning, match="compiled kernels are not kept .*set AFF_CACHE") as caught:
        scaled()
    assert len(caught) == 1 and said in str(caught[0].message) and "\n" not in str(caught[0].message)
    assert not cache.is_dir() or not list(cache.iterdir())


@needs_compiler
def test_a_cache_folder_that_can_only_be_read_is_read(cache, monkeypatch):
    scaled()
    forget()

    def refuse(*arguments, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "utime", refuse)
    compiled = compiled_sources(monkeypatch)
    scaled()
    assert not compiled


@needs_compiler
def test_builds_that_nobody_uses_are_removed_and_nothing_else(cache):
    scaled()
    old = time.time() - 31 * 86400
    used, *rest = builds(cache)
    names = ["x-kernel-0123456789abcdef-0123456789abcdef.so", "aff-abc.tmp", "libmine.so", "notes.tmp"]
    for name in names:
        (cache / name).write_text("")
    for path in cache.iterdir():
        os.utime(path, (old, old))
    forget()
    os.utime(used)
    native._remove_unused(cache)
    assert {path.name for path in cache.iterdir()} == {used.name, "libmine.so", "notes.tmp"}


@needs_compiler
def test_using_a_build_keeps_it(cache):
    scaled()
    old = time.time() - 31 * 86400
    for path in builds(cache):
        os.utime(path, (old, old))
    forget()
    scaled()
    assert all(path.stat().st_mtime > old + 86400 for path in builds(cache))


# ---- calls


@needs_compiler
@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(4, 2, dtype=torch.float64).T[0],
        torch.zeros(4, dtype=torch.float64, device="meta"),
        torch.zeros(4, dtype=torch.complex128).conj(),
        torch.zeros(4, dtype=torch.complex128).conj().imag.contiguous()._neg_view(),
    ],
    ids=["strided", "meta", "conjugate", "negative"],
)
def test_a_tensor_whose_memory_is_not_its_values_is_refused(value):
    with pytest.raises(ValueError, match="scaled: argument 1 must be a contiguous tensor on the CPU"):
        native.call(KERNEL, "scaled", value, value, 4, 1, 0.0)


@needs_compiler
@pytest.mark.parametrize("numbers", [(4, 1), (4, 1, 0), (4, 1.0, 0.0), (4, None, 0.0), (4, "1", 0.0), (4, 1, 0.0, 0)])
def test_arguments_of_other_kinds_than_before_are_refused(numbers):
    scaled()
    x = torch.zeros(4, dtype=torch.float64)
    with pytest.raises(TypeError, match="scaled: kinds of arguments differ"):
        native.call(KERNEL, "scaled", x, x, *numbers)


@needs_compiler
def test_a_function_that_is_not_there_is_named():
    with pytest.raises(AttributeError, match="no_such_function"):
        native.call(KERNEL, "no_such_function", 1)


# ---- threads and processes


def workers(n=8):
    """Return how many threads take part."""
    thread = torch.zeros(n, dtype=torch.int64)
    native.call(KERNEL, "who", thread, n)
    return len(set(thread.tolist()))


@needs_compiler
@pytest.mark.skipif(native._parallel_runtime() is None, reason="no OpenMP runtime of PyTorch")
def test_as_many_threads_as_torch_has(threads):
    assert workers() == 2
    torch.set_num_threads(1)
    assert workers() == 1


@needs_compiler
def test_without_the_runtime_one_thread_computes_the_same(threads, monkeypatch):
    monkeypatch.setattr(native, "_parallel_runtime", lambda: None)
    assert workers() == 1
    scaled()


@pytest.mark.skipif(sys.platform != "linux", reason="of PyTorch's wheels for Linux")
def test_a_runtime_that_is_not_global_is_found_beside_torch(monkeypatch):
    found, open_library = native._parallel_runtime.__wrapped__(), native.ctypes.CDLL
    if not list((Path(torch.__file__).parent / "lib").glob("libgomp*")):
        pytest.skip("this torch brings no libgomp")

    def refuse_global(path, **options):
        if path is None:
            raise OSError
        return open_library(path, **options)

    monkeypatch.setattr(native.ctypes, "CDLL", refuse_global)
    assert native._parallel_runtime.__wrapped__() == found is not None


@needs_compiler
def test_loops_on_threads_inside_loops_on_threads(threads):
    out = torch.empty(50, 40, dtype=torch.float64)
    native.call(KERNEL, "nested", out, 50, 40)
    assert torch.equal(out, torch.arange(50.0).double()[:, None] + torch.arange(40.0).double())


@needs_compiler
def test_several_python_threads_at_once(cache, threads, monkeypatch):
    compiled = compiled_sources(monkeypatch)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(scaled, KERNEL, 10_000 + i) for i in range(40)]:
            future.result()
    assert compiled == ["probe.cpp", "kernel.cpp"]


def child():
    """What a child process does: right values, however many threads."""
    torch.set_num_threads(2)
    scaled()
    assert not native._forked or workers() == 1


@needs_compiler
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_a_child_process_of_one_that_used_threads(threads, method):
    scaled(n=100_000)
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    process = multiprocessing.get_context(method).Process(target=child)
    process.start()
    process.join(200)
    if process.is_alive():
        process.kill()
    assert process.exitcode == 0


class Rows(torch.utils.data.Dataset):
    """A data set whose items come out of a kernel."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        out = torch.empty(9, dtype=torch.float64)
        native.call(KERNEL, "scaled", torch.arange(9.0, dtype=torch.float64), out, 9, index, 1.0)
        return out


@needs_compiler
def test_workers_of_a_data_loader(threads):
    scaled(n=100_000)
    loader = torch.utils.data.DataLoader(Rows(), batch_size=2, num_workers=2, timeout=120)
    expected = torch.arange(6.0)[:, None] * torch.arange(9.0) + 1
    assert torch.equal(torch.cat(list(loader)), expected.double())


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_ten_processes_that_start_at_once(cache):
    processes = [multiprocessing.get_context("fork").Process(target=scaled) for _ in range(10)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
    assert [process.exitcode for process in processes] == [0] * 10
    assert all(path.suffix == ".so" for path in cache.iterdir())
    scaled()


def killed_while_compiling(folder):
    os.environ["CXX"] = script(folder / "slow", "case $* in *--version*) echo slow;; *) kill -9 $PPID;; esac")
    native.unavailable()


def killed_while_keeping(folder):
    os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
    native.unavailable()


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("death", [killed_while_compiling, killed_while_keeping])
def test_a_process_that_is_killed_leaves_nothing_in_the_way(cache, tmp_path, death):
    process = multiprocessing.get_context("fork").Process(target=death, args=(tmp_path,))
    process.start()
    process.join(200)
    assert process.exitcode == -signal.SIGKILL
    assert not builds(cache)
    scaled()
    assert len(builds(cache)) == 2


# ---- the doctor


@needs_compiler
def test_what_the_doctor_says(cache, threads):
    compiler, kernels, runtime = native.describe()
    assert compiler.startswith("compiler ") and ", code for " in compiler
    assert kernels == f"kernels  0 of 5 built, the others at first use; kept in {cache}"
    assert runtime.startswith("OpenMP   ")
    native.load("merging/cpu.cpp")
    assert list(native.describe())[1] == f"kernels  1 of 5 built, the others at first use; kept in {cache}"


def test_what_the_doctor_says_without_a_compiler(cache, monkeypatch):
    monkeypatch.setenv("CXX", "/no/such/c++")
    assert next(native.describe()).startswith("compiler none that works: the C++ compiler /no/such/c++ does not start")
