"""CUDA C++ to kernels: NVIDIA's run-time compiler and driver through ctypes, compiled code kept on disk.

torch brings the compiler (``libnvrtc``) and has loaded the driver. A kernel is compiled once per machine, when it is
first needed, and kept in ``cache_folder()`` under the digest of its sources, options and compiler.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import site
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from ...errors import GyroKVError

SOURCES = Path(__file__).with_name("csrc")
_OPTIONS = ("--std=c++17", "--device-as-default-execution-space", "--extra-device-vectorization")
_PROGRAMMATIC = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_NO_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


def cache_folder() -> Path:
    """Where compiled kernels are kept: ``$GYROKV_CACHE``, or ``gyrokv`` in the user's cache folder."""
    root = os.environ.get("GYROKV_CACHE")
    return Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "gyrokv"


# -- the compiler


@cache
def _compiler() -> ctypes.CDLL | None:
    for path in _compiler_paths():
        try:
            library = ctypes.CDLL(path)
        except OSError:
            continue
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        return library
    return None


def _compiler_paths() -> list[str]:
    major = (torch.version.cuda or "").split(".")[0]
    names = [f"libnvrtc.so.{major}"] if major else []
    folders = [Path(p) / "nvidia" for p in (*site.getsitepackages(), site.getusersitepackages(), *sys.path)]
    folders.append(Path(torch.__file__).parent / "lib")
    found = [str(p) for folder in folders for name in names for p in folder.glob(f"**/{name}")] if major else []
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    return [*dict.fromkeys(found), *names, "libnvrtc.so", f"{home}/lib64/libnvrtc.so"]


@cache
def compiler_version() -> tuple[int, int] | None:
    """Version of libnvrtc, None where there is none."""
    library = _compiler()
    if library is None:
        return None
    major, minor = ctypes.c_int(), ctypes.c_int()
    library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


@cache
def _files() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(SOURCES.glob("*.cu*"))}


_edited: dict[str, bytes] | None = None


def _sources() -> dict[str, bytes]:
    return _files() if _edited is None else _edited


@contextmanager
def sources(edits: Iterable[tuple[str, str, str]]) -> Iterator[None]:
    """Kernels are compiled from edited sources inside: ``edits`` are (file, a piece that is there once, its replacement).

    For tests that plant faults. What is compiled meanwhile is kept nowhere. Not for several threads.
    """
    global _edited
    changed, before = dict(_sources()), _edited
    for name, old, new in edits:
        count = changed[name].count(old.encode())
        if count != 1:
            raise ValueError(f"{name} holds {old!r} {count} times, not once")
        changed[name] = changed[name].replace(old.encode(), new.encode())
    _edited = changed
    kernel.cache_clear()
    try:
        yield
    finally:
        _edited = before
        kernel.cache_clear()


def compile_source(name: str, defines: Mapping[str, int | str], arch: str) -> tuple[bytes, str]:
    """(cubin, the assembler's notes) of ``csrc/<name>`` for ``arch`` (such as ``sm_90a``), without the disk.

    Raises GyroKVError with the compiler's words if it cannot be compiled.
    """
    library, sources = _compiler(), _sources()
    if library is None:
        raise GyroKVError("no CUDA compiler: libnvrtc was not found")
    headers = {key: text for key, text in sources.items() if key.endswith(".cuh")}
    program = ctypes.c_void_p()
    names = (ctypes.c_char_p * len(headers))(*(key.encode() for key in headers))
    texts = (ctypes.c_char_p * len(headers))(*headers.values())
    _check(library.nvrtcCreateProgram(
        ctypes.byref(program), sources[name], name.encode(), len(headers), texts, names
    ))  # fmt: skip
    try:
        options = [*_OPTIONS, f"--gpu-architecture={arch}", "--ptxas-options=-v", *_flags(defines)]
        array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = library.nvrtcCompileProgram(program, len(options), array)
        notes = _text(library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog, program).decode(errors="replace")
        if status:
            raise GyroKVError(f"{name} does not compile for {arch} with {' '.join(_flags(defines))}:\n{notes}")
        return _text(library.nvrtcGetCUBINSize, library.nvrtcGetCUBIN, program), notes
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _flags(defines: Mapping[str, int | str]) -> list[str]:
    return [f"-D{key}={value}" for key, value in defines.items()]


