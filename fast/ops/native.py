"""Compile the CPU kernels at first use, keep them in a per-user cache, and call them on tensors' memory.

The compiler is the one that torch.compile takes (``$CXX``, else g++ or clang++), else that of the package ``ziglang``.
Builds are kept in ``$AFF_CACHE``, else ``$XDG_CACHE_HOME/autofocusformer``, else ``~/.cache/autofocusformer``; where no
safe folder can be had, every process compiles for itself. ``$AFF_NATIVE_FLAGS`` is added to the compiler's flags.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

HERE = Path(__file__).resolve().parent
ARM = platform.machine().lower() in ("arm64", "aarch64")
PLAIN_FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC")
# No kernel reads errno or floating-point exceptions. -Bsymbolic: a kernel's own functions come before anybody else's.
FLAGS = (
    *PLAIN_FLAGS,
    "-mcpu=native" if ARM else "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    *(() if sys.platform == "darwin" else ("-Wl,-Bsymbolic",)),
)
VERSION_SECONDS, COMPILE_SECONDS = 60, 600  # ziglang compiles its C++ library at first use
UNUSED_DAYS = 30  # after which a build is removed
INSTALL = "xcode-select --install" if sys.platform == "darwin" else "install g++ (apt install g++)"


class CompilerError(RuntimeError):
    """A compiler that is missing or fails; its text is one line."""


class Toolchain(NamedTuple):
    """A compiler that works: the command, the flags that it accepts, and what it calls itself."""

    command: tuple
    flags: tuple
    version: str


class Threads(ctypes.Structure):
    """``struct Threads`` of native.h."""

    _fields_ = (("start", ctypes.c_void_p), ("count", ctypes.c_int64))


# ---- calling --------------------------------------------------------------------------------------------------------


def call(name, function, *arguments):
    """Call a kernel, on as many threads as ``torch.get_num_threads()``.

    Parameters
    ----------
    name, function : str
        Source file, as for ``load``; function of it, whose first argument is ``const Threads*``. It returns nothing.
    *arguments : tensor, None, int or float
        Contiguous CPU tensors, passed as pointers (None: a null pointer); int64; double. A function's arguments are
        of the same kinds in every call, and tensors of the same dtypes.

    Raises
    ------
    ValueError
        A tensor that is not contiguous memory of the CPU.
    TypeError
        Another kind of argument, or kinds or dtypes that differ from those of the first call.
    CompilerError
        As ``load``.
    """
    values, kinds, dtypes = [], [ctypes.c_void_p], {}
    for value in arguments:
        if isinstance(value, torch.Tensor):
            if not (value.is_cpu and value.is_contiguous()) or value.is_conj() or value.is_neg():
                raise ValueError(f"{name}: {function}: argument {len(kinds)} must be a contiguous tensor on the CPU")
            dtypes[len(kinds)] = value.dtype
            values.append(value.data_ptr())
            kinds.append(ctypes.c_void_p)
        else:
            values.append(value)
            kinds.append(_KINDS.get(type(value)))
    entry = _entry(name, function)
    if entry.argtypes is None and None not in kinds:
        entry.argtypes, entry.restype = kinds, None
    if entry.argtypes != kinds:
        raise TypeError(f"{name}: {function}: kinds of arguments differ from those of its first call, or are unknown")
    known = _dtypes(name, function)
    for place, dtype in dtypes.items():
        if known.setdefault(place, dtype) != dtype:
            raise TypeError(f"{name}: {function}: argument {place} must hold {known[place]}, not {dtype}")
    entry(ctypes.byref(_threads(_start(), torch.get_num_threads())), *values)


_KINDS = {type(None): ctypes.c_void_p, int: ctypes.c_int64, bool: ctypes.c_int64, float: ctypes.c_double}


@functools.cache
def _dtypes(name, function):
    """The dtypes of a function's tensors by place, as they were when each was there first."""
    return {}


@functools.cache
def _entry(name, function):
    """Return a function of a library (one object for all callers, for its argument types are bound once)."""
    return getattr(load(name), function)


@functools.cache
def _threads(start, count):
    return Threads(start, count)


def _start():
    """Return the address of ``GOMP_parallel``, or None where only the calling thread can be used."""
    return None if _forked else _parallel_runtime()


