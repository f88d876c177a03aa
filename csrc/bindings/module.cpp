// The Python module specdec_ops._C: the arguments and outputs of a call in, nothing out.
//
// The public ops have checked every argument. See bindings/bind.h for what the functions of an op take. CPU calls
// release the interpreter lock.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "attention/cpu/kernels.h"
#include "attention/params.h"
#include "bindings/bind.h"
#include "bindings/families.h"
#include "common/cpu/benchmark_probes.h"
#include "common/cpu/build_info.h"
#include "common/cpu/isa.h"
#include "topology/cpu/kernels.h"
#include "topology/params.h"
#ifdef SPECDEC_WITH_CUDA
#include "attention/cuda/launchers.h"
#include "topology/cuda/launchers.h"
#endif

namespace py = pybind11;
namespace specdec {

static void derive(BuildTopologyParams& p, Call& call) {
  Tensor ancestors = call.tensor("ancestors");
  p.batch = int32_t(ancestors.size(0));
  p.nodes = int32_t(ancestors.size(1));
  p.words = int32_t(ancestors.size(2));
}

static void derive(MergeStatesParams& p, Call& call) {
  Tensor out = call.tensor("out");
  p.rows = call.tensor("lse").elements();
  p.dim = int32_t(out.size(-1));
  p.dtype = out.dtype();
}

static constexpr int64_t kMaxSlots = 1 << 30;  // of a request: kernels count slots in 32 bits, and nobody reaches more
static constexpr int64_t kMaxInt32 = 0x7fffffff;

static void derive(TreeAttentionParams& p, Call& call) {
  Tensor q = call.tensor("q"), out = call.tensor("out"), k = call.tensor("k_cache"), v = call.tensor("v_cache");
  Tensor context_lens = call.tensor("context_lens"), page_table = call.tensor("page_table");
  Tensor ancestors = call.tensor("ancestors");
  const bool packed = bool(call.tensor("offsets")), paged = bool(page_table), tree = bool(ancestors);
  p.q_stride_batch = packed ? 0 : q.stride(0);
  p.q_stride_row = q.stride(-3), p.q_stride_head = q.stride(-2);
  p.out_stride_batch = packed ? 0 : out.stride(0);
  p.out_stride_row = out.stride(-3), p.out_stride_head = out.stride(-2);
  p.k_stride_batch = k.stride(0), p.k_stride_slot = k.stride(1), p.k_stride_head = k.stride(2);
  p.v_stride_batch = v.stride(0), p.v_stride_slot = v.stride(1), p.v_stride_head = v.stride(2);
  p.page_table_stride = paged ? page_table.stride(0) : 0;
  p.dtype = q.dtype();
  p.float8_cache = k.element() == Element::kFloat8;
  p.batch = int32_t(context_lens.size(0));
  p.queries = int32_t(q.size(-3)), p.heads = int32_t(q.size(-2)), p.dim = int32_t(q.size(-1));
  p.kv_heads = int32_t(k.size(2));
  p.slots = int32_t(std::min(paged ? page_table.size(1) * k.size(1) : k.size(1), kMaxSlots));
  p.pages = paged ? int32_t(std::min(k.size(0), kMaxInt32)) : 0;
  p.page_size = paged ? int32_t(std::min(k.size(1), kMaxInt32)) : 0;
  p.topology_batch = tree ? int32_t(ancestors.size(0)) : 1;
  p.nodes = tree ? int32_t(ancestors.size(1)) : 0;
  p.words = tree ? int32_t(ancestors.size(2)) : 0;
}

}  // namespace specdec

using namespace specdec;

namespace {

using Address = uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of specdec_ops. Call them through the public ops.";
  m.def("build_info", [] {
    py::dict info;
    const BuildInfo built = build_info();
    info["version"] = built.version;
    info["compiler"] = built.compiler;
    info["cuda"] = built.cuda;
    info["archs"] = built.archs;
    info["left_out"] = built.left_out;
    return info;
  });
  m.def(
      "cpu_isa", [] { return cpu::isa_name(cpu::current_isa()); },
      "The instruction set that CPU kernels run with here.");
  m.def("set_cpu_isa", &cpu::limit_isa, "Limits the instruction set; an empty name removes the limit.");
  m.def(
      "read_bytes",
      [](Address address, size_t bytes, int threads, int streams, int ahead, bool nearest) {
        if (threads < 1 || streams < 1 || streams > kMaxReadStreams || ahead < 0)
          throw std::invalid_argument("read_bytes needs a thread, 1 to 16 streams and no negative distance");
        py::gil_scoped_release unlocked;
        return read_bytes(pointer<void>(address), bytes, {threads, streams, ahead, nearest});
      },
      "Reads a buffer once: the plain read that memory-bound kernels are judged against.", py::arg("address"),
      py::arg("bytes"), py::arg("threads"), py::arg("streams") = 1, py::arg("ahead") = 0, py::arg("nearest") = false);
  m.def(
      "multiply_adds",
      [](const std::string& isa, int64_t rounds, int threads) {
        py::gil_scoped_release unlocked;
        return multiply_adds(isa, rounds, std::max(threads, 1));
      },
      "Multiply-adds in registers; how many floating-point operations that was, 0 without that instruction set.");
  m.def(
      "evict_from_cache", [](Address address, size_t bytes) { return evict_from_cache(pointer<void>(address), bytes); },
      "Flushes a buffer from every cache; False where the processor can't.");

  m.def(
      "exp2_cpu",
      [](Address x, Address y, int64_t count, bool weights) {
        exp2_cpu(pointer<float>(x), pointer<float>(y), count, weights);
      },
      "The attention kernels' exponential, for the tests.");

  bind_op(m, "build_topology", build_topology_cpu);
  bind_op(m, "merge_states", merge_states_cpu);
  bind_op(m, "tree_attention", tree_attention_cpu);
  bind_accept(m);
  bind_exit(m);
  bind_kv(m);
#ifdef SPECDEC_WITH_CUDA
  m.def("cuda_device_error", &cuda_device_error, "Why this device can't run the compiled kernels, or an empty string.");
  bind_cuda<BuildTopologyParams, BuildTopologyParams>(m, "build_topology", nullptr, build_topology_cuda);
  bind_cuda<MergeStatesParams, MergeStatesParams>(m, "merge_states", nullptr, merge_states_cuda);
  bind_cuda<TreeAttentionParams, TreeAttentionParams>(m, "tree_attention", tree_attention_scratch, tree_attention_cuda);
#endif
}
