// Small kernels, each right as long as no bug is asked for, and the bugs that the emulator must catch.
//
// `planted_bugs NAME` runs the kernel of that bug in several orders until something is wrong: 1 is a wrong result, 2 an
// error of the emulator, and the sanitizers have exit statuses of their own. `planted_bugs none` runs them all, without
// a bug; every result must be right, and the same in every order.
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/cuda/device.cuh"

using namespace specdec;
using namespace specdec::cuda;

namespace {

enum Bug {
  kNone,
  // of reduce_kernel
  kMissingBarrier,
  kStaticOverflow,
  kDivergentBarrier,
  kTwoBarriers,
  kExitBeforeBarrier,
  kPartOfAWarp,
  kNoWarpSync,
  kNoAtomic,
  kNoFence,
  // of product_kernel
  kMissingWait,
  kNeverWaits,
  kNoBarrierAfterWait,
  kNoBarrierBeforeReuse,
  kWrongStage,
  kDynamicOverflow,
  kTooMuchShared,
  kDifferentArrays,
  kUnalignedRow,
  kWrongLanes,
  kGlobalOverflow,
  // of small_kernel
  kUnalignedLoad,
  kUnalignedPack,
  kShiftTooFar,
  kLaneNotNamed,
  kGroupTooFew,
  kGroupCountsDiffer,
};

const char* const kNames[] = {"none",
                              "missing-barrier",
                              "static-overflow",
                              "divergent-barrier",
                              "two-barriers",
                              "exit-before-barrier",
                              "part-of-a-warp",
                              "no-warp-sync",
                              "no-atomic",
                              "no-fence",
                              "missing-wait",
                              "never-waits",
                              "no-barrier-after-wait",
                              "no-barrier-before-reuse",
                              "wrong-stage",
                              "dynamic-overflow",
                              "too-much-shared",
                              "different-arrays",
                              "unaligned-row",
                              "wrong-lanes",
                              "global-overflow",
                              "unaligned-load",
                              "unaligned-pack",
                              "shift-too-far",
                              "lane-not-named",
                              "group-too-few",
                              "group-counts-differ"};

// The sum of numbers: every block adds up a part, the last one to finish adds up the parts.

constexpr int kReduceThreads = 128;

struct ReduceParams {
  Bug bug;
  const float* numbers;
  int count;
  float* parts;
  uint32_t* finished;
  float* sum;
};

float warp_sum(float value) {
  for (int lanes = 16; lanes > 0; lanes /= 2) value += warp_shuffle_xor(value, lanes);
  return value;
}

float add_up_blocks(const ReduceParams& p) {
  float sum = 0;
  for (unsigned i = threadIdx.x; i < gridDim.x; i += kWarpSize) sum += p.parts[i];
  if (p.bug == kPartOfAWarp && threadIdx.x >= 16) return 0;
  return warp_sum(sum);
}

__global__ void reduce_kernel(ReduceParams p) {
  SPECDEC_SHARED(float, warp_sums, [kReduceThreads / kWarpSize]);
  SPECDEC_SHARED(float, exchange, [kReduceThreads]);
  SPECDEC_SHARED(int, is_last, );
  const int warp = threadIdx.x / kWarpSize;
  float value = 0;
  for (int i = blockIdx.x * kReduceThreads + threadIdx.x; i < p.count; i += gridDim.x * kReduceThreads) {
    value += p.numbers[i];
  }
  exchange[threadIdx.x] = value;
  if (p.bug != kNoWarpSync) warp_sync();
  value = exchange[threadIdx.x ^ 1];

  value = warp_sum(value);
  if (threadIdx.x % kWarpSize == 0) warp_sums[warp + (p.bug == kStaticOverflow)] = value;
  if (p.bug != kMissingBarrier) block_sync();
  if (threadIdx.x == 0) {
    float sum = 0;
    for (float part : warp_sums) sum += part;
    p.parts[blockIdx.x] = sum;
    if (p.bug != kNoFence) device_fence();
    is_last = (p.bug == kNoAtomic ? (*p.finished)++ : atomic_add(p.finished, 1u)) == gridDim.x - 1;
  }
  if (p.bug == kExitBeforeBarrier && threadIdx.x >= 96) return;
  if (p.bug == kTwoBarriers && threadIdx.x % 2 == 1) {
    block_sync();
  } else if (p.bug != kDivergentBarrier || threadIdx.x < 64) {
    block_sync();
  }
  if (is_last == 1 && threadIdx.x < kWarpSize) {
    device_fence();
    const float sum = add_up_blocks(p);
    if (threadIdx.x == 0) *p.sum = sum;
  }
}

// [32, depth] times [depth, 16], in tiles of 32 of the depth: while one is multiplied the next is copied.

constexpr int kRows = 32, kColumns = 16, kTile = 32, kProductThreads = 64;

struct ProductParams {
  Bug bug;
  const void* a;  // [32, depth]
  const void* b;  // [depth, 16]
  float* product;
  int depth;
};

template <class T>
struct Stages {
  T *a[2], *b[2];
};

template <class T>
void copy_tile(const ProductParams& p, const Stages<T>& stages, int tile) {
  const T* a = static_cast<const T*>(p.a);
  const T* b = static_cast<const T*>(p.b);
  T* a_tile = stages.a[tile & 1];
  T* b_tile = p.bug == kWrongStage ? stages.b[0] + tile * kTile * kColumns : stages.b[tile & 1];
  for (int chunk = threadIdx.x; chunk < kRows * kTile / 8; chunk += kProductThreads) {
    const int row = chunk / (kTile / 8), column = chunk % (kTile / 8) * 8;
    const bool exists = tile * kTile + column < p.depth;
    cp_async_16(a_tile + row * kTile + column, exists ? a + row * p.depth + tile * kTile + column : a, exists ? 16 : 0);
  }
  const int row = threadIdx.x / 2, column = threadIdx.x % 2 * 8, last = p.depth - (p.bug != kGlobalOverflow);
  const bool exists = tile * kTile + row <= last;
  cp_async_16(b_tile + row * kColumns + column, exists ? b + (tile * kTile + row) * kColumns + column : b,
              exists ? 16 : 0);
  cp_async_commit();
}

template <class T>
void multiply_tile(const ProductParams& p, const T* a, const T* b, float (&sums)[2][4]) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  for (int k = 0; k < kTile; k += 16) {
    uint32_t a_part[4], b_part[4];
    ldmatrix_x4(a_part, a + (warp * 16 + lane % 16) * kTile + k + lane / 16 * (p.bug == kUnalignedRow ? 4 : 8));
    const int row = p.bug == kWrongLanes ? lane % 8 + lane / 16 * 8 : lane % 16;
    const int column = p.bug == kWrongLanes ? lane / 8 % 2 * 8 : lane / 16 * 8;
    ldmatrix_x4_trans(b_part, b + (k + row) * kColumns + column);
    mma_m16n8k16<T>(sums[0], a_part, b_part[0], b_part[1]);
    mma_m16n8k16<T>(sums[1], a_part, b_part[2], b_part[3]);
  }
}

