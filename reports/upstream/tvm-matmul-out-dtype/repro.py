"""TVM's importer of exported programs gives every matrix product out_dtype float32.

Needs torch and apache-tvm. Exits 1 if a float16 Linear does not return float16, or a float16
Linear before a LayerNorm does not import.
"""

import sys

import torch
import tvm
from tvm.relax.frontend.torch import from_exported_program


def imported(module, example):
    with torch.no_grad():
        return from_exported_program(torch.export.export(module, (example,)))


def main() -> int:
    print("apache-tvm", tvm.__version__, "torch", torch.__version__)
    wrong = 0
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.float32):
        linear = torch.nn.Linear(8, 8, bias=False).to(dtype).eval()
        x = torch.zeros(2, 3, 8, dtype=dtype)
        found = str(imported(linear, x)["main"].ret_ty)
        expected = str(linear(x).dtype).removeprefix("torch.")
        right = expected in found
        wrong += not right
        print(f"Linear in {expected}: returns {found}: {'right' if right else 'WRONG'}")
    both = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False), torch.nn.LayerNorm(8))
    try:
        imported(both.half().eval(), torch.zeros(2, 3, 8, dtype=torch.float16))
    except Exception as error:
        wrong += 1
        text = " ".join(str(error).split())
        print(f"Linear -> LayerNorm in float16: WRONG, does not import: {text[-200:]}")
    else:
        print("Linear -> LayerNorm in float16: imports")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