def _text(size_of, read, program) -> bytes:
    size = ctypes.c_size_t()
    _check(size_of(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(read(program, buffer))
    return buffer.raw


def _check(status: int) -> None:
    if status:
        raise GyroKVError(f"libnvrtc: {_compiler().nvrtcGetErrorString(status).decode()}")


def cubin(name: str, defines: Mapping[str, int | str], arch: str) -> bytes:
    """:func:`compile_source`, kept on disk with a digest: what is damaged there is compiled again. Processes may
    compile the same kernel side by side: the last one wins."""
    if _edited is not None:
        return compile_source(name, defines, arch)[0]
    digest = hashlib.sha256(repr((name, sorted(defines.items()), arch, _OPTIONS, compiler_version())).encode())
    for key, text in _sources().items():
        digest.update(key.encode() + text)
    path = cache_folder() / "kernels" / f"{name.split('.')[0]}-{digest.hexdigest()[:32]}.cubin"
    try:
        kept = path.read_bytes()
        if hashlib.sha256(kept[:-32]).digest() == kept[-32:]:
            return kept[:-32]
    except OSError:
        pass
    code, _ = compile_source(name, defines, arch)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(code + hashlib.sha256(code).digest())
        os.replace(file.name, path)
    except OSError:
        pass  # a folder that cannot be written costs the next process its time, nothing else
    return code


# -- the driver


@cache
def _driver() -> ctypes.CDLL:
    library = ctypes.CDLL("libcuda.so.1")
    library.cuGetErrorName.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)]
    return library


def check_driver(status: int, what: str) -> None:
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorName(status, ctypes.byref(text))
        raise GyroKVError(f"{what}: {(text.value or b'unknown error').decode()}")


def in_context(call: Callable[[], int]) -> int:
    """The driver's status of ``call``, made again if this thread has not used the GPU before."""
    status = call()
    if status != _NO_CONTEXT:
        return status
    context = ctypes.c_void_p()
    check_driver(_driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), torch.cuda.current_device()), "context")
    check_driver(_driver().cuCtxSetCurrent(context), "context")
    return call()


@cache
def architecture(device: int) -> str:
    """What kernels are compiled for on CUDA device ``device``: with its own features where it has such."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


class _LaunchAttribute(ctypes.Structure):  # CUlaunchAttribute
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60)]


class _LaunchConfig(ctypes.Structure):  # CUlaunchConfig
    _fields_ = [
        *((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared")),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(_LaunchAttribute)), ("count", ctypes.c_uint),
    ]  # fmt: skip


class Kernel:
    """One compiled kernel on one device. ``shared``: bytes of dynamic shared memory per block."""

    def __init__(self, name: str, defines: Mapping[str, int | str], device: int, shared: int = 0) -> None:
        driver = _driver()
        torch.cuda.init()
        code = cubin(f"{name}.cu", defines, architecture(device))
        self._library, kernel, function = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()  # makes the context exist
            load = driver.cuLibraryLoadData
            check_driver(load(ctypes.byref(self._library), code, None, None, 0, None, None, 0), f"{name}: loading")
            check_driver(driver.cuLibraryGetKernel(ctypes.byref(kernel), self._library, name.encode()), name)
            check_driver(driver.cuKernelGetFunction(ctypes.byref(function), kernel), name)
            if shared:  # more than 48 KiB, with what the kernel declares itself, must be asked for
                status = driver.cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED, shared)
                check_driver(status, f"{name}: {shared} bytes of shared memory")
        overlaps = torch.cuda.get_device_capability(device) >= (9, 0)
        self._attributes = (_LaunchAttribute * overlaps)(*[_LaunchAttribute(_PROGRAMMATIC, b"", 1)] * overlaps)
        self._function, self._launch, self._name, self._shared = function, driver.cuLaunchKernelEx, name, shared

    def launch(
        self, grid: tuple[int, int, int], threads: int, stream: int, *arguments: ctypes.Structure | ctypes.Array
    ) -> None:
        """Start on ``stream`` (a CUstream), each argument by value. A kernel waits itself for the kernels before it:
        where the GPU can, its launch overlaps with their end."""
        places = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        config = _LaunchConfig(*grid, threads, 1, 1, self._shared, stream, self._attributes, len(self._attributes))
        status = in_context(lambda: self._launch(ctypes.byref(config), self._function, places, None))
        if status:
            check_driver(status, f"{self._name}: launching {grid} x {threads}")


@cache
def kernel(name: str, defines: tuple[tuple[str, int | str], ...], device: int, shared: int = 0) -> Kernel:
    """The kernel ``csrc/<name>.cu`` compiled with ``defines`` on ``device``: made once."""
    return Kernel(name, dict(defines), device, shared)
