// The order in which a tile of the head is read where memory is what all wait for: as several streams at once, each of
// neighbouring rows from its beginning to its end. A processor fetches along every stream by itself, so more are under
// way than of a single one: on Zen 4 eight streams are read at 1.1 to 1.3 times the speed of a plain read, four
// neighbouring rows at once at 0.9 to 1.0. Rows are short, so a stream is also fetched a little ahead by whole rows, at
// its end into the same stream of the next tile. A fixed distance would fetch what was read before.
#pragma once

#include "common/cpu/simd.h"
#include "linear/cpu/product_types.h"

namespace specdec::cpu::SPECDEC_ISA {

constexpr int kAheadBytes = 2048;
constexpr int kMaxStreamed = 16;  // rows of a call: with more, products are what takes the time, and streams are rows
                                  // side by side, whose logits are neighbours

template <int kStreams>
class HeadStreams {
 public:
  HeadStreams(const WeightTile& tile, int row_bytes, int call_rows)
      : count_(tile.count),
        places_((tile.count + kStreams - 1) / kStreams),
        apart_(call_rows > kMaxStreamed ? 1 : places_),
        step_(call_rows > kMaxStreamed ? kStreams : 1),
        places_ahead_(min_of(places_, (kAheadBytes + row_bytes - 1) / row_bytes)) {}

  int places() const { return places_; }

  // The row of a stream at one of its places. In a short tile the last row may be repeated.
  int row(int stream, int place) const { return min_of(stream * apart_ + place * step_, count_ - 1); }

  // From the rows at this place, how many rows further those lie that are fetched.
  int ahead(int place) const {
    const bool inside = place + places_ahead_ < places_;
    return inside ? places_ahead_ * step_ : kWeightTile + (places_ahead_ - places_) * step_;
  }

  // Writes or adds what was made of the rows at this place, one number a stream, where it belongs.
  void put(const float (&from)[kStreams], int place, float* to, bool add) const {
    to += place * step_;
    if (apart_ == 1 && (place + 1) * kStreams <= count_) {
      SPECDEC_UNROLL
      for (int stream = 0; stream < kStreams; stream++) to[stream] = add ? to[stream] + from[stream] : from[stream];
      return;
    }
    SPECDEC_UNROLL
    for (int stream = 0; stream < kStreams; stream++) {
      if (stream * apart_ + place * step_ >= count_) continue;
      to[stream * apart_] = add ? to[stream * apart_] + from[stream] : from[stream];
    }
  }

 private:
  const int count_, places_;
  const int apart_, step_;  // rows from one stream to the next, and from one place to the next
  const int places_ahead_;
};

// A row of the head from each stream, and their last, partial steps, which must not be read beyond the rows' ends.
template <class Element, int kStreams, int kStep>
struct HeadGroup {
  const Element *row[kStreams], *rest[kStreams];
  Element padded[kStreams][kStep];
  int whole;      // dims in whole steps
  int64_t ahead;  // elements, from here to what is fetched

  HeadGroup(const WeightTile& tile, const HeadStreams<kStreams>& streams, int place) {
    whole = tile.dim / kStep * kStep;
    ahead = int64_t(streams.ahead(place)) * tile.dim;
    for (int k = 0; k < kStreams; k++) {
      const int at = streams.row(k, place);
      row[k] = static_cast<const Element*>(tile.weights) + int64_t(tile.entries ? tile.entries[at] : at) * tile.dim;
      if (whole == tile.dim) continue;
      __builtin_memset(padded[k], 0, sizeof(padded[k]));
      __builtin_memcpy(padded[k], row[k] + whole, (tile.dim - whole) * sizeof(Element));
      rest[k] = padded[k] - whole;
    }
  }
};

}  // namespace specdec::cpu::SPECDEC_ISA