@functools.cache
def _parallel_runtime():
    """Address of GOMP_parallel in the OpenMP runtime that PyTorch has loaded, or None."""
    near_torch = sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*"))
    for path in (None, *map(str, near_torch)):
        try:
            library = ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
            return ctypes.cast(library.GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
    return None


_forked = False
_lock = threading.RLock()  # of compiling and loading


def _after_fork():
    """In a forked child the OpenMP runtime's threads are gone, and so may be the thread that held the lock."""
    global _forked, _lock
    _forked, _lock = True, threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


# ---- compiling ------------------------------------------------------------------------------------------------------


def load(name):
    """Return the library of a kernel source, compiled if the cache does not hold it.

    Parameters
    ----------
    name : str
        Path of a .cpp file, relative to fast/ops, such as "attention/cpu.cpp".

    Raises
    ------
    CompilerError
        No compiler, or one that fails: the command, the first error and where the rest of its output is, in a line.
    """
    with _lock:
        toolchain, reason = _search()
        if reason:
            raise CompilerError(reason)
        return _library(toolchain, name)


def unavailable():
    """Return in one line why compiled kernels cannot run here and what to do, or None if they can."""
    with _lock:
        return _search()[1]


@functools.cache
def _search():
    """Return the first toolchain that builds a working probe, and why there is none; one of both is None."""
    if sys.platform not in ("linux", "darwin"):
        return None, f"compiled kernels run on Linux and macOS, not on {platform.system()}"
    try:
        commands, failures = _commands(), []
    except ValueError as error:
        return None, f"CXX={os.environ['CXX']}: {error}"
    for command in commands:
        try:
            return _working(command), None
        except CompilerError as error:
            failures.append(str(error))
    return None, failures[0] if failures else f"no C++ compiler; {INSTALL}, or pip install ziglang"


def _working(command):
    """Return the toolchain of a compiler, with fewer flags if it does not accept all."""
    version, extra = _version(command), tuple(shlex.split(os.environ.get("AFF_NATIVE_FLAGS", "")))
    best, plain = (Toolchain(command, flags + extra, version) for flags in (FLAGS, PLAIN_FLAGS))
    try:
        _check(_library(best, "probe.cpp"))
        return best
    except CompilerError:
        _check(_library(plain, "probe.cpp"))
        return plain


def _commands():
    """Return the commands that may start a C++ compiler, best first: torch.compile's choice, then others."""
    if os.environ.get("CXX", "").strip():
        return [tuple(shlex.split(os.environ["CXX"]))]
    names = ("clang++", "g++", "c++") if sys.platform == "darwin" else ("g++", "clang++", "c++")
    zig = [(sys.executable, "-m", "ziglang", "c++")] if importlib.util.find_spec("ziglang") else []
    return [(name,) for name in names if shutil.which(name)] + zig


def _version(command):
    """Return the first line of a compiler's --version."""
    with tempfile.TemporaryDirectory(prefix="aff-", ignore_cleanup_errors=True) as scratch:
        output = Path(scratch) / "version.txt"
        failure = _run([*command, "--version"], output, VERSION_SECONDS)
        if failure:
            raise CompilerError(f"the C++ compiler {shlex.join(command)} does not start: {failure}")
        return output.read_text(errors="replace").partition("\n")[0]


def _check(library):
    """Run the probe."""
    out = torch.zeros(37)
    library.probe(ctypes.byref(Threads(_start(), 2)), ctypes.c_void_p(out.data_ptr()), ctypes.c_int64(len(out)))
    if out.tolist() != [2 * i + 1 for i in range(len(out))]:
        raise CompilerError("the C++ compiler's code computes wrong values; try another one (CXX=clang++)")


@functools.cache
def _library(toolchain, name):
    """Return a source's library: from the cache, or compiled and then put there."""
    source = HERE / name
    stem = _stem(toolchain, source)
    folder = _cache_folder()
    if folder:
        for path in _builds(folder, stem):
            if (library := _open(path)) is not None:
                return library
    with tempfile.TemporaryDirectory(prefix="aff-", ignore_cleanup_errors=True) as scratch:
        built, output = Path(scratch) / "kernel.so", Path(scratch) / "output.txt"
        command = [*toolchain.command, *toolchain.flags, f"-I{HERE}", str(source), "-o", str(built)]
        failure = _run(command, output, COMPILE_SECONDS) or (None if built.exists() else "it makes no file")
        if failure:
            kept = _keep_output(output, f"{source.parent.name}-{source.stem}.log")
            raise CompilerError(f"{name} does not compile: {failure}; command: {shlex.join(command)}; output: {kept}")
        kept = folder and _keep(built, folder, stem)
        library = (kept and _open(kept)) or _open(built)
        if library is None:
            raise CompilerError(f"{name}: the library that {toolchain.version} built cannot be loaded from {scratch}")
        return library


def _open(path):
    """Load a library; returns None for one that cannot be loaded here (made on another system, a noexec folder)."""
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        return None


def _run(command, output, seconds):
    """Run a command, its output into a file; return None, or in a line how it failed."""
    try:
        with open(output, "wb") as file:
            code = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=seconds,
                cwd=output.parent,
                env=os.environ | {"LC_ALL": "C"},
                check=False,
            ).returncode
    except subprocess.TimeoutExpired:
        return f"not done after {seconds} s"
    except OSError as error:
        return error.strerror
    if code == 0:
        return None
    lines = [line.strip() for line in output.read_text(errors="replace").splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[0] if lines else f"exit status {code}")[:300]


