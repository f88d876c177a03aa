// Decision models on the CPU: a layer is the product of a small head, so the kernels of an LM head make it, a tile
// of 64 outputs at a time. Tiles go to different threads where a layer is large; an output is made by one of them, from
// its first input to its last, so no result depends on their number. Activations stay in float32 between layers, and
// are rounded to bfloat16 where the processor multiplies a bfloat16 layer in pairs. Memory read: the weights once.
#include <algorithm>
#include <cmath>

#include "common/cpu/thread_pool.h"
#include "early_exit/cpu/exit_mlp.h"
#include "linear/cpu/few_row_products.h"

namespace specdec::cpu {
namespace {

constexpr double kProductsPerThread = 1 << 18;  // below this many another thread does not pay
constexpr int64_t kPackedAlone = 1 << 13;       // elements of rows that one thread packs

// y = x W^T + bias; rows [rows, float_row(inputs)] and [rows, float_row(outputs)].
std::vector<float> apply(const MlpLayer& layer, const std::vector<float>& x, int rows, int inputs, int threads) {
  PackedRows packed(head_form(layer.type, false), inputs, rows);
  const int64_t from = float_row(inputs), to = float_row(layer.outputs);
  std::vector<float> y(rows * to);
  const double products = double(rows) * inputs * layer.outputs;
  const ThreadPool pool(int(std::min<double>(std::max(threads, 1), products / kProductsPerThread + 1)));
  const ThreadPool packers(int64_t(rows) * inputs <= kPackedAlone ? 1 : pool.threads());
  packers.run(rows, [&](int64_t row, int) { packed.set(int(row), &x[row * from]); });
  pool.run((layer.outputs + kWeightTile - 1) / kWeightTile, [&](int64_t at, int) {
    const int64_t first = at * kWeightTile;
    const int count = int(std::min<int64_t>(kWeightTile, layer.outputs - first));
    WeightTile tile = WeightTile::of(WeightType(layer.type), layer.weight, first, layer.outputs, inputs);
    tile.near = true;  // a model of a few megabytes that is asked at every step of a draft
    packed.multiply(tile, [&](int row, const float* sums) {
      float* outputs = &y[row * to + first];
      for (int i = 0; i < count; i++) outputs[i] = sums[i] + layer.bias[first + i];
    });
  });
  return y;
}

}  // namespace

}  // namespace specdec::cpu

namespace specdec {

using namespace cpu;

void exit_mlp_cpu(const MlpParams& p, int threads) {
  InputRows rows{};  // without a norm: in float32
  rows.x = p.features;
  rows.dtype = p.features_dtype;
  rows.stride = p.features_stride_row;
  rows.dim = p.inputs;
  std::vector<float> x(p.rows * float_row(p.inputs));
  for (int row = 0; row < p.rows; row++) product_kernels().normalise(rows, row, &x[row * float_row(p.inputs)]);
  int inputs = p.inputs;
  for (int at = 0; at < p.count; at++) {
    x = apply(p.layers[at], x, p.rows, inputs, threads);
    inputs = p.layers[at].outputs;
    if (at + 1 == p.count) break;
    for (float& value : x) value = value < 0 ? 0 : value;  // a NaN stays one
  }
  bool any = false;
  for (int row = 0; row < p.rows; row++) {
    p.score[row] = float(1 / (1 + std::exp(-double(x[row * float_row(1)]))));
    any |= p.score[row] > p.threshold;
  }
  *p.stop = !any;
}

}  // namespace specdec
