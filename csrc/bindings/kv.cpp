// kv_propagate of specdec_ops._C.
#include "struct_fields/kv.h"
#include "bindings/bind.h"
#include "kv/cpu/entry_points.h"
#include "kv/params.h"
#ifdef SPECDEC_WITH_CUDA
#include "kv/cuda/launchers.h"
#endif

namespace specdec {

static KvLayer layer_of(Tensor norm_weight, Tensor k_weight, Tensor v_weight, Tensor k_cache, Tensor v_cache) {
  KvLayer l{};
  l.norm_weight = norm_weight.address();
  l.norm_dtype = norm_weight.dtype();
  l.k_weight = k_weight.address();
  l.v_weight = v_weight.address();
  l.k_cache = k_cache.address();
  l.v_cache = v_cache.address();
  l.k_stride_batch = k_cache.stride(0), l.k_stride_slot = k_cache.stride(1), l.k_stride_head = k_cache.stride(2);
  l.v_stride_batch = v_cache.stride(0), l.v_stride_slot = v_cache.stride(1), l.v_stride_head = v_cache.stride(2);
  return l;
}

static void derive(KvPropagateParams& p, Call& call) {
  Tensor hidden = call.tensor("hidden"), cosines = call.tensor("cosines"), page_table = call.tensor("page_table");
  const List norms = call.list("norm_weights"), k_weights = call.list("k_weights"), v_weights = call.list("v_weights");
  const List k_caches = call.list("k_caches"), v_caches = call.list("v_caches");
  p.count = k_caches.size();
  if (p.count < 1 || p.count > kMaxKvLayers) throw py::value_error("a call of kv_propagate has 1 to 32 layers");
  for (int i = 0; i < kMaxKvLayers; ++i) {
    p.layers[i] = KvLayer{};
    if (i >= p.count) continue;
    p.layers[i] = layer_of(Tensor(norms.size() > 0 ? norms[i] : Py_None), Tensor(k_weights[i]), Tensor(v_weights[i]),
                           Tensor(k_caches[i]), Tensor(v_caches[i]));
  }
  Tensor cache(k_caches[0]);
  const bool paged = bool(page_table);
  p.hidden_stride_row = hidden.stride(0);
  p.dtype = hidden.dtype();
  p.rows = int32_t(hidden.size(0)), p.dim = int32_t(hidden.size(1));
  p.kv_heads = int32_t(cache.size(2)), p.head_dim = int32_t(cache.size(3));
  p.pairs = cosines ? int32_t(cosines.size(1)) : 0;
  p.batch = int32_t(paged ? page_table.size(0) : cache.size(0));
  p.slots_each = paged ? page_table.size(1) * cache.size(1) : cache.size(1);
  p.pages = paged ? int32_t(cache.size(0)) : 0;
  p.page_size = paged ? cache.size(1) : 0;
}

void bind_kv(py::module_& m) {
  bind_op(m, "kv_propagate", kv_propagate_cpu);
#ifdef SPECDEC_WITH_CUDA
  bind_cuda<KvPropagateParams, KvPropagateParams>(m, "kv_propagate", nullptr, kv_propagate_cuda);
#endif
}

}  // namespace specdec
