"""The GELU of llama.cpp's MPT graph is the tanh approximation, from a float16 table.

Needs a built llama.cpp: the folder of its libraries as the argument, or an installed
llama-cpp-python. Runs ggml_gelu, which `LLM_FFN_GELU` is, and ggml_gelu_erf beside it.
Prints both next to the exact value, and exits 1 if ggml_gelu is not nn.GELU().
"""

import ctypes as c
import importlib.util
import math
import sys
from pathlib import Path

POINTS = (-3.0, -2.5, -2.0, -1.0, -0.5, 0.5, 1.0, 2.0, 2.5)


def folder() -> Path:
    if len(sys.argv) > 1:
        return Path(sys.argv[1])
    found = importlib.util.find_spec("llama_cpp")
    if found is None or found.origin is None:
        sys.exit("give the folder of libggml*.so, or install llama-cpp-python")
    return Path(found.origin).parent / "lib"


class Params(c.Structure):
    _fields_ = (("size", c.c_size_t), ("buffer", c.c_void_p), ("no_alloc", c.c_bool))


def functions(where: Path) -> dict:
    files = [f for f in sorted(where.glob("libggml*.so")) if "libggml-cpu-" not in f.name]
    libraries = [c.CDLL(str(f), mode=c.RTLD_GLOBAL) for f in files]
    p, s = c.c_void_p, c.c_size_t
    kinds = {
        "ggml_backend_load_all_from_path": (None, [c.c_char_p]),
        "ggml_backend_init_best": (p, []),
        "ggml_init": (p, [Params]),
        "ggml_new_tensor_1d": (p, [p, c.c_int, c.c_int64]),
        "ggml_gelu": (p, [p, p]),
        "ggml_gelu_erf": (p, [p, p]),
        "ggml_new_graph": (p, [p]),
        "ggml_build_forward_expand": (None, [p, p]),
        "ggml_backend_alloc_ctx_tensors": (p, [p, p]),
        "ggml_backend_tensor_set": (None, [p, p, s, s]),
        "ggml_backend_tensor_get": (None, [p, p, s, s]),
        "ggml_backend_graph_compute": (c.c_int, [p, p]),
    }
    found = {}
    for name, (result, arguments) in kinds.items():
        function = next(getattr(lib, name) for lib in libraries if hasattr(lib, name))
        function.restype, function.argtypes = result, arguments
        found[name] = function
    return found


def main() -> int:
    where = folder()
    g = functions(where)
    g["ggml_backend_load_all_from_path"](str(where).encode())
    backend = g["ggml_backend_init_best"]()
    context = g["ggml_init"](Params(1 << 20, None, True))
    count = len(POINTS)
    x = g["ggml_new_tensor_1d"](context, 0, count)
    made = {name: g[name](context, x) for name in ("ggml_gelu", "ggml_gelu_erf")}
    graph = g["ggml_new_graph"](context)
    for tensor in made.values():
        g["ggml_build_forward_expand"](graph, tensor)
    g["ggml_backend_alloc_ctx_tensors"](context, backend)
    g["ggml_backend_tensor_set"](x, (c.c_float * count)(*POINTS), 0, 4 * count)
    assert g["ggml_backend_graph_compute"](backend, graph) == 0
    values = {}
    for name, tensor in made.items():
        held = (c.c_float * count)()
        g["ggml_backend_tensor_get"](tensor, held, 0, 4 * count)
        values[name] = list(held)
    print(where)
    print(f"{'x':>6} {'ggml_gelu':>12} {'ggml_gelu_erf':>14} {'nn.GELU()':>12} {'tanh form':>12}")
    off = 0.0
    for i, at in enumerate(POINTS):
        exact = 0.5 * at * (1 + math.erf(at / math.sqrt(2)))
        tanh = 0.5 * at * (1 + math.tanh(math.sqrt(2 / math.pi) * (at + 0.044715 * at**3)))
        mine, erf = values["ggml_gelu"][i], values["ggml_gelu_erf"][i]
        print(f"{at:6.2f} {mine:12.7f} {erf:14.7f} {exact:12.7f} {tanh:12.7f}")
        off = max(off, abs(mine - exact) / abs(exact))
    print(f"ggml_gelu is off by up to {off:.1e} of the value; float32 would be 6e-8")
    return 1 if off > 2.0**-20 else 0


if __name__ == "__main__":
    sys.exit(main())