template <class T>
__global__ void product_kernel(ProductParams p) {
  SharedMemory memory;
  Stages<T> stages;
  for (int stage = 0; stage < 2; ++stage) {
    stages.a[stage] = memory.take<T>(kRows * kTile);
    stages.b[stage] = memory.take<T>(kTile * kColumns);
  }
  if (p.bug == kTooMuchShared) memory.take<T>(8);
  if (p.bug == kDifferentArrays) SharedMemory().take<T>(8 + threadIdx.x);
  if (p.bug == kDynamicOverflow) stages.b[0][kTile * kColumns + threadIdx.x % 2] = T{};

  float sums[2][4] = {};
  const int tiles = (p.depth + kTile - 1) / kTile;
  copy_tile(p, stages, 0);
  for (int tile = 0; tile < tiles; ++tile) {
    if (tile + 1 < tiles) {
      copy_tile(p, stages, tile + 1);
      if (p.bug != kMissingWait && p.bug != kNeverWaits) cp_async_wait<1>();
    } else if (p.bug != kNeverWaits) {
      cp_async_wait<0>();
    }
    if (p.bug != kNoBarrierAfterWait) block_sync();
    multiply_tile(p, stages.a[tile & 1], stages.b[tile & 1], sums);
    if (p.bug != kNoBarrierBeforeReuse) block_sync();
  }
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  for (int half = 0; half < 2; ++half) {
    for (int i = 0; i < 4; ++i) {
      const int row = warp * 16 + lane / 4 + i / 2 * 8, column = half * 8 + lane % 4 * 2 + i % 2;
      p.product[row * kColumns + column] = sums[half][i];
    }
  }
}

// Vector loads, bits of a mask, and collectives of a part of a warp.

struct SmallParams {
  Bug bug;
  const float* numbers;  // [257]
  const uint64_t* mask;
  float* results;  // [64, 4]
};

__global__ void small_kernel(SmallParams p) {
  const int thread = threadIdx.x;
  const Bytes16 loaded = load_16(p.numbers + 4 * thread + (p.bug == kUnalignedLoad));
  const auto* packs = reinterpret_cast<const Pack<float, 4>*>(p.numbers + (p.bug == kUnalignedPack));
  const Pack<float, 4> pack = packs[thread];
  const int bit = thread + (p.bug == kShiftTooFar);
  const bool visible = *p.mask >> bit & 1;
  const uint32_t odd_or_even = thread % 2 == 1 ? 0xaaaaaaaau : 0x55555555u;
  const uint32_t named = p.bug == kLaneNotNamed ? 0x55555555u : odd_or_even;
  uint32_t mine = 0;
  if (thread % 2 == 1) {
    mine = warp_ballot(thread % 3 == 0, named);
  } else {
    mine = warp_match(thread % 4, odd_or_even);
  }
  // Both warps, at a barrier that each names for itself.
  if (thread >= 32) {
    if (p.bug != kGroupTooFew) group_sync<1>(p.bug == kGroupCountsDiffer ? 32 : 64);
  } else {
    group_sync<1>(64);
  }
  const double next = warp_shuffle(double(thread), thread + 1);
  p.results[4 * thread] = float_of(loaded.word[1]);
  p.results[4 * thread + 1] = pack.element[2] + (visible ? 1000.0f : 0.0f);
  p.results[4 * thread + 2] = float(popcount(mine) * 100 + lowest_bit(mine));
  p.results[4 * thread + 3] = float(next);
}

