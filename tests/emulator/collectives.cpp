// What the lanes of a warp compute together. The layouts of matrix fragments are those of the PTX manual, "Matrix
// multiply-accumulate operation using mma instruction" and "ldmatrix".
#include "emulator.h"

namespace specdec::emulator {

namespace {

constexpr int kLanes = 32;

bool has(uint32_t lanes, int lane) { return lanes >> lane & 1; }

float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

float from_bfloat16(uint32_t bits) { return as_float(bits << 16); }

float from_float16(uint32_t bits) {
  const uint32_t sign = (bits & 0x8000) << 16, rest = bits & 0x7fff;
  if (rest >= 0x7c00) return as_float(sign | 0x7f800000 | rest << 13);
  const float magnitude = as_float(rest << 13) * 0x1p112f;
  return sign ? -magnitude : magnitude;
}

void shuffle(uint32_t lanes, Payload* const payloads[kLanes]) {
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!has(lanes, lane)) continue;
    const int from = int(payloads[lane]->from_lane);
    // The value of a lane outside of the mask is undefined.
    for (int i = 0; i < 2; ++i) payloads[lane]->out[i] = has(lanes, from) ? payloads[from]->in[i] : 0xffffffffu;
  }
}

void ballot(uint32_t lanes, Payload* const payloads[kLanes]) {
  uint32_t votes = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (has(lanes, lane) && payloads[lane]->in[0] != 0) votes |= 1u << lane;
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    if (has(lanes, lane)) payloads[lane]->out[0] = votes;
  }
}

void match(uint32_t lanes, Payload* const payloads[kLanes]) {
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!has(lanes, lane)) continue;
    uint32_t same = 0;
    for (int other = 0; other < kLanes; ++other) {
      if (has(lanes, other) && payloads[other]->in[0] == payloads[lane]->in[0]) same |= 1u << other;
    }
    payloads[lane]->out[0] = same;
  }
}

// Lane 8 * i + r has brought row r of matrix i. Lane l gets two neighbours of row l / 4.
void load_matrix(Payload* const payloads[kLanes]) {
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int i = 0; i < 4; ++i) payloads[lane]->out[i] = payloads[8 * i + lane / 4]->in[lane % 4];
  }
}

// Lane l gets two neighbours of column l / 4.
void load_matrix_transposed(Payload* const payloads[kLanes]) {
  for (int lane = 0; lane < kLanes; ++lane) {
    const int column = lane / 4, row = 2 * (lane % 4);
    for (int i = 0; i < 4; ++i) {
      const auto element = [&](int r) { return payloads[8 * i + r]->in[column / 2] >> (column % 2 * 16) & 0xffff; };
      payloads[lane]->out[i] = element(row) | element(row + 1) << 16;
    }
  }
}

// in: four registers of a, two of b, four of the sum.
template <float (*kToFloat)(uint32_t)>
void multiply(Payload* const payloads[kLanes]) {
  float a[16][16], b[16][8], sum[16][8];
  const auto low = [](uint32_t pair) { return kToFloat(pair & 0xffff); };
  const auto high = [](uint32_t pair) { return kToFloat(pair >> 16); };
  for (int lane = 0; lane < kLanes; ++lane) {
    const uint32_t* in = payloads[lane]->in;
    const int group = lane / 4, pair = 2 * (lane % 4);
    for (int i = 0; i < 4; ++i) {
      const int row = group + i % 2 * 8, column = pair + i / 2 * 8;
      a[row][column] = low(in[i]);
      a[row][column + 1] = high(in[i]);
      sum[group + i / 2 * 8][pair + i % 2] = as_float(in[6 + i]);
    }
    for (int i = 0; i < 2; ++i) {
      b[pair + 8 * i][group] = low(in[4 + i]);
      b[pair + 8 * i + 1][group] = high(in[4 + i]);
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < 8; ++column) sum[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int i = 0; i < 4; ++i) {
      std::memcpy(&payloads[lane]->out[i], &sum[lane / 4 + i / 2 * 8][2 * (lane % 4) + i % 2], sizeof(float));
    }
  }
}

}  // namespace

const char* name_of(Collective collective) {
  switch (collective) {
    case Collective::kSync:
      return "warp_sync";
    case Collective::kShuffle:
      return "warp_shuffle";
    case Collective::kBallot:
      return "warp_ballot";
    case Collective::kMatch:
      return "warp_match";
    case Collective::kLoadMatrix:
      return "ldmatrix_x4";
    case Collective::kLoadMatrixTransposed:
      return "ldmatrix_x4_trans";
    case Collective::kMultiplyBFloat16:
    case Collective::kMultiplyFloat16:
      return "mma_m16n8k16";
  }
  return "";
}

void combine(Collective collective, uint32_t lanes, Payload* const payloads[kLanes]) {
  switch (collective) {
    case Collective::kSync:
      return;
    case Collective::kShuffle:
      return shuffle(lanes, payloads);
    case Collective::kBallot:
      return ballot(lanes, payloads);
    case Collective::kMatch:
      return match(lanes, payloads);
    case Collective::kLoadMatrix:
      return load_matrix(payloads);
    case Collective::kLoadMatrixTransposed:
      return load_matrix_transposed(payloads);
    case Collective::kMultiplyBFloat16:
      return multiply<from_bfloat16>(payloads);
    case Collective::kMultiplyFloat16:
      return multiply<from_float16>(payloads);
  }
}

}  // namespace specdec::emulator
