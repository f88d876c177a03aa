// What a draft's token is as a candidate: its target id, its score, or why it is none. CPU and GPU alike.
//
// A score is at most its parent's: a logprob above 0 counts as 0, and rounding keeps a sum on its side of a number that
// float32 has. So among (score falling, index rising) a parent always comes before its children, and the best of a
// pool, however many, are closed under ancestors.
#pragma once

#include <cmath>

#include "common/philox.h"
#include "topology/params.h"

namespace specdec {

struct Candidate {
  int32_t token;   // a target id, or -1: no candidate
  float score;     // -inf for none
  int32_t status;  // GrowStatus bits
};

// `above` is the score of the row's node.
SPECDEC_HOST_DEVICE Candidate candidate_of(const GrowTreeParams& p, int32_t token, float logprob, float above) {
  const Candidate none{-1, -INFINITY, 0};
  if (token == -1) return none;
  if (token < -1 || (p.draft_to_target != nullptr && token >= p.draft_vocab)) return {-1, -INFINITY, kTokenOutOfRange};
  if (!(logprob < INFINITY)) return {-1, -INFINITY, kLogprobInvalid};
  const float score = above + (logprob < 0.0f ? logprob : 0.0f);
  if (!(score > -INFINITY)) return none;
  return {p.draft_to_target != nullptr ? p.draft_to_target[token] : token, score, 0};
}

SPECDEC_HOST_DEVICE bool ends_text(const GrowTreeParams& p, int32_t token) {
  bool ends = false;
  for (int i = 0; i < kMaxEos; ++i) ends |= i < p.eos_count && p.eos[i] == token;
  return ends;
}

}  // namespace specdec
