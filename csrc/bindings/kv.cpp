// kv_propagate of specdec_ops._C. The caller in specdec_ops/ops/kv/native.py has checked everything.
#include <pybind11/stl.h>

#include <tuple>
#include <vector>

#include "bindings/bind.h"
#include "kv/cpu/kernels.h"
#include "kv/params.h"

namespace specdec {

namespace {

using Strides = std::tuple<int64_t, int64_t, int64_t>;
using Layer = std::tuple<std::tuple<Address, int32_t>, std::tuple<Address, Address>, std::tuple<Address, Address>,
                         Strides, Strides>;

KvLayer kv_layer(const Layer& layer) {
  const auto& [norm, weights, caches, k_strides, v_strides] = layer;
  KvLayer l{};
  l.norm_weight = pointer<void>(std::get<0>(norm));
  l.norm_dtype = static_cast<DType>(std::get<1>(norm));
  l.k_weight = pointer<void>(std::get<0>(weights));
  l.v_weight = pointer<void>(std::get<1>(weights));
  l.k_cache = pointer<void>(std::get<0>(caches));
  l.v_cache = pointer<void>(std::get<1>(caches));
  std::tie(l.k_stride_batch, l.k_stride_slot, l.k_stride_head) = k_strides;
  std::tie(l.v_stride_batch, l.v_stride_slot, l.v_stride_head) = v_strides;
  return l;
}

// At most kMaxKvLayers layers.
KvPropagateParams kv_propagate_params(std::tuple<Address, int32_t, int64_t> hidden, std::vector<Layer> layers,
                                      float norm_eps, std::tuple<Address, Address, int32_t, bool> rotation,
                                      std::tuple<Address, Address, Address> places,
                                      std::tuple<int32_t, int32_t, int32_t, int32_t> sizes,
                                      std::tuple<int32_t, int64_t, int32_t, int64_t> cache_sizes) {
  KvPropagateParams p{};
  p.hidden = pointer<void>(std::get<0>(hidden));
  p.dtype = static_cast<DType>(std::get<1>(hidden));
  p.hidden_stride_row = std::get<2>(hidden);
  for (const Layer& layer : layers) p.layers[p.count++] = kv_layer(layer);
  p.norm_eps = norm_eps;
  p.cosines = pointer<float>(std::get<0>(rotation));
  p.sines = pointer<float>(std::get<1>(rotation));
  p.pairs = std::get<2>(rotation);
  p.interleaved = std::get<3>(rotation);
  p.requests = pointer<int32_t>(std::get<0>(places));
  p.slots = pointer<int32_t>(std::get<1>(places));
  p.page_table = pointer<int32_t>(std::get<2>(places));
  std::tie(p.rows, p.dim, p.kv_heads, p.head_dim) = sizes;
  std::tie(p.batch, p.slots_each, p.pages, p.page_size) = cache_sizes;
  return p;
}

}  // namespace

void bind_kv(pybind11::module_& m) {
  Bind<decltype(&kv_propagate_params)>::cpu(m, "kv_propagate_cpu", kv_propagate_params, kv_propagate_cpu);
#ifdef SPECDEC_WITH_CUDA
  Bind<decltype(&kv_propagate_params)>::cuda(m, "kv_propagate_cuda", kv_propagate_params, kv_propagate_cuda);
#endif
}

}  // namespace specdec
