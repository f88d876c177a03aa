// linear on the CPU: rows are normalised and packed, then the weights are read once, a tile of up to 64 rows at a time.
//
// A call has one team of threads. Few rows are packed before it begins; more are shared out among threads, which then
// wait for each other once. Parts of neighbouring tiles go to threads as they come free. An
// output is made by one thread, from its first input to its last, so no result depends on their number, and its order
// of sums is that of linear/cpu/row_lanes.h, whatever the number of rows. With an activation a tile has 32 rows of the
// gate and those of the other half that are multiplied with their results; of many rows, which wait for arithmetic, it
// has 32 as well, so that threads get nearly equal parts. Memory read: the weights once, for up to 64 rows. Scratch: the
// packed rows.
#include <algorithm>

#include "common/cpu/thread_pool.h"
#include "linear/cpu/entry_points.h"
#include "linear/cpu/few_row_products.h"

namespace specdec::cpu {
namespace {

constexpr double kWorkPerThread = 1 << 16;  // multiply-adds and bytes: below this many another thread does not pay
constexpr int64_t kPackedAlone = 1 << 13;   // elements of rows that are packed before the threads begin
constexpr int64_t kBytesAtOnce = 1 << 19;   // of the weights that a thread takes at a time: shorter streams are slower
constexpr int kRun = kWeightTile / 4;       // neighbouring rows of the weights in a tile of streams

class LinearCall {
 public:
  explicit LinearCall(const LinearParams& p)
      : p_(p),
        kernels_(product_kernels()),
        packed_(form_of(p), p.dim, p.rows),
        outputs_each_(p.activation == Activation::kNone && packed_.streamed() ? kWeightTile : kWeightTile / 2),
        tiles_((int64_t(p.outputs) + outputs_each_ - 1) / outputs_each_),
        row_bytes_(weight_row_bytes(p.weight_type, p.dim)) {}

  void run(int threads) {
    const int64_t elements = int64_t(p_.rows) * p_.dim;
    const double work = double(p_.outputs) * (double(row_bytes_) + elements);
    threads = int(std::min({double(std::max(threads, 1)), work / kWorkPerThread + 1, double(tiles_)}));
    // Parts of about kBytesAtOnce, as many for each thread, and of nearly as many tiles.
    const int64_t parts = std::min(
        tiles_, std::max<int64_t>(1, tiles_ * outputs_each_ * row_bytes_ / (kBytesAtOnce * threads)) * threads);
    const bool alone = threads == 1 || elements <= kPackedAlone;
    if (alone) pack_rows(0, p_.rows);
    Shares rows(alone ? 0 : p_.rows), shares(parts);
    run_team(threads, [&](int) {
      rows.take([&](int64_t begin, int64_t end) { pack_rows(int(begin), int(end)); });
      rows.wait();
      shares.take([&](int64_t part) { multiply(tiles_ * part / parts, tiles_ * (part + 1) / parts); });
    });
  }

 private:
  static ProductForm form_of(const LinearParams& p) {
    return product_form(p.weight_type, p.weight_type >= WeightType::kInt8 || p.dtype == DType::kBFloat16);
  }

  void pack_rows(int begin, int end) {
    const InputRows rows = {p_.x, p_.dtype, p_.x_stride_row, p_.norm_weight, p_.norm_dtype, p_.norm_eps, p_.dim};
    const AlignedBytes y(float_row(p_.dim) * 4);
    for (int row = begin; row < end; row++) {
      kernels_.normalise(rows, row, reinterpret_cast<float*>(y.data()));
      packed_.set(row, reinterpret_cast<float*>(y.data()));
    }
  }

  // A part of the outputs. With few rows its tiles take rows of the weights from streams as long as the part allows: a
  // run of neighbouring rows from the beginning of each quarter of the part, then the next run.
  void multiply(int64_t begin, int64_t end) const {
    const int64_t whole = std::min<int64_t>(end, p_.outputs / outputs_each_);
    const bool streamed = packed_.streamed();
    for (int64_t tile = begin; tile < end; tile++) {
      if (streamed && tile < whole) {
        multiply_tile(begin * outputs_each_ + (tile - begin) * kRun, outputs_each_, kRun, (whole - begin) * kRun, false,
                      false);
      } else {
        const int64_t first = tile * outputs_each_;
        const int outputs = int(std::min<int64_t>(outputs_each_, p_.outputs - first));
        multiply_tile(first, outputs, outputs, outputs, !streamed && tile + 1 < end, tile > begin);
      }
    }
  }

  // Outputs in runs of neighbours, whose beginnings are so far apart.
  void multiply_tile(int64_t first, int outputs, int run, int64_t apart, bool has_next, bool fetched) const {
    WeightTile tile;
    tile.dim = p_.dim;
    const char* const weights = static_cast<const char*>(p_.weight) + first * row_bytes_;
    for (int i = 0; i < outputs; i++) tile.row[i] = weights + (i / run * apart + i % run) * row_bytes_;
    tile.count = outputs;
    if (p_.activation != Activation::kNone) {
      std::fill(tile.row + outputs, tile.row + outputs_each_, tile.row[outputs - 1]);
      for (int i = 0; i < outputs; i++) tile.row[outputs_each_ + i] = tile.row[i] + p_.outputs * row_bytes_;
      tile.count = outputs_each_ + outputs;
    }
    tile.fetched = fetched;
    tile.next = has_next ? weights + outputs * row_bytes_ : nullptr;
    packed_.multiply_blocks(tile, [&](int row, int rows, const float* sums) {
      for (int i = 0; i < outputs; i += run) {
        kernels_.finish(p_, sums + i, row, rows, int(first + i / run * apart), run);
      }
    });
  }

  const LinearParams& p_;
  const ProductKernels& kernels_;
  PackedRows packed_;
  const int outputs_each_;
  const int64_t tiles_, row_bytes_;
};

}  // namespace
}  // namespace specdec::cpu

namespace specdec {

void linear_cpu(const LinearParams& p, int threads) { cpu::LinearCall(p).run(threads); }

}  // namespace specdec
