// Numbers of a cache in 8 bits: to nearest, ties to even, and never beyond the largest finite one. CPU and GPU alike.
//
// No instruction of a processor or an older GPU does this, but a float32 addition rounds at any wanted bit: a number
// below the smallest normal one of the format is added to a power of two whose last bit is that of the format; an
// integer that is added to 1.5 * 2^23 ends up in the last bits of the sum. Normal numbers are rounded as integers.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/philox.h"
#include "kv/params.h"

namespace specdec {

SPECDEC_HOST_DEVICE uint32_t code_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// kMantissa bits of it, below an exponent of kBias. kLargest is the greatest finite number's code.
template <int kMantissa, int kBias, uint32_t kLargest>
SPECDEC_HOST_DEVICE uint8_t float8_of(float value) {
  constexpr int kShift = 23 - kMantissa;
  constexpr uint32_t kRebias = uint32_t(127 - kBias) << 23;
  const uint32_t bits = code_bits(value), sign = bits >> 24 & 0x80, magnitude = bits & 0x7fffffff;
  constexpr uint32_t kSmallestNormal = uint32_t(128 - kBias) << 23;
  constexpr uint32_t kLargestBits = (kLargest << kShift) + kRebias;
  // The last bit of this power of two is 2^(1 - kBias - kMantissa), the smallest number of the format.
  constexpr uint32_t kAddend = uint32_t(127 + kShift + 1 - kBias) << 23;
  float small, addend;
  const uint32_t addend_bits = kAddend;
  memcpy(&small, &magnitude, sizeof small);
  memcpy(&addend, &addend_bits, sizeof addend);
  const uint32_t below = code_bits(small + addend) - kAddend;
  const uint32_t rounded = (magnitude - kRebias + ((1u << (kShift - 1)) - 1) + (magnitude >> kShift & 1)) >> kShift;
  uint32_t code = magnitude < kSmallestNormal ? below : rounded;
  code = magnitude > kLargestBits ? kLargest : code;
  code = magnitude > 0x7f800000 ? 0x7f : code;
  return uint8_t(sign | code);
}

SPECDEC_HOST_DEVICE uint8_t float8_e4m3_of(float value) { return float8_of<3, 7, 0x7e>(value); }
SPECDEC_HOST_DEVICE uint8_t float8_e5m2_of(float value) { return float8_of<2, 15, 0x7b>(value); }

// NaN is 0.
SPECDEC_HOST_DEVICE uint8_t int8_of(float value) {
  const float above = value > -127.0f ? value : -127.0f;  // also of NaN
  const float within = above < 127.0f ? above : 127.0f;
  return uint8_t(code_bits((value == value ? within : 0.0f) + 12582912.0f));
}

}  // namespace specdec
