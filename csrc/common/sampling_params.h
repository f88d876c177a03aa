// What numbers of a request that come from the device count as, whatever they are.
//
// They can't be refused there, so each has one meaning. A temperature that is NaN or negative is none: it is reported.
// Between the two bounds 1 / T and a logit's distance over T are ordinary float32 numbers or a clean infinity, whether
// or not small numbers are flushed to zero; further out the law no longer changes with T, for any logits that a model
// gives: below it is the argmax, above it is uniform. top_k needs nothing: up to 0 it is off, and so it is from the
// vocabulary's size on. top_p keeps one token if it is not above 0, and is off from 1 on; NaN is off, and reported.
#pragma once

#include "common/philox.h"

namespace specdec {

constexpr float kLeastTemperature = 1e-20f, kMaxTemperature = 1e20f;

SPECDEC_HOST_DEVICE bool is_temperature(float temperature) { return temperature >= 0; }

// Of the acceptance and sampling ops, where 0 is the argmax.
SPECDEC_HOST_DEVICE float sampling_temperature(float temperature) {
  if (!(temperature >= kLeastTemperature)) return 0.0f;
  return temperature < kMaxTemperature ? temperature : kMaxTemperature;
}

// Of the early exit ops, which divide by it, also by what stands for none.
SPECDEC_HOST_DEVICE float softmax_temperature(float temperature) {
  if (!(temperature >= kLeastTemperature)) return kLeastTemperature;
  return temperature < kMaxTemperature ? temperature : kMaxTemperature;
}

}  // namespace specdec
