"""Prints the assembly of the Triton kernels for one GPU generation: python triton_compile.py CAPABILITY bf16|fp32."""

from __future__ import annotations

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from act_serve.kernels import triton_impl


def assembly(kernel: Any, capability: int, element: str, constants: dict[str, Any], shape: triton_impl._Shape) -> str:
    """Compiled for arguments that are multiples of 16, as those of real layers."""
    kinds = dict.fromkeys(kernel.arg_names, "i32")
    kinds |= {"x_TI": f"*{element}", "y_TO": f"*{element}", "scratch": "*fp32", "address_AC": "*i64"}
    kinds |= dict.fromkeys(("blocks_1", "ability_B", "use_P", "ability_U", "slot_U"), "*i32") | {"weight_U": "*fp32"}
    kinds |= dict.fromkeys(constants, "constexpr")
    free = ("first_row", "stop_row", "address_stride", "uses_per_token", "ranges", *constants)
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name not in free}
    signature = {name: kinds[name] for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": triton_impl.WARPS, "num_stages": shape.stages}
    return str(triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"])


def main() -> None:
    capability, element = int(sys.argv[1]), sys.argv[2]
    for block in (16, 64, 128):
        shape = triton_impl._Shape.of(block, 2 if element == "bf16" else 4)
        shared = {
            "most_sliced": 264,
            "most_slices": 16,
            "block_uses": block,
            "block_rows": shape.rows,
            "overlap": capability >= 90,
        }
        products = {"group": 16, "block_features": shape.features, "even": True, "interpreted": False}
        # Both operands in every stage: 16 bytes per copy and thread.
        size = (block + shape.rows) * shape.features * (2 if element == "bf16" else 4)
        print("// products", size * shape.stages // (16 * 32 * triton_impl.WARPS))
        print(assembly(triton_impl._products, capability, element, shared | products, shape))
        print("// scatter")
        scatter = {"ranges_per_program": shape.ranges, "rows_at_once": shape.rows_at_once}
        print(assembly(triton_impl._scatter, capability, element, shared | scatter, shape))


if __name__ == "__main__":
    main()
