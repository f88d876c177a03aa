// What the attention kernel asks of an engine, the part of it that multiplies.
//
// The kernel (attention/cpu/attention_kernel.h) keeps the softmax: running maxima and sums, masks, scales, sinks. An engine says how K, V, Q,
// weights and outputs are laid out, and makes the two products. It has no state: its members are static, and the kernel
// takes it as a template parameter. EngineInterface and OutputInterface declare what it must have; EngineCheck makes an
// engine that differs a compile error.
//
// A tile's slots are padded with zeros to a multiple of kStep. Rows come in blocks of kVecs vectors (1, 2, 4, ... up to
// kMaxVecs), kVecs * kWidth rows. `dim` is a multiple of 16. Sizes and depths count floats.
#pragma once

#include <type_traits>

#include "attention/cpu/tile.h"

namespace specdec::cpu::SPECDEC_ISA {

// Where the numbers of a block's outputs lie; never defined.
struct OutputInterface {
  static size_t place(int dim, int vecs, int row, int d);  // where the output of one row and dim lies in its block
  static int depth(int dim);                               // floats that a row takes, at least dim

  // out = out * a + later * b, for the rows of vector j of a block.
  static void merge(float* out, const float* later, int depth, int vecs, int j, Vec a, Vec b);

  // Dims d .. d + kWidth of kWidth rows from row `first` of a block of `width` rows on, a row to a line.
  static void read(const float* out, int dim, int width, int first, int d, Vec (&lines)[kWidth]);

  // out *= factor, of a block.
  template <int kVecs>
  static void scale(float* out, int depth, const Vec (&factor)[kVecs]);
};

// Never defined: it declares which members an engine has.
template <class StorageType, int kTileSlots>
struct EngineInterface {
  using Storage = StorageType;                // of K, V, Q and the outputs in memory: Float32, BFloat16 or Float16
  using Element = typename Storage::Element;  // one number of them
  using Output = OutputInterface;             // where outputs lie until they are written
  using SlotTile = Tile<Element, kTileSlots>;

  static const int kPairs;         // numbers in a float of a packed query: 1, or 2 of 16 bits
  static const int kMaxVecs;       // most vectors of a block of rows: 1, 2 or 4
  static const int kTile;          // slots that go through the kernel together: whole groups of kGroupSlots
  static const int kSpan;          // of them, those whose scores are made at once, so that they stay in the first cache
  static const int kStep;          // slots are padded to a multiple of this, itself one of 4
  static const int kWeightFloats;  // floats of a weight
  static const bool kQueriesByRow;  // packed queries are [rows][depth], else block by block [depth][rows of the block]

  // Sizes of packed things.
  static int query_depth(int dim);                   // floats of a row of packed queries
  static size_t key_floats(int dim);                 // of a tile's packed keys, 0 where they are used as they lie
  static size_t value_floats(int dim);               // of a tile's packed values, likewise
  static size_t weights_offset(int slot, int vecs);  // of the weights of the span that begins at this slot of a tile

  // Around all work of a thread on a split: a matrix unit has state of its own.
  static void enter();
  static void leave();

  // Once per tile, before any block of rows is multiplied with it.
  static void pack_keys(const SlotTile& tile, int dim, float* packed);
  static void pack_values(const SlotTile& tile, int dim, float* packed);

  // s [to - from][rows of the block] = K Q^T of slots [from, to) of the tile.
  template <int kVecs>
  static void scores(const SlotTile& tile, int from, int to, int dim, const float* q, const float* keys, float* s);

  // weights = 2^(s * scale + minus_max), as the engine multiplies them, and their sums, which are added to `sum`.
  template <int kVecs>
  static void weigh(const float* s, int slots, Vec scale, const Vec (&minus_max)[kVecs], float* weights,
                    Vec (&sum)[kVecs]);

