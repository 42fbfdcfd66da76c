"""Prints the assembly of the Triton kernels for one GPU generation: python triton_compile.py CAPABILITY bf16|fp32."""

from __future__ import annotations

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from act_serve.kernels import triton_impl


def assembly(kernel: Any, capability: int, element: str, constants: dict[str, Any]) -> str:
    """Compiled for arguments that are multiples of 16, as those of real layers."""
    kinds = dict.fromkeys(kernel.arg_names, "i32")
    kinds |= {"x_TI": f"*{element}", "y_TO": f"*{element}", "scratch_SUN": "*fp32", "address_AC": "*i64"}
    kinds |= dict.fromkeys(("blocks_1", "ability_B", "use_P", "ability_U"), "*i32") | {"weight_U": "*fp32"}
    kinds |= dict.fromkeys(constants, "constexpr")
    free = ("first_block", "blocks", "address_stride", "uses_per_token", *constants)
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name not in free}
    signature = {name: kinds[name] for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": 4, "num_stages": 3}
    return str(triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"])


def main() -> None:
    capability, element = int(sys.argv[1]), sys.argv[2]
    size = 2 if element == "bf16" else 4
    sizes = [(False, 16, 16, 256 // size), (True, 64, 64, 128 // size)]
    for direct, uses, rows, features in sizes:
        constants = {"direct": direct, "block_uses": uses, "block_rows": rows, "block_features": features}
        print(assembly(triton_impl._products, capability, element, {**constants, "interpreted": False}))
    constants = {"splits": 4, "block_columns": 1024}
    print(assembly(triton_impl._scatter, capability, element, constants))


if __name__ == "__main__":
    main()
