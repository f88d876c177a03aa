// How a matrix of weights is stored: an LM head, or a layer's.
#pragma once

#include <cstdint>

namespace specdec {

// The first three are those of DType.
enum class HeadType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kInt8 = 3 };

inline int64_t element_bytes(HeadType type) { return type == HeadType::kFloat32 ? 4 : type == HeadType::kInt8 ? 1 : 2; }

}  // namespace specdec
