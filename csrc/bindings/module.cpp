// The Python module specdec_ops._C: addresses, sizes, strides and a stream in, nothing out.
//
// The callers in specdec_ops/_core/native.py have checked every argument. Addresses arrive as integers, so the module knows
// no framework and is compiled without one. CPU calls release the interpreter lock.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "attention/cpu/kernels.h"
#include "attention/params.h"
#include "bindings/bind.h"
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
using namespace specdec;

namespace {

using Strides3 = std::tuple<int64_t, int64_t, int64_t>;

BuildTopologyParams build_topology_params(Address parents, Address num_nodes, Address parents_out, Address depths,
                                          Address ancestors, Address first_child, Address next_sibling,
                                          Address num_nodes_out, Address status, int32_t batch, int32_t nodes,
                                          int32_t words) {
  BuildTopologyParams p{};
  p.parents = pointer<int32_t>(parents);
  p.num_nodes = pointer<int32_t>(num_nodes);
  p.parents_out = pointer<int32_t>(parents_out);
  p.depths = pointer<int32_t>(depths);
  p.ancestors = pointer<uint64_t>(ancestors);
  p.first_child = pointer<int32_t>(first_child);
  p.next_sibling = pointer<int32_t>(next_sibling);
  p.num_nodes_out = pointer<int32_t>(num_nodes_out);
  p.status = pointer<int32_t>(status);
  p.batch = batch;
  p.nodes = nodes;
  p.words = words;
  return p;
}

MergeStatesParams merge_states_params(Address out_a, Address lse_a, Address out_b, Address lse_b, Address out,
                                      Address lse, int64_t rows, int32_t dim, int32_t dtype) {
  MergeStatesParams p{};
  p.out_a = pointer<void>(out_a);
  p.lse_a = pointer<float>(lse_a);
  p.out_b = pointer<void>(out_b);
  p.lse_b = pointer<float>(lse_b);
  p.out = pointer<void>(out);
  p.lse = pointer<float>(lse);
  p.rows = rows;
  p.dim = dim;
  p.dtype = static_cast<DType>(dtype);
  return p;
}

// The order of these arguments is the order of specdec_ops/_core/native.py's one call.
TreeAttentionParams tree_attention_params(
    Address q, Strides3 q_strides, Address k_cache, Strides3 k_strides, Address v_cache, Strides3 v_strides,
    Address out, Strides3 out_strides, Address lse, Address ancestors, Address depths, Address num_nodes,
    Address offsets, Address context_lens, Address page_table, int64_t page_table_stride, Address query_starts,
    Address sinks, Address alibi_slopes, std::tuple<int32_t, int32_t> dtypes,
    std::tuple<int32_t, int32_t, int32_t, int32_t, int32_t> sizes, std::tuple<int32_t, int32_t, int32_t> cache_sizes,
    std::tuple<int32_t, int32_t, int32_t> topology_sizes, int32_t query_start, float scale, int32_t window,
    float softcap, float out_scale, int32_t num_splits, Address scratch, Address counters) {
  TreeAttentionParams p{};
  p.q = pointer<void>(q);
  p.k_cache = pointer<void>(k_cache);
  p.v_cache = pointer<void>(v_cache);
  p.out = pointer<void>(out);
  p.lse = pointer<float>(lse);
  p.ancestors = pointer<uint64_t>(ancestors);
  p.depths = pointer<int32_t>(depths);
  p.num_nodes = pointer<int32_t>(num_nodes);
  p.offsets = pointer<int32_t>(offsets);
  p.context_lens = pointer<int32_t>(context_lens);
  p.page_table = pointer<int32_t>(page_table);
  p.page_table_stride = page_table_stride;
  p.query_starts = pointer<int32_t>(query_starts);
  p.sinks = pointer<float>(sinks);
  p.alibi_slopes = pointer<float>(alibi_slopes);
  std::tie(p.q_stride_batch, p.q_stride_row, p.q_stride_head) = q_strides;
  std::tie(p.k_stride_batch, p.k_stride_slot, p.k_stride_head) = k_strides;
  std::tie(p.v_stride_batch, p.v_stride_slot, p.v_stride_head) = v_strides;
  std::tie(p.out_stride_batch, p.out_stride_row, p.out_stride_head) = out_strides;
  std::tie(p.batch, p.queries, p.heads, p.kv_heads, p.dim) = sizes;
  std::tie(p.slots, p.pages, p.page_size) = cache_sizes;
  std::tie(p.nodes, p.words, p.topology_batch) = topology_sizes;
  p.dtype = static_cast<DType>(std::get<0>(dtypes));
  p.float8_cache = std::get<1>(dtypes);
  p.query_start = query_start;
  p.scale = scale;
  p.window = window;
  p.softcap = softcap;
  p.out_scale = out_scale;
  p.num_splits = num_splits;
  p.scratch = pointer<float>(scratch);
  p.counters = pointer<int32_t>(counters);
  return p;
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
  m.def("cpu_isa", &cpu::cpu_isa, "The instruction set that CPU kernels run with here.");
  m.def("set_cpu_isa", &cpu::set_cpu_isa, "Limits the instruction set; an empty name removes the limit.");
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

  Bind<decltype(&build_topology_params)>::cpu(m, "build_topology_cpu", build_topology_params, build_topology_cpu);
  Bind<decltype(&merge_states_params)>::cpu(m, "merge_states_cpu", merge_states_params, merge_states_cpu);
  Bind<decltype(&tree_attention_params)>::cpu(m, "tree_attention_cpu", tree_attention_params, tree_attention_cpu);
  bind_accept(m);
  bind_exit(m);
  bind_kv(m);
#ifdef SPECDEC_WITH_CUDA
  m.def("cuda_device_error", &cuda_device_error, "Why this device can't run the compiled kernels, or an empty string.");
  Bind<decltype(&build_topology_params)>::cuda(m, "build_topology_cuda", build_topology_params, build_topology_cuda);
  Bind<decltype(&merge_states_params)>::cuda(m, "merge_states_cuda", merge_states_params, merge_states_cuda);
  Bind<decltype(&tree_attention_params)>::cuda(m, "tree_attention_cuda", tree_attention_params, tree_attention_cuda);
  m.def(
      "tree_attention_scratch",
      [](int32_t batch, int32_t max_queries, int32_t heads, int32_t kv_heads, int32_t dim, int32_t slots,
         int32_t num_splits, int32_t float8_cache) {
        TreeAttentionParams p{};
        p.batch = batch;
        p.queries = max_queries;
        p.heads = heads;
        p.kv_heads = kv_heads;
        p.dim = dim;
        p.slots = slots;
        p.num_splits = num_splits;
        p.float8_cache = float8_cache;
        const TreeAttentionScratch scratch = tree_attention_scratch(p);
        return std::pair(scratch.floats, scratch.counters);
      },
      "How many float32 numbers of scratch, and how many zeroed int32 counters, such a call of tree_attention_cuda "
      "needs.");
#endif
}
