// The KV ops of specdec_ops._C.
#include "struct_fields/kv.h"
#include "bindings/bind.h"
#include "kv/cpu/entry_points.h"
#include "kv/params.h"
#ifdef SPECDEC_WITH_CUDA
#include "kv/cuda/launchers.h"
#endif

namespace specdec {

static CacheCode cache_code(Tensor cache) {
  switch (cache.element()) {
    case Element::kFloat8:
      return CacheCode::kFloat8E4m3;
    case Element::kFloat8E5m2:
      return CacheCode::kFloat8E5m2;
    case Element::kInt8:
      return CacheCode::kInt8;
    default:
      return CacheCode::kPlain;
  }
}

static void derive(KvAppendParams& p, Call& call) {
  Tensor k = call.tensor("k"), v = call.tensor("v"), q = call.tensor("q"), out = call.tensor("q_out");
  Tensor k_cache = call.tensor("k_cache"), v_cache = call.tensor("v_cache"), page_table = call.tensor("page_table");
  Tensor depths = call.tensor("depths"), offsets = call.tensor("offsets"), cosines = call.tensor("cosines");
  const bool packed = k.dims() == 3, paged = bool(page_table);
  p.packed = packed;
  p.k_stride_batch = packed ? 0 : k.stride(0), p.k_stride_row = k.stride(-3), p.k_stride_head = k.stride(-2);
  p.v_stride_batch = packed ? 0 : v.stride(0), p.v_stride_row = v.stride(-3), p.v_stride_head = v.stride(-2);
  p.q_stride_batch = q && !packed ? q.stride(0) : 0;
  p.q_stride_row = q ? q.stride(-3) : 0, p.q_stride_head = q ? q.stride(-2) : 0;
  p.out_stride_batch = out && !packed ? out.stride(0) : 0;
  p.out_stride_row = out ? out.stride(-3) : 0, p.out_stride_head = out ? out.stride(-2) : 0;
  p.k_cache_stride_batch = k_cache.stride(0), p.k_cache_stride_slot = k_cache.stride(1);
  p.k_cache_stride_head = k_cache.stride(2);
  p.v_cache_stride_batch = v_cache.stride(0), p.v_cache_stride_slot = v_cache.stride(1);
  p.v_cache_stride_head = v_cache.stride(2);
  p.rows = packed ? k.size(0) : k.size(0) * k.size(1);
  p.queries = int32_t(k.size(-3));
  p.heads = q ? int32_t(q.size(-2)) : 0, p.kv_heads = int32_t(k.size(-2));
  p.k_dim = int32_t(k.size(-1)), p.v_dim = int32_t(v.size(-1));
  p.batch = int32_t(offsets ? offsets.size(0) - 1 : paged ? page_table.size(0) : k_cache.size(0));
  p.slots_each = paged ? page_table.size(1) * k_cache.size(1) : k_cache.size(1);
  p.pages = paged ? int32_t(k_cache.size(0)) : 0;
  p.page_size = paged ? k_cache.size(1) : 0;
  p.topology_batch = depths ? int32_t(depths.size(0)) : 1;
  p.nodes = depths ? int32_t(depths.size(1)) : 0;
  p.table_positions = cosines ? cosines.size(0) : 0;
  p.pairs = cosines ? int32_t(cosines.size(1)) : 0;
  p.dtype = k.dtype();
  p.q_norm_dtype = call.tensor("q_norm_weight").dtype(), p.k_norm_dtype = call.tensor("k_norm_weight").dtype();
  p.code = cache_code(k_cache);
}

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

// K or V of a call's layers: a list of [first, page_size, kv_heads, dim], or one tensor of all layers.
class CacheList {
 public:
  explicit CacheList(const List& list) : list_(list), first_(Tensor(list[0])) {
    layers_ = first_.dims() == 5 ? int(first_.size(0)) : list_.size();
  }

  int layers() const { return layers_; }

  // Writes a layer's address, strides and sizes.
  void describe(int layer, KvCacheLayer& l, bool is_v) {
    if (layer == 0) {
      write(first_, first_.dims() - 4, l, is_v);
      layer_bytes_ = first_.dims() == 5 ? first_.stride(0) * first_.item_bytes() : 0;
      of_first_ = l;
    } else if (first_.dims() == 5) {
      copy(layer * layer_bytes_, l, is_v);
    } else {
      Tensor cache(list_[layer]);
      write(cache, 0, l, is_v);
    }
  }

