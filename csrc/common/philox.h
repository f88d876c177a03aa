// Counter-based noise: the same integers on every backend, whoever asks and in whatever order.
//
// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011). The key is the request's seed;
// the counter says what is drawn, so that no draw is ever used twice: (token or node / 4, position, domain, detail),
// and the lane is token or node % 4. Uniforms are midpoints and never 0 or 1. A weighted draw is an
// exponential race: the token with the greatest weight / E wins, where E = -log1p(-v) of the token's uniform v. The
// winner follows the weights, and the k best are k draws without replacement. log1p keeps the small E of unlikely
// winners as fine as they come.
#pragma once

#include <math.h>

#include <cstdint>

#if defined(__CUDACC__)
#define SPECDEC_HOST_DEVICE static __host__ __device__ __forceinline__
#else
#define SPECDEC_HOST_DEVICE static inline __attribute__((always_inline))
#endif

namespace specdec {

enum NoiseDomain : uint32_t {
  kNoiseSample = 0,    // a token at its own position
  kNoiseDraft = 1,     // children of a node; detail: the node, and the draw << 16 when drawn with replacement
  kNoiseAccept = 2,    // the coin of a node; detail 1: the one coin of a node's children
  kNoiseResidual = 3,  // the next token after a rejection; detail: the node
  kNoiseBonus = 4,     // the next token where nothing was rejected; detail: the node
};

// All of a draw but its lane's counter.
struct NoiseKey {
  uint32_t seed_low, seed_high, position, domain, detail;
};

struct Random4 {
  uint32_t lane[4];
};

constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;

SPECDEC_HOST_DEVICE Random4 philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t product0 = uint64_t(kPhiloxMultiplier0) * c0;
    const uint64_t product1 = uint64_t(kPhiloxMultiplier1) * c2;
    c0 = uint32_t(product1 >> 32) ^ c1 ^ k0;
    c1 = uint32_t(product1);
    c2 = uint32_t(product0 >> 32) ^ c3 ^ k1;
    c3 = uint32_t(product0);
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
  return {{c0, c1, c2, c3}};
}

SPECDEC_HOST_DEVICE NoiseKey noise_key(int64_t seed, int32_t position, NoiseDomain domain, uint32_t detail) {
  return {uint32_t(uint64_t(seed)), uint32_t(uint64_t(seed) >> 32), uint32_t(position), uint32_t(domain), detail};
}

// The numbers of ids 4 * quad .. 4 * quad + 3.
SPECDEC_HOST_DEVICE Random4 random4(const NoiseKey& key, uint32_t quad) {
  return philox(quad, key.position, key.domain, key.detail, key.seed_low, key.seed_high);
}

SPECDEC_HOST_DEVICE uint32_t random_of(const NoiseKey& key, int32_t id) {
  const Random4 numbers = random4(key, uint32_t(id) >> 2);
  const uint32_t lane = uint32_t(id) & 3;  // not an index: an array that is indexed leaves the registers
  const uint32_t low = lane == 0 ? numbers.lane[0] : numbers.lane[1];
  const uint32_t high = lane == 2 ? numbers.lane[2] : numbers.lane[3];
  return lane < 2 ? low : high;
}

// In (0, 1), exact in fp32: the middle of one of 2^23 intervals. That of the last of 2^24 would round to 1.
SPECDEC_HOST_DEVICE float coin_of(const NoiseKey& key, int32_t id) {
  return (float(random_of(key, id) >> 9) + 0.5f) * 0x1p-23f;
}

// In (0, 1]; E of it is never below it, so weight / v bounds a token's score before a logarithm is taken.
SPECDEC_HOST_DEVICE float draw_uniform(uint32_t number) { return (float(number) + 0.5f) * 0x1p-32f; }

// Infinite where the uniform has rounded to 1: such a token has score 0.
SPECDEC_HOST_DEVICE float draw_exponential(float uniform) { return -log1pf(-uniform); }

}  // namespace specdec