# ---- what the doctor says --------------------------------------------------------------------------------------------


def describe():
    """Yield compiler, builds and threads of the compiled kernels, a line each."""
    with _lock:
        toolchain, reason = _search()
    if reason:
        yield f"compiler none that works: {reason}"
    else:
        load("probe.cpp").features.restype = ctypes.c_char_p
        features = load("probe.cpp").features().decode()
        fewer = "" if toolchain.flags[: len(FLAGS)] == FLAGS else f", which does not accept {FLAGS[len(PLAIN_FLAGS)]}"
        yield f"compiler {toolchain.version} ({shlex.join(toolchain.command)}), code for {features}{fewer}"
        yield f"kernels  {_kept(toolchain)}"
    runtime = _library_of(_parallel_runtime())
    yield f"OpenMP   {runtime or 'of PyTorch not found: compiled kernels run on one thread'}"


def _kept(toolchain):
    """Return a line that names the kernels in the cache, or why there are none."""
    try:
        folder = cache_folder()
    except (OSError, RuntimeError) as error:
        return f"compiled by every process ({_reason(error)}); set AFF_CACHE to a folder of your own"
    sources = sorted(HERE.glob("*/*.cpp"))
    built = sum(bool(_builds(folder, _stem(toolchain, source))) for source in sources)
    rest = "" if built == len(sources) else ", the others at first use"
    return f"{built} of {len(sources)} built{rest}; kept in {folder}"


def _library_of(address):
    """Return the path of the library that holds an address, or None."""
    if address is None:
        return None

    class Info(ctypes.Structure):  # Dl_info
        _fields_ = (
            ("file", ctypes.c_char_p),
            ("base", ctypes.c_void_p),
            ("symbol", ctypes.c_char_p),
            ("at", ctypes.c_void_p),
        )

    info = Info()
    found = ctypes.CDLL(None).dladdr(ctypes.c_void_p(address), ctypes.byref(info))
    return os.fsdecode(info.file) if found and info.file else "a library without a name"


# ---- the cache ------------------------------------------------------------------------------------------------------
# A file is called <folder>-<stem>-<key>-<digest of its bytes>.so: a truncated or foreign one is noticed by its name.
# It is written under another name and renamed when whole, so that processes need no locks: two that start at once both
# compile, and both are right.


def _stem(toolchain, source):
    """Return how the names of a source's builds begin: what it is called, and a digest of what a build depends on."""
    return f"{source.parent.name}-{source.stem}-{_key(toolchain, source)}"


def _key(toolchain, source):
    """Return the digest of what a build depends on: source, headers (all .h of fast/ops and beside the source),
    compiler, flags, processor."""
    digest = hashlib.sha256(repr((toolchain, platform.libc_ver(), processor())).encode())
    for path in (source, *sorted(HERE.rglob("*.h")), *sorted(source.parent.glob("*.h"))):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)} ".encode() + content)
    return digest.hexdigest()[:16]