  // out += weights times V of slots [from, to) of the tile.
  template <int kVecs>
  static void accumulate(const SlotTile& tile, int from, int to, const float* values, int dim, const float* weights,
                         float* out);
};

// Vectors are types with attributes, which g++ says do not count in a comparison: here they need not.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wignored-attributes"

// Compiles only if Engine has every member of EngineInterface, with the same types.
template <class Engine>
struct EngineCheck {
  using Declared = EngineInterface<typename Engine::Storage, Engine::kTile>;
  using Output = typename Engine::Output;

#define SPECDEC_SAME_TYPE(ours, declared, name) \
  static_assert(std::is_same_v<decltype(ours), decltype(declared)>, name " differs from what is declared")
#define SPECDEC_HAS_CONSTANT(name) SPECDEC_SAME_TYPE(Engine::name, Declared::name, "the constant " #name)
#define SPECDEC_HAS_FUNCTION(name) SPECDEC_SAME_TYPE(&Engine::name, &Declared::name, "the function " #name)
#define SPECDEC_HAS_TEMPLATE(name) \
  SPECDEC_SAME_TYPE(&Engine::template name<1>, &Declared::template name<1>, "the function template " #name)
#define SPECDEC_OUTPUT_HAS(name) \
  SPECDEC_SAME_TYPE(&Output::name, &OutputInterface::name, "the output's function " #name)
  static_assert(std::is_same_v<typename Engine::Element, typename Declared::Element>);
  SPECDEC_HAS_CONSTANT(kPairs);
  SPECDEC_HAS_CONSTANT(kMaxVecs);
  SPECDEC_HAS_CONSTANT(kTile);
  SPECDEC_HAS_CONSTANT(kSpan);
  SPECDEC_HAS_CONSTANT(kStep);
  SPECDEC_HAS_CONSTANT(kWeightFloats);
  SPECDEC_HAS_CONSTANT(kQueriesByRow);
  SPECDEC_HAS_FUNCTION(query_depth);
  SPECDEC_HAS_FUNCTION(key_floats);
  SPECDEC_HAS_FUNCTION(value_floats);
  SPECDEC_HAS_FUNCTION(weights_offset);
  SPECDEC_HAS_FUNCTION(enter);
  SPECDEC_HAS_FUNCTION(leave);
  SPECDEC_HAS_FUNCTION(pack_keys);
  SPECDEC_HAS_FUNCTION(pack_values);
  SPECDEC_HAS_TEMPLATE(scores);
  SPECDEC_HAS_TEMPLATE(weigh);
  SPECDEC_HAS_TEMPLATE(accumulate);
  SPECDEC_OUTPUT_HAS(depth);
  SPECDEC_OUTPUT_HAS(place);
  SPECDEC_OUTPUT_HAS(merge);
  SPECDEC_OUTPUT_HAS(read);
  SPECDEC_SAME_TYPE(&Output::template scale<1>, &OutputInterface::template scale<1>, "the output's function scale");
#undef SPECDEC_SAME_TYPE
#undef SPECDEC_HAS_CONSTANT
#undef SPECDEC_HAS_FUNCTION
#undef SPECDEC_HAS_TEMPLATE
#undef SPECDEC_OUTPUT_HAS

  static_assert(Engine::kPairs == 1 || (Engine::kPairs == 2 && sizeof(typename Engine::Element) == 2));
  static_assert(Engine::kMaxVecs == 1 || Engine::kMaxVecs == 2 || Engine::kMaxVecs == 4);
  static_assert(Engine::kTile % kGroupSlots == 0 && Engine::kTile % Engine::kSpan == 0);
  static_assert(Engine::kSpan % Engine::kStep == 0, "a span is whole steps");
  static_assert(Engine::kStep % 4 == 0, "maxima are found for four slots at a time");
  static_assert(!Engine::kQueriesByRow || Engine::kMaxVecs == 1, "rows that are not blocked have one vector");
  static constexpr bool kHolds = true;
};

#pragma GCC diagnostic pop

}  // namespace specdec::cpu::SPECDEC_ISA
