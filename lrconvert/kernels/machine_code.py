"""The machine code of compiled loops, kept in a file: llvmlite alone links it, in a tenth of the time that importing
numba takes.

numba makes of a function one that takes places for its results and for what it raises, and its arguments: an array as

    memory, owner (both null here), items, bytes of one, address, its shape, its strides

That is no promise of numba's, so code is kept only of versions on which the tests have called it; others compile as
ever. It is kept only if LLVM says that its function has this type, and if nothing is left to link that only numba has:
loops that allocate nothing and raise nothing. A file holds for one version of numba, of LLVM and of the loops, and for
one processor; where there is none that fits, numba compiles.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

# A type of an argument: of numpy, behind it the dimensions of an array in C order ("f4 2"); or several, of a tuple.
Kind = str | tuple["Kind", ...]

TESTED = ("0.68.",)  # versions of numba whose functions are called in this way; with each new one run tests/kernels
_FOLDER = Path(__file__).parent
_DIGEST_BYTES = 32
_BYTE = ctypes.c_char
# What LLVM may call: of the C library, and what gives the memory of an array back, which has none here.
_RELEASE = "NRT_MemInfo_call_dtor"
_PASS = "add_global_dead_code_eliminate_pass"
_LINKED = {_RELEASE, "memset", "memcpy", "memmove"}


@dataclass(frozen=True)
class Signature:
    """The types of the arguments of a loop, and how many integers it returns."""

    kinds: tuple[Kind, ...]
    results: int = 0

    def numba_types(self, types: Any) -> tuple[Any, ...]:
        """Return the types of numba."""

        def of(kind: Kind) -> Any:
            if not isinstance(kind, str):
                return types.Tuple([of(part) for part in kind])
            name, _, dimensions = kind.partition(" ")
            number = getattr(types, "boolean" if name == "?" else np.dtype(name).name)
            return types.Array(number, int(dimensions), "C") if dimensions else number

        return tuple(of(kind) for kind in self.kinds)

    @property
    def llvm_type(self) -> str:
        """Return the type of the compiled function."""
        return f"i32 ({', '.join(['ptr', 'ptr', *(name for kind in self.kinds for name in _llvm(kind))])})"


def _llvm(kind: Kind) -> Iterator[str]:
    if not isinstance(kind, str):
        for part in kind:
            yield from _llvm(part)
        return
    name, _, dimensions = kind.partition(" ")
    if dimensions:
        yield from ("ptr", "ptr", "i64", "i64", "ptr", *["i64"] * (2 * int(dimensions)))
    else:
        yield {"i8": "i64", "f8": "double"}[name]


class Loop:
    """A loop that is called by its address. Arguments of other types than those of its signature are refused."""

    def __init__(self, address: int, signature: Signature, engine: Any) -> None:
        names = signature.llvm_type.removeprefix("i32 (").removesuffix(")").split(", ")
        types = {"ptr": ctypes.c_void_p, "i64": ctypes.c_int64, "double": ctypes.c_double}
        # It keeps the GIL: loops beside threads that hash took a fifth more processor time, and no less on the clock.
        self._function = ctypes.PYFUNCTYPE(ctypes.c_int32, *(types[name] for name in names))(address)
        self._expected = [_expected(kind) for kind in signature.kinds]
        self._count, self._results = signature.results, ctypes.c_int64 * max(1, signature.results)
        self._engine = engine  # it owns the code

    def __call__(self, *arguments: Any) -> Any:
        results, raised = self._results(), ctypes.c_void_p()
        flat: list[Any] = [ctypes.addressof(results), ctypes.addressof(raised)]
        for argument, expected in zip(arguments, self._expected, strict=True):
            _flatten(argument, expected, flat)
        if self._function(*flat):
            raise RuntimeError("a compiled loop has failed")
        return None if not self._count else results[0] if self._count == 1 else tuple(results)


def _expected(kind: Kind) -> Any:
    """The type of an argument: dtype and dimensions; None for a number; a list of these for a tuple."""
    if not isinstance(kind, str):
        return [_expected(part) for part in kind]
    name, _, dimensions = kind.partition(" ")
    return (np.dtype(name), int(dimensions)) if dimensions else None


def _flatten(value: Any, expected: Any, flat: list[Any]) -> None:
    """Add what the compiled function takes for an argument. It is called very often: every microsecond counts."""
    if expected is None:
        flat.append(value)
    elif isinstance(expected, list):
        for part, its_own in zip(value, expected, strict=True):
            _flatten(part, its_own, flat)
    else:
        if value.dtype != expected[0] or value.ndim != expected[1] or not value.flags.c_contiguous:
            raise TypeError(f"a compiled loop takes {expected}, not {value.dtype}, {value.ndim}")
        quick = value.flags.writeable and value.size
        address = ctypes.addressof(_BYTE.from_buffer(value)) if quick else value.__array_interface__["data"][0]
        flat += (None, None, value.size, value.itemsize, address, *value.shape, *value.strides)


# --- from the file ----------------------------------------------------------------------------------------------------


def load(name: str) -> SimpleNamespace | None:
    """Return the loops of the module ``lrconvert.kernels.<name>`` from their file; None without one that fits."""
    try:
        import llvmlite.binding as llvm
    except ImportError:
        return None
    for path in _paths(name, llvm):
        with suppress(OSError):
            data = path.read_bytes()
            header, _, code = data[_DIGEST_BYTES:].partition(b"\n")
            if hashlib.sha256(data[_DIGEST_BYTES:]).digest() == data[:_DIGEST_BYTES]:
                stated = json.loads(header)
                if stated["key"] == _key(name, llvm):
                    return _linked(stated["loops"], code, llvm)
    return None


def _linked(loops: Mapping[str, Any], code: bytes, llvm: Any) -> SimpleNamespace:
    """The loops of one object file."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    if not llvm.address_of_symbol(_RELEASE):  # numba adds its own; never called, as no array here has such memory
        llvm.add_symbol(_RELEASE, llvm.address_of_symbol("abort"))
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine(llvm))
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    space = SimpleNamespace()
    for function, (symbol, kinds, results) in loops.items():
        signature = Signature(_tuples(kinds), results)
        setattr(space, function, Loop(engine.get_function_address(symbol), signature, engine))
    return space


