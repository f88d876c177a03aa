// Keys and values of skipped layers on the CPU: W_k and W_v of a layer are two small heads, so the kernels of
// few rows make their products, a tile of 64 outputs at a time, and read the weights in order.
//
// A call has one team of threads. Layers come one after the other, each in three phases whose shares go to threads as
// they come free: rows are normalised and packed, tiles are multiplied, and rows are rotated and stored from a buffer of
// float32. A row that has no place costs no product. An output is made by one thread, from its first input to its last,
// so no result depends on their number. Memory read: the weights once.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <vector>

#include "common/cpu/thread_pool.h"
#include "kv/cpu/entry_points.h"
#include "linear/cpu/few_row_products.h"

namespace specdec::cpu {
namespace {

constexpr double kProductsPerThread = 1 << 18;  // below this many another thread does not pay

// A row that is stored, and where: in a request or a page, and in a slot of it.
struct Place {
  int row;
  int64_t first, slot;
};

std::vector<Place> find_places(const KvPropagateParams& p) {
  std::vector<Place> places;
  for (int row = 0; row < p.rows; row++) {
    const int request = p.requests ? read_once(p.requests + row) : 0, slot = read_once(p.slots + row);
    if (request < 0 || request >= p.batch || slot < 0 || slot >= p.slots_each) continue;
    if (!p.page_table) {
      places.push_back({row, request, slot});
      continue;
    }
    const int page = read_once(p.page_table + request * (p.slots_each / p.page_size) + slot / p.page_size);
    if (page >= 0 && page < p.pages) places.push_back({row, page, slot % p.page_size});
  }
  return places;
}

void convert(const float* from, float* to, int count) { std::copy(from, from + count, to); }

struct BFloat16Bits {
  uint16_t bits;
};
struct Float16Bits {
  uint16_t bits;
};

void convert(const float* from, BFloat16Bits* to, int count) {
  for (int i = 0; i < count; i++) {
    uint32_t bits;
    std::memcpy(&bits, from + i, 4);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    to[i].bits = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fff : rounded);  // a NaN stays one
  }
}

// To nearest, ties to even. Below the normal numbers, adding a power of two rounds at the right place.
void convert(const float* from, Float16Bits* to, int count) {
  for (int i = 0; i < count; i++) {
    uint32_t bits;
    std::memcpy(&bits, from + i, 4);
    const uint32_t sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    uint32_t half;
    if (bits > 0x7f800000) {
      half = 0x7fff;
    } else if (bits >= 0x477ff000) {  // 65,520 and above
      half = 0x7c00;
    } else if (bits >= 0x38800000) {  // 2^-14 and above
      half = (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13;
    } else {
      float magnitude;
      std::memcpy(&magnitude, &bits, 4);
      magnitude += 0.5f;
      std::memcpy(&half, &magnitude, 4);
      half -= 0x3f000000;
    }
    to[i].bits = uint16_t(sign | half);
  }
}

// Turns the pairs of a head in place.
void rotate(float* head, const float* cosines, const float* sines, const KvPropagateParams& p) {
  const int step = p.interleaved ? 2 : 1, apart = p.interleaved ? 1 : p.pairs;
  for (int i = 0; i < p.pairs; i++) {
    const float first = head[i * step], second = head[i * step + apart];
    head[i * step] = first * cosines[i] - second * sines[i];
    head[i * step + apart] = second * cosines[i] + first * sines[i];
  }
}

template <class T>
void store_row(const KvPropagateParams& p, const KvLayer& layer, const Place& place, float* keys, const float* values) {
  T* k = static_cast<T*>(layer.k_cache) + place.first * layer.k_stride_batch + place.slot * layer.k_stride_slot;
  T* v = static_cast<T*>(layer.v_cache) + place.first * layer.v_stride_batch + place.slot * layer.v_stride_slot;
  const int64_t angles = int64_t(place.row) * p.pairs;
  for (int head = 0; head < p.kv_heads; head++, keys += p.head_dim, values += p.head_dim) {
    if (p.pairs > 0) rotate(keys, p.cosines + angles, p.sines + angles, p);
    convert(keys, k + head * layer.k_stride_head, p.head_dim);
    convert(values, v + head * layer.v_stride_head, p.head_dim);
  }
}

// The phases of a layer. Its rows are packed while those of the layer before are stored, but where tiles of that one are
// still multiplied; and results are not written before all of the layer before are stored.
struct LayerShares {
  Shares rows, tiles, places;
  LayerShares(int64_t rows, int64_t tiles) : rows(rows), tiles(tiles), places(rows) {}
};

class PropagateCall {
 public:
  PropagateCall(const KvPropagateParams& p, const std::vector<Place>& places)
      : p_(p),
        places_(places),
        type_(static_cast<WeightType>(p.dtype)),
        packed_(product_form(type_, type_ == WeightType::kBFloat16), p.dim, int(places.size())),
        width_(p.kv_heads * p.head_dim),
        tiles_((width_ + kWeightTile - 1) / kWeightTile),
        results_(2 * places.size() * width_) {}

  void run(int threads) {
    std::deque<LayerShares> shares;  // they do not move
    for (int at = 0; at < p_.count; at++) shares.emplace_back(places_.size(), 2 * tiles_);
    run_team(threads, [&](int) {
      std::vector<float> y(float_row(p_.dim));
      for (int at = 0; at < p_.count; at++) {
        const KvLayer& layer = p_.layers[at];
        shares[at].rows.take([&](int64_t n) { pack(layer, int(n), y); });
        shares[at].rows.wait();
        if (at > 0) shares[at - 1].places.wait();
        shares[at].tiles.take([&](int64_t tile) { multiply(layer, int(tile)); });
        shares[at].tiles.wait();
        shares[at].places.take([&](int64_t n) { store(layer, int(n)); });
      }
    });
  }

 private:
  void pack(const KvLayer& layer, int n, std::vector<float>& y) {
    const InputRows rows = {p_.hidden,   p_.dtype, p_.hidden_stride_row, layer.norm_weight, layer.norm_dtype,
                            p_.norm_eps, p_.dim};
    product_kernels().normalise(rows, places_[n].row, y.data());
    packed_.set(n, y.data());
  }

  // Tiles of W_k come first, then those of W_v.
  void multiply(const KvLayer& layer, int at) {
    const int part = at < tiles_ ? 0 : 1, first = at % tiles_ * kWeightTile;
    const int count = std::min(kWeightTile, width_ - first);
    const WeightTile tile = WeightTile::of(type_, part == 0 ? layer.k_weight : layer.v_weight, first, width_, p_.dim);
    packed_.multiply(tile, [&](int n, const float* sums) { std::copy_n(sums, count, row(part, n) + first); });
  }

  void store(const KvLayer& layer, int n) {
    float* keys = row(0, n);
    const float* values = row(1, n);
    if (p_.dtype == DType::kFloat32) store_row<float>(p_, layer, places_[n], keys, values);
    if (p_.dtype == DType::kBFloat16) store_row<BFloat16Bits>(p_, layer, places_[n], keys, values);
    if (p_.dtype == DType::kFloat16) store_row<Float16Bits>(p_, layer, places_[n], keys, values);
  }

  float* row(int part, int64_t n) { return &results_[(part * places_.size() + n) * width_]; }

  const KvPropagateParams& p_;
  const std::vector<Place>& places_;
  const WeightType type_;
  PackedRows packed_;
  const int width_, tiles_;
  std::vector<float> results_;  // of a layer: [K and V, rows that have places, width]
};

}  // namespace

}  // namespace specdec::cpu

namespace specdec {

using namespace cpu;

void kv_propagate_cpu(const KvPropagateParams& p, int threads) {
  const std::vector<Place> places = find_places(p);
  if (places.empty()) return;
  const double products = 2.0 * places.size() * p.dim * p.kv_heads * p.head_dim;
  PropagateCall(p, places).run(threads_for(products, kProductsPerThread, threads));
}

}  // namespace specdec