 private:
  static void write(Tensor& cache, int axis, KvCacheLayer& l, bool is_v) {
    const int64_t item = cache.item_bytes();
    (is_v ? l.v_cache : l.k_cache) = cache.address();
    (is_v ? l.v_stride_first : l.k_stride_first) = cache.stride(axis) * item;
    (is_v ? l.v_stride_slot : l.k_stride_slot) = cache.stride(axis + 1) * item;
    (is_v ? l.v_stride_head : l.k_stride_head) = cache.stride(axis + 2) * item;
    (is_v ? l.v_bytes : l.k_bytes) = int32_t(cache.size(axis + 3) * item);
    l.first = int32_t(cache.size(axis)), l.page_size = int32_t(cache.size(axis + 1));
    l.kv_heads = int32_t(cache.size(axis + 2));
  }

  // What is the first layer's, but for its address.
  void copy(int64_t offset, KvCacheLayer& l, bool is_v) const {
    void* const first = is_v ? of_first_.v_cache : of_first_.k_cache;
    (is_v ? l.v_cache : l.k_cache) = first == nullptr ? nullptr : static_cast<char*>(first) + offset;
    (is_v ? l.v_stride_first : l.k_stride_first) = is_v ? of_first_.v_stride_first : of_first_.k_stride_first;
    (is_v ? l.v_stride_slot : l.k_stride_slot) = is_v ? of_first_.v_stride_slot : of_first_.k_stride_slot;
    (is_v ? l.v_stride_head : l.k_stride_head) = is_v ? of_first_.v_stride_head : of_first_.k_stride_head;
    (is_v ? l.v_bytes : l.k_bytes) = is_v ? of_first_.v_bytes : of_first_.k_bytes;
    l.first = of_first_.first, l.page_size = of_first_.page_size, l.kv_heads = of_first_.kv_heads;
  }

  List list_;
  Tensor first_;
  KvCacheLayer of_first_{};
  int64_t layer_bytes_ = 0;
  int layers_;
};

// Fills `layers`, zeros behind the last one, and returns how many there are.
static int32_t describe_layers(KvCacheLayer (&layers)[kMaxKvLayers], Call& call) {
  CacheList keys(call.list("k_caches")), values(call.list("v_caches"));
  const List tables = call.list("page_tables"), table_of = call.list("table_of");
  const int count = keys.layers();
  if (count < 1 || count > kMaxKvLayers) throw py::value_error("a call of a KV op has 1 to 32 layers");
  for (int i = 0; i < kMaxKvLayers; ++i) {
    KvCacheLayer& l = layers[i] = KvCacheLayer{};
    if (i >= count) continue;
    keys.describe(i, l, false);
    values.describe(i, l, true);
    const int index = number_of<int32_t>(table_of[i]);
    Tensor table(index < 0 ? Py_None : tables[index]);
    l.page_table = static_cast<const int32_t*>(table.address());
    l.max_pages = table ? int32_t(table.size(1)) : -1;
  }
  return count;
}

static void derive(KvCommitParams& p, Call& call) {
  Tensor nodes = call.tensor("nodes"), copies = call.tensor("copies");
  p.count = describe_layers(p.layers, call);
  p.batch = int32_t(nodes.size(0)), p.steps = int32_t(nodes.size(1));
  p.copy_count = copies ? int32_t(copies.size(0)) : 0;
}

static void derive(GatherLayerKvParams& p, Call& call) {
  Tensor slots = call.tensor("slots"), out = call.tensor("out");
  const List tables = call.list("page_tables");
  p.count = describe_layers(p.layers, call);
  p.rows = int32_t(slots.size(0));
  p.batch = tables.size() > 0 ? int32_t(Tensor(tables[0]).size(0)) : p.layers[0].first;
  p.out_stride_row = out.stride(0) * out.item_bytes();
}

void bind_kv(py::module_& m) {
  bind_op(m, "gather_layer_kv", gather_layer_kv_cpu);
  bind_op(m, "kv_append", kv_append_cpu);
  bind_op(m, "kv_commit", kv_commit_cpu);
  bind_op(m, "kv_propagate", kv_propagate_cpu);
#ifdef SPECDEC_WITH_CUDA
  bind_cuda<GatherLayerKvParams, GatherLayerKvParams>(m, "gather_layer_kv", nullptr, gather_layer_kv_cuda);
  bind_cuda<KvAppendParams, KvAppendParams>(m, "kv_append", nullptr, kv_append_cuda);
  bind_cuda<KvCommitParams, KvCommitParams>(m, "kv_commit", nullptr, kv_commit_cuda);
  bind_cuda<KvPropagateParams, KvPropagateParams>(m, "kv_propagate", nullptr, kv_propagate_cuda);
#endif
}

}  // namespace specdec
