"""The kernels that move rows, as their launches compile them; used by test_triton_aot.py."""

NAMES = ("commit dense", "commit pages", "copy pages", "gather dense", "gather pages")
CACHES = ("k_cache", "v_cache", "out")
POINTERS = ("nodes", "context_lens", "page_table", "copies", "slots", "requests")


def compile_row(name, arch, compile_typed):
    """For K and V of 128 16-bit elements a head."""
    kind, layout = name.split()
    kernel, constants = {"commit": commit_launch, "copy": copy_launch, "gather": gather_launch}[kind]()
    if layout == "dense":
        constants["page_table"] = None

    def type_of(argument):
        return "*i16" if argument in CACHES else "*i32" if argument in POINTERS else "i32"

    def is_aligned(argument):
        return argument in CACHES or argument.startswith(("k_", "v_", "out_"))

    return compile_typed(kernel, constants, arch, 4, 3, type_of, is_aligned)


def commit_launch():
    from specdec_ops.triton_kernels.kv import kv_commit as module

    return module.kv_commit_kernel, {"BLOCK": module.BLOCK}


def copy_launch():
    from specdec_ops.triton_kernels.kv import kv_commit as module

    return module.kv_copy_pages_kernel, {"BLOCK": module.BLOCK}


def gather_launch():
    from specdec_ops.triton_kernels.kv import gather_layer_kv as module

    return module.gather_layer_kv_kernel, {"ROWS": module.ROWS, "BLOCK_K": 128, "BLOCK_V": 128}
