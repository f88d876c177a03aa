// Reading rows of logits: any float type, any start, any number of tokens.
//
// A row is cut into chunks of 8 tokens, counted from its first token wherever it lies in memory, and chunk c belongs to
// thread c % threads. So what a thread adds up, and in which order, depends on the tokens alone: a row gives the same
// sums wherever it starts. A chunk is one load of 16 bytes, or two for float32. The chunks of a row that does not start
// at a multiple of 16 bytes, and a last chunk that is not whole, are read token by token. Nothing outside of the row is
// read, and no byte twice.
//
// The type is looked at in each chunk, not compiled in: the branch is the same for the whole block and costs little
// next to the exponentials, and there is one copy of every pass instead of nine.
#pragma once

#include "common/cuda/block_team.cuh"
#include "common/cuda/device.cuh"
#include "common/types.h"

namespace specdec::cuda {

constexpr int32_t kChunk = 8;

struct Row {
  const unsigned char* address;
  int32_t vocab;
  DType dtype;
};

__device__ __forceinline__ Row row_at(const void* tensor, int64_t offset, int32_t vocab, DType dtype) {
  const int64_t bytes = dtype == DType::kFloat32 ? 4 : 2;
  return {static_cast<const unsigned char*>(tensor) + offset * bytes, vocab, dtype};
}

__device__ __forceinline__ float from_bits16(uint32_t bits, DType dtype) {
  if (dtype == DType::kBFloat16) return float_of(bits << 16);
  return float16_bits_to_float(bits);
}

__device__ __forceinline__ float logit_at(const Row& row, int32_t token) {
  if (row.dtype == DType::kFloat32) return reinterpret_cast<const float*>(row.address)[token];
  return from_bits16(reinterpret_cast<const uint16_t*>(row.address)[token], row.dtype);
}

// A whole and aligned chunk as it lies in memory; `high` is of float32 only.
struct RawChunk {
  Bytes16 low, high;
};

// Whether the chunk that starts at token `first`, a multiple of 8, can be loaded at once.
__device__ __forceinline__ bool is_plain(const Row& row, int64_t first) {
  return first + kChunk <= row.vocab && reinterpret_cast<uintptr_t>(row.address) % 16 == 0;
}

__device__ __forceinline__ RawChunk load_plain(const Row& row, int64_t first) {
  const bool wide = row.dtype == DType::kFloat32;
  const unsigned char* address = row.address + first * (wide ? 4 : 2);
  RawChunk raw{load_16(address), {}};
  if (wide) raw.high = load_16(address + 16);
  return raw;
}

__device__ __forceinline__ void convert(const RawChunk& raw, DType dtype, float (&logit)[kChunk]) {
  if (dtype == DType::kFloat32) {
#pragma unroll
    for (int i = 0; i < 4; ++i) logit[i] = float_of(raw.low.word[i]), logit[i + 4] = float_of(raw.high.word[i]);
  } else if (dtype == DType::kBFloat16) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      logit[2 * i] = float_of(raw.low.word[i] << 16);
      logit[2 * i + 1] = float_of(raw.low.word[i] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      logit[2 * i] = float16_bits_to_float(raw.low.word[i] & 0xffffu);
      logit[2 * i + 1] = float16_bits_to_float(raw.low.word[i] >> 16);
    }
  }
}

// Tokens beyond the end of the row read as -inf.
__device__ __forceinline__ void load_single(const Row& row, int32_t first, float (&logit)[kChunk]) {
#pragma unroll
  for (int i = 0; i < kChunk; ++i) logit[i] = first + i < row.vocab ? logit_at(row, first + i) : negative_infinity();
}

__device__ __forceinline__ void load_logits(const Row& row, int32_t first, float (&logit)[kChunk]) {
  if (is_plain(row, first)) {
    convert(load_plain(row, first), row.dtype, logit);
  } else {
    load_single(row, first, logit);
  }
}