def _tuples(kinds: Any) -> Any:
    return kinds if isinstance(kinds, str) else tuple(map(_tuples, kinds))


def _machine(llvm: Any) -> Any:
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3, codemodel="jitdefault"
    )


def _paths(name: str, llvm: Any) -> Iterator[Path]:
    """The places of the file: where numba is told to keep its own, else beside the loops, else with the user."""
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    folders = [Path(chosen)] if chosen else [_FOLDER / "__pycache__"]
    if not chosen:
        with suppress(RuntimeError):  # a user without a home
            folders.append(Path.home() / ".cache" / "lrconvert")
    for folder in folders:
        yield folder / f"lrconvert.{name}.{llvm.get_host_cpu_name()}.o"


def _key(name: str, llvm: Any) -> str:
    """The digest of all that code depends on."""
    numba = find_spec("numba")
    assert numba is not None and numba.origin is not None
    texts = [_FOLDER / f"{name}.py", _FOLDER / "jit.py", Path(__file__), Path(numba.origin).with_name("_version.py")]
    parts = [path.read_bytes() for path in texts]
    parts += [str(llvm.llvm_version_info).encode(), llvm.get_host_cpu_features().flatten().encode()]
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


# --- to the file ------------------------------------------------------------------------------------------------------


def compiled(name: str, module: Any) -> SimpleNamespace | None:
    """Compile the loops of a module that have a `Signature`, keep their code, and return them; None if there are none,
    if their code needs numba, or if this numba is none of `TESTED`."""
    if not hasattr(module, "LOOPS"):
        return None
    import llvmlite.binding as llvm
    import numba

    if not numba.__version__.startswith(TESTED):
        return None
    whole, stated = llvm.parse_assembly(""), {}
    for function, signature in module.LOOPS.items():
        dispatcher, types = getattr(module, function), signature.numba_types(numba.types)
        dispatcher = numba.jit(**dispatcher.targetoptions)(dispatcher.py_func)  # one that takes nothing from the disk
        dispatcher.compile(types)
        result = dispatcher.overloads[types]
        symbol = result.fndesc.llvm_func_name
        alone = _alone(result.library._final_module.as_bitcode(), symbol, signature, llvm)
        if alone is None:
            return None
        whole.link_in(alone)
        stated[function] = symbol, signature.kinds, signature.results
    code = _machine(llvm).emit_object(whole)
    header = json.dumps({"key": _key(name, llvm), "loops": stated}).encode()
    text = header + b"\n" + code
    any(_is_kept(path, hashlib.sha256(text).digest() + text) for path in _paths(name, llvm))
    return _linked(stated, code, llvm)


def _alone(code: bytes, symbol: str, signature: Signature, llvm: Any) -> Any:
    """The module with one function and what it calls; None if that is not what a `Loop` may call."""
    if not hasattr(llvm, "ModulePassManager") or not hasattr(llvm.ModulePassManager, _PASS):
        return None  # llvmlite before 0.45
    module = llvm.parse_bitcode(code)
    for function in module.functions:
        if not function.is_declaration:
            function.linkage = "external" if function.name == symbol else "internal"
    for variable in module.global_variables:
        if not variable.is_declaration:
            variable.linkage = "internal"
    builder = llvm.create_pass_builder(_machine(llvm), llvm.create_pipeline_tuning_options(speed_level=0))
    passes = llvm.create_new_module_pass_manager()
    getattr(passes, _PASS)()
    passes.add_strip_dead_prototype_pass()
    passes.run(module, builder)
    own = module.get_function(symbol)
    called = {f.name for f in module.functions if f.is_declaration and not f.name.startswith("llvm.")}
    return module if str(own.global_value_type) == signature.llvm_type and called <= _LINKED else None


def _is_kept(path: Path, data: bytes) -> bool:
    """Write the file whole, as numba does with its own; return false where that does not work."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        os.makedirs(path.parent, exist_ok=True)  # noqa: PTH103 -- a cache, not an output: none of io/durable's
        with temporary.open("wb") as file:
            file.write(data)
        temporary.replace(path)
    except OSError:
        return False
    return True
