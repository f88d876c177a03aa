// The inner loops of common/cpu/benchmark_probes.h, of one instruction set: reading, and multiply-adds in registers.
#pragma once

#include <cstring>
#include <utility>

#include "common/cpu/benchmark_probes.h"
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace specdec::cpu::SPECDEC_ISA {

#define SPECDEC_LOOP_INLINE inline __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
typedef uint64_t Words __attribute__((vector_size(kVectorBytes)));
typedef float Floats __attribute__((vector_size(kVectorBytes)));

constexpr size_t kLine = 64, kPiece = 256;  // bytes; a piece is what one stream reads before the next one's turn

template <bool kPrefetch, bool kNearest>
static uint64_t read_pieces(const char* data, size_t bytes, int streams, int ahead) {
  constexpr int kVectors = kPiece / kVectorBytes, kSums = kVectors < 4 ? kVectors : 4;
  const size_t pieces = bytes / kPiece / streams;  // of one stream
  const size_t apart = pieces * kPiece;
  Words sums[kSums] = {};
  for (size_t piece = 0; piece < pieces; piece++)
    for (int stream = 0; stream < streams; stream++) {
      const char* at = data + stream * apart + piece * kPiece;
      if constexpr (kPrefetch)
        for (size_t line = 0; line < kPiece; line += kLine) __builtin_prefetch(at + ahead + line, 0, kNearest ? 3 : 2);
#pragma GCC unroll 16
      for (int i = 0; i < kVectors; i++) {
        Words words;
        std::memcpy(&words, at + i * kVectorBytes, kVectorBytes);
        sums[i % kSums] ^= words;
      }
    }
  uint64_t total = 0;
  for (const Words& sum : sums)
    for (int i = 0; i < kVectorBytes / 8; i++) total ^= sum[i];
  for (size_t i = streams * apart; i + 8 <= bytes; i += 8) {  // what is left over
    uint64_t word;
    std::memcpy(&word, data + i, 8);
    total ^= word;
  }
  return total;
}

uint64_t read_streams(const char* data, size_t bytes, const ReadWay& way) {
  if (way.ahead == 0) return read_pieces<false, false>(data, bytes, way.streams, 0);
  return way.nearest ? read_pieces<true, true>(data, bytes, way.streams, way.ahead)
                     : read_pieces<true, false>(data, bytes, way.streams, way.ahead);
}

// As many independent sums as hide the latency of an instruction on every processor known today, and fit the registers.
constexpr int kSums = 12;

#if defined(__AMX_BF16__)

double multiply_adds(int64_t rounds) {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  __asm__ volatile("" ::: "memory");  // the compiler does not know that the next instruction reads memory
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  for (int64_t round = 0; round < rounds; round++) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
  return double(rounds) * 4 * (2 * 16 * 16 * 32);
}

#else

#if defined(__AVX512BF16__)
using Factor = __m512bh;
constexpr int kOperations = 4 * kVectorBytes / 4;  // of one vector
static SPECDEC_LOOP_INLINE Factor factor_of(float value) {
  return _mm512_cvtne2ps_pbh(Floats{} + value, Floats{} + value);
}
static SPECDEC_LOOP_INLINE Floats added(Floats sum, Factor a, Factor b) { return _mm512_dpbf16_ps(sum, a, b); }
#else
using Factor = Floats;
constexpr int kOperations = 2 * kVectorBytes / 4;
static SPECDEC_LOOP_INLINE Factor factor_of(float value) { return Floats{} + value; }
static SPECDEC_LOOP_INLINE Floats added(Floats sum, Factor a, Factor b) { return sum * a + b; }
#endif

// Makes the compiler believe that a vector has changed.
template <class Vector>
static SPECDEC_LOOP_INLINE void keep(Vector& vector) {
#if defined(__x86_64__) || defined(__i386__)
  __asm__ volatile("" : "+x"(vector));
#elif defined(__aarch64__)
  __asm__ volatile("" : "+w"(vector));
#else
  __asm__ volatile("" : "+m"(vector));
#endif
}

// Indices are constants, not of a loop: else compilers keep the sums in memory.
template <size_t... kSum>
static double multiply_adds_of(int64_t rounds, std::index_sequence<kSum...>) {
  Floats sums[] = {Floats{} + float(kSum)...};
  Factor a = factor_of(0.999f), b = factor_of(0.001f);
  keep(a);  // or the compiler would know the result
  keep(b);
  for (int64_t round = 0; round < rounds; round++) {
    ((sums[kSum] = added(sums[kSum], a, b)), ...);
    (keep(sums[kSum]), ...);  // each round is done, not summed up
  }
  return double(rounds) * sizeof...(kSum) * kOperations;
}

double multiply_adds(int64_t rounds) { return multiply_adds_of(rounds, std::make_index_sequence<kSums>()); }

#endif

}  // namespace specdec::cpu::SPECDEC_ISA