// The host: inputs, right results, orders.

template <class Params>
void start(void (*kernel)(Params), int blocks, int threads, size_t shared_bytes, const Params& params) {
  if (launch(kernel, dim3(blocks), dim3(threads), shared_bytes, 0, nullptr, params) != cudaSuccess) {
    throw std::runtime_error("a launch was refused");
  }
}

// Memory of just that size, for AddressSanitizer.
template <class T>
using Array = std::vector<T>;

bool reduces(Bug bug) {
  const int count = 10003, blocks = 7;
  Array<float> numbers(count), parts(blocks);
  float right = 0, sum = -1;
  for (int i = 0; i < count; ++i) right += numbers[i] = float(i * 7 % 31 - 12);
  uint32_t finished = 0;
  start(reduce_kernel, blocks, kReduceThreads, 0, {bug, numbers.data(), count, parts.data(), &finished, &sum});
  return sum == right;
}

template <class T>
bool multiplies(Bug bug) {
  const int depth = 3 * kTile + 24;
  Array<T> a(kRows * depth), b(depth * kColumns);
  Array<float> product(kRows * kColumns);
  for (size_t i = 0; i < a.size(); ++i) a[i] = from_float<T>(float(int(i * 7 % 31) - 15));
  for (size_t i = 0; i < b.size(); ++i) b[i] = from_float<T>(float(int(i * 5 % 29) - 14));
  const size_t bytes = 2 * (SharedMemory::bytes<T>(kRows * kTile) + SharedMemory::bytes<T>(kTile * kColumns));
  start(product_kernel<T>, 1, kProductThreads, bytes, {bug, a.data(), b.data(), product.data(), depth});
  for (int i = 0; i < kRows * kColumns; ++i) {
    float right = 0;
    for (int k = 0; k < depth; ++k) {
      right += to_float(a[i / kColumns * depth + k]) * to_float(b[k * kColumns + i % kColumns]);
    }
    if (product[i] != right) return false;
  }
  return true;
}

bool does_small_things(Bug bug) {
  Array<Pack<float, 4>> numbers(65);
  float* number = numbers[0].element;
  for (int i = 0; i < 260; ++i) number[i] = float(i);
  const uint64_t mask = 0x8000000000000005u;
  Array<float> results(256);
  start(small_kernel, 1, 64, 0, {bug, number, &mask, results.data()});
  for (int thread = 0; thread < 64; ++thread) {
    const int lane = thread % 32, warp = thread / 32 * 32;
    int count = 0, lowest = -1;
    for (int other = 31; other >= 0; --other) {
      const bool counts = lane % 2 == 1 ? other % 2 == 1 && (warp + other) % 3 == 0 : other % 4 == lane % 4;
      if (counts) ++count, lowest = other;
    }
    const float visible = mask >> thread & 1 ? 1000.0f : 0.0f;
    const float* result = &results[4 * thread];
    if (result[0] != number[4 * thread + 1] || result[1] != number[4 * thread + 2] + visible) return false;
    if (result[2] != float(count * 100 + lowest) || result[3] != float(warp + (lane + 1) % 32)) return false;
  }
  return true;
}

bool is_right(Bug bug) {
  if (bug == kNone) {
    return reduces(bug) && multiplies<BFloat16>(bug) && multiplies<Float16>(bug) && does_small_things(bug);
  }
  if (bug < kMissingWait) return reduces(bug);
  if (bug < kUnalignedLoad) return multiplies<BFloat16>(bug);
  return does_small_things(bug);
}

int run(Bug bug) {
  struct {
    const char* name;
    emulator::Options options;
  } const orders[] = {{"forward", {emulator::Order::kForward, 0}},
                      {"reverse", {emulator::Order::kReverse, 0}},
                      {"random 1", {emulator::Order::kRandom, 1}},
                      {"random 2", {emulator::Order::kRandom, 2}}};
  for (const auto& order : orders) {
    emulator::options() = order.options;
    try {
      if (is_right(bug)) continue;
      std::printf("wrong result in %s order\n", order.name);
      return 1;
    } catch (const std::exception& error) {
      std::printf("%s\n", error.what());
      if (!is_right(kNone)) std::printf("and the emulator is of no use afterwards\n");
      return 2;
    }
  }
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  for (int bug = 0; count == 2 && bug < int(sizeof kNames / sizeof *kNames); ++bug) {
    if (arguments[1] == std::string(kNames[bug])) return run(Bug(bug));
  }
  std::printf("which bug?\n");
  return 64;
}
