// What an acceptance walk asks of the two models: WalkRows, which the CPU kernel and the CUDA kernel implement.
//
// An implementation owns the logits and the threads of one request: a thread block, or on a CPU one thread and its
// helpers. All threads of a request run the same walk with the same values. So every method is called by all of them
// (it may hold a barrier) and returns the same to all of them; memory that the walk writes is written by one thread
// between two calls of sync().
//
// Walks take the implementation as a template parameter, so that a GPU needs no virtual functions. WalkRowsCheck makes
// a method that is missing, or that has other types, a compile error.
#pragma once

#include <type_traits>

#include "acceptance/walk_base.h"

namespace specdec {

// Never defined and never derived from: it says which methods there are, and their types.
// A distribution that is one_hot has probability 1 at its argmax (for a draft row: at the token whose draft id that is).
struct WalkRows {
  // The distribution of a row, with the sampling parameters applied. For the greedy rule only the argmax counts.
  TokenDistribution target_distribution(int32_t node, bool with_entropy);
  TokenDistribution draft_distribution(int32_t row);

  // Of a token of the target's vocabulary.
  float target_probability(const TokenDistribution& distribution, int32_t node, int32_t token);
  float draft_probability(const TokenDistribution& distribution, int32_t row, int32_t token);
  // The latter, and whether the row could propose the token.
  Proposal draft_proposal(const TokenDistribution& distribution, int32_t row, int32_t token);
  // The greatest logit that the distribution keeps, of tokens that are not excluded; -inf if there is none.
  float greatest_of_draft(const TokenDistribution& distribution, int32_t row);

  // Which tokens can't be drawn any more. Changes are visible after sync(). At first and at last there are none.
  void exclude(int32_t token);
  void include(int32_t token);
  bool excluded(int32_t token);

  // The sum of the weights alone.
  Pass pass(const Weights& weights);
  // The sum and the winner. If there are weights but no scores above 0, the greatest weight wins.
  Pass draw(const Weights& weights, const NoiseKey& noise);
  // The best `count` of a draw, then -1 where there are fewer. Of p alone (no terms) every possible token can come,
  // however unlikely it is next to those before it.
  void draw_top(const Weights& weights, const NoiseKey& noise, int32_t count, int32_t* out);

  // Ids of the greatest logits above -inf, then -1.
  void top_logits(int32_t node, int32_t count, int32_t* out);
  // The sums of min(p, (from + (i + 1) * step) * q) for i < kRhoPoints.
  RhoSums rho_sums(int32_t node, const TokenDistribution& target, const TokenDistribution& draft, float from,
                   float step);

  bool leader();  // true in the one thread that writes
  void sync();    // all threads meet

  static float log(float x);
  static float exp(float x);
  static float exp2(float x);
  static float log1p(float x);
  static float expm1(float x);
};

// A function's type without its class. A method may be const where the one declared above is not.
template <class Method>
struct SignatureOf;
template <class Result, class Class, class... Arguments>
struct SignatureOf<Result (Class::*)(Arguments...)> {
  using Type = Result(Arguments...);
};
template <class Result, class Class, class... Arguments>
struct SignatureOf<Result (Class::*)(Arguments...) const> {
  using Type = Result(Arguments...);
};
template <class Result, class... Arguments>
struct SignatureOf<Result (*)(Arguments...)> {
  using Type = Result(Arguments...);
};

template <class Method, class Declared>
constexpr bool kSameSignature =
    std::is_same_v<typename SignatureOf<Method>::Type, typename SignatureOf<Declared>::Type>;

// Compiles only if Rows has every method of WalkRows, with the same types.
template <class Rows>
struct WalkRowsCheck {
#define SPECDEC_HAS_METHOD(name)                                                  \
  static_assert(kSameSignature<decltype(&Rows::name), decltype(&WalkRows::name)>, \
                "the method " #name " differs from the one that WalkRows declares")
  SPECDEC_HAS_METHOD(target_distribution);
  SPECDEC_HAS_METHOD(draft_distribution);
  SPECDEC_HAS_METHOD(target_probability);
  SPECDEC_HAS_METHOD(draft_probability);
  SPECDEC_HAS_METHOD(draft_proposal);
  SPECDEC_HAS_METHOD(greatest_of_draft);
  SPECDEC_HAS_METHOD(exclude);
  SPECDEC_HAS_METHOD(include);
  SPECDEC_HAS_METHOD(excluded);
  SPECDEC_HAS_METHOD(pass);
  SPECDEC_HAS_METHOD(draw);
  SPECDEC_HAS_METHOD(draw_top);
  SPECDEC_HAS_METHOD(top_logits);
  SPECDEC_HAS_METHOD(rho_sums);
  SPECDEC_HAS_METHOD(leader);
  SPECDEC_HAS_METHOD(sync);
  SPECDEC_HAS_METHOD(log);
  SPECDEC_HAS_METHOD(exp);
  SPECDEC_HAS_METHOD(exp2);
  SPECDEC_HAS_METHOD(log1p);
  SPECDEC_HAS_METHOD(expm1);
#undef SPECDEC_HAS_METHOD
  static constexpr bool kHolds = true;
};

}  // namespace specdec