@functools.cache
def processor():
    """Return the processor's model and features, which a build for ``native`` depends on, as a tuple of strings."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
        return (sys.platform, platform.machine(), *lines)
    told = ("vendor", "cpu family", "model", "flags", "Features", "CPU impl", "CPU part", "isa")
    return (sys.platform, platform.machine(), *sorted({line for line in lines if line.startswith(told)}))


def _cache_folder():
    """Return the cache folder, or None (and warn once) where it cannot be had or others could put code into it."""
    try:
        return cache_folder()
    except (OSError, RuntimeError) as error:
        _warn(_reason(error))
        return None


def _reason(error):
    return f"{error.filename}: {error.strerror}" if getattr(error, "filename", None) else str(error)


def cache_folder():
    """Return the folder of the builds, made if it is not there.

    Raises
    ------
    OSError, RuntimeError
        There is no home, it cannot be made, or somebody else may write to it.
    """
    named, shared = os.environ.get("AFF_CACHE"), os.environ.get("XDG_CACHE_HOME")
    folder = Path(named) if named else Path(shared or Path.home() / ".cache") / "autofocusformer"
    folder = folder.expanduser().resolve()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _distrust(folder, folder.stat(), owners={os.getuid()})
    for place in folder.parents:  # whoever may rename one of them could put another in its place
        if not place.stat().st_mode & stat.S_ISVTX:
            _distrust(place, place.stat(), owners={os.getuid(), 0}, others=stat.S_IWOTH)
    return folder


def _distrust(path, info, owners, others=stat.S_IWGRP | stat.S_IWOTH):
    """Raise PermissionError if others could have written what is there, as ssh does with keys."""
    if info.st_uid not in owners:
        raise PermissionError(f"{path} belongs to another user")
    if info.st_mode & others:
        raise PermissionError(f"others may write to {path}")


def _builds(folder, stem):
    """Return the whole and trustworthy builds of a stem in the cache."""
    return [path for path in sorted(folder.iterdir()) if path.name.startswith(f"{stem}-") and _intact(path, stem)]


def _intact(path, stem):
    """Return whether a file is a whole build that only we can have written; if so, mark it as used."""
    try:
        info = path.lstat()
        _distrust(path, info, owners={os.getuid()})
        if not stat.S_ISREG(info.st_mode) or path.name != _name(stem, path.read_bytes()):
            return False
    except OSError:  # not ours, or gone meanwhile
        return False
    with contextlib.suppress(OSError):  # a folder that cannot be written to
        os.utime(path)
    return True


def _name(stem, content):
    return f"{stem}-{hashlib.sha256(content).hexdigest()[:16]}.so"


def _keep(built, folder, stem):
    """Copy a build into the cache, and clean up there; returns its path, or None (and warns once) if that fails."""
    content, unfinished = built.read_bytes(), None
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix="aff-", suffix=".tmp", delete=False) as file:
            unfinished = Path(file.name)
            file.write(content)
        os.replace(unfinished, folder / _name(stem, content))
    except OSError as error:
        _warn(f"{folder}: {error.strerror}")
        return None
    finally:
        if unfinished:
            unfinished.unlink(missing_ok=True)
    _remove_unused(folder)
    return folder / _name(stem, content)


def _remove_unused(folder):
    """Remove what no process has used for a month: builds, and what a killed process left."""
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            old = time.time() - path.stat().st_mtime > UNUSED_DAYS * 86400
            if old and re.fullmatch(r".+-[0-9a-f]{16}-[0-9a-f]{16}\.so|aff-\w+\.tmp", path.name):
                path.unlink()


def _keep_output(output, name):
    """Keep a failed compiler's output: in the cache, else in a temporary file; returns where."""
    if not output.exists():
        return "none"
    try:
        return shutil.copyfile(output, cache_folder() / name)
    except (OSError, RuntimeError):
        with tempfile.NamedTemporaryFile(prefix="aff-", suffix=f"-{name}", delete=False) as file:
            file.write(output.read_bytes())
        return file.name


@functools.cache
def _warn(reason):
    """Warn, once for each reason."""
    warnings.warn(
        f"compiled kernels are not kept ({reason}), every process compiles them; set AFF_CACHE to a folder of your own",
        stacklevel=2,
    )