// Threads for passes over that many tokens: a warp for every 256, a power of two up to what a team can have.
inline int team_threads(int32_t tokens) {
  int threads = kWarpSize;
  while (threads < kTeamMaxThreads && threads * kChunk < tokens) threads *= 2;
  return threads;
}

// A part of a row, in tokens; `begin` is a multiple of 8.
struct Span {
  int32_t begin, end;
};
__device__ __forceinline__ Span whole(const Row& row) { return {0, row.vocab}; }

// use(first token, logits) for every chunk of this thread, in ascending order. Tokens beyond the end of the row read as
// -inf. The next chunk is on its way while one is used: for passes that have much to do with each.
template <class Use>
__device__ __forceinline__ void for_each_chunk(const BlockTeam& team, const Row& row, Span span, const Use& use) {
  const int64_t step = kChunk * team.size;
  int64_t first = span.begin + kChunk * team.rank;
  RawChunk raw{};
  if (first < span.end && is_plain(row, first)) raw = load_plain(row, first);
#pragma unroll 1
  for (; first < span.end; first += step) {
    RawChunk next{};
    if (first + step < span.end && is_plain(row, first + step)) next = load_plain(row, first + step);
    float logit[kChunk];
    if (is_plain(row, first)) {
      convert(raw, row.dtype, logit);
    } else {
      load_single(row, int32_t(first), logit);
    }
    use(int32_t(first), logit);
    raw = next;
  }
}

// The same of two rows at once, use(first token, logits, logits of the other row). Without the other one its logits are
// not written.
template <class Use>
__device__ __forceinline__ void for_each_chunk_of_two(const BlockTeam& team, const Row& row, const Row& other,
                                                      bool with_other, Span span, const Use& use) {
  const int64_t step = kChunk * team.size;
  int64_t first = span.begin + kChunk * team.rank;
  RawChunk raw{}, raw_other{};
  if (first < span.end && is_plain(row, first)) raw = load_plain(row, first);
  if (with_other && first < span.end && is_plain(other, first)) raw_other = load_plain(other, first);
#pragma unroll 1
  for (; first < span.end; first += step) {
    RawChunk next{}, next_other{};
    const bool goes_on = first + step < span.end;
    if (goes_on && is_plain(row, first + step)) next = load_plain(row, first + step);
    if (with_other && goes_on && is_plain(other, first + step)) next_other = load_plain(other, first + step);
    float logit[kChunk], other_logit[kChunk];
    if (is_plain(row, first)) {
      convert(raw, row.dtype, logit);
    } else {
      load_single(row, int32_t(first), logit);
    }
    if (with_other && is_plain(other, first)) {
      convert(raw_other, other.dtype, other_logit);
    } else if (with_other) {
      load_single(other, int32_t(first), other_logit);
    }
    use(int32_t(first), logit, other_logit);
    raw = next;
    raw_other = next_other;
  }
}

// The same for passes that have little to do with a chunk, and wait for memory: four chunks are on their way at once.
template <class Use>
__device__ __forceinline__ void stream_chunks(const BlockTeam& team, const Row& row, Span span, const Use& use) {
  constexpr int kAtOnce = 4;
  const int64_t step = kChunk * team.size;
  int64_t first = span.begin + kChunk * team.rank;
  for (; first + (kAtOnce - 1) * step < span.end && is_plain(row, first + (kAtOnce - 1) * step);
       first += kAtOnce * step) {
    RawChunk raw[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) raw[i] = load_plain(row, first + i * step);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      float logit[kChunk];
      convert(raw[i], row.dtype, logit);
      use(int32_t(first + i * step), logit);
    }
  }
#pragma unroll 1
  for (; first < span.end; first += step) {
    float logit[kChunk];
    load_logits(row, int32_t(first), logit);
    use(int32_t(first), logit);
  }
}

}  // namespace specdec::cuda
