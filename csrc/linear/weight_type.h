// How a matrix of weights is stored: an LM head, or a layer's.
#pragma once

#include <cstdint>

namespace specdec {

// The first three are those of DType.
enum class HeadType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kInt8 = 3 };

inline int64_t element_bytes(HeadType type) { return type == HeadType::kFloat32 ? 4 : type == HeadType::kInt8 ? 1 : 2; }

// A layer's weight: those of HeadType, and the blocks of GGUF files (ggml's names), 32 neighbouring elements of a row
// each. A block begins with a float16 scale d. q8_0: 32 int8 q, elements d * q. q4_0: 16 bytes, element i in the low
// half of byte i and 16 + i in the high half, d * (q - 8). q4_1: a float16 minimum m, then as before, d * q + m.
enum class WeightType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kInt8 = 3, kQ80 = 4, kQ40 = 5, kQ41 = 6 };

constexpr int32_t kBlockElements = 32;

constexpr int64_t block_bytes(WeightType type) {
  return type == WeightType::kQ80 ? 34 : type == WeightType::kQ40 ? 18 : 20;
}

constexpr bool has_blocks(WeightType type) { return type >= WeightType::kQ80; }

// Of a row of the weight.
inline int64_t weight_row_bytes(WeightType type, int64_t dim) {
  return has_blocks(type) ? dim / kBlockElements * block_bytes(type) : dim * element_bytes(static_cast<HeadType>(type));
}

}  // namespace specdec
