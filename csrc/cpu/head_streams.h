// The order in which a tile of the head is read where memory is what all wait for: as several streams at once, each of
// neighbouring rows from its beginning to its end. A processor fetches along every stream by itself, so more are under
// way than of a single one: on Zen 4 eight streams are read at 1.1 to 1.3 times the speed of a plain read, four
// neighbouring rows at once at 0.9 to 1.0. Rows are short, so a stream is also fetched a little ahead by whole rows, at
// its end into the same stream of the next tile. A fixed distance would fetch what was read before.
#pragma once

#include "cpu/exit_kernels.h"
#include "cpu/simd.h"

namespace specdec::SPECDEC_ISA {

constexpr int kAheadBytes = 2048;

template <int kStreams>
struct HeadStreams {
  static_assert(kExitTile % kStreams == 0, "");
  const int count;  // rows of the tile
  const int length, rows_ahead;

  HeadStreams(const ExitTile& tile, int row_bytes)
      : count(tile.count),
        length((tile.count + kStreams - 1) / kStreams),
        rows_ahead(min_of(length, (kAheadBytes + row_bytes - 1) / row_bytes)) {}

  // The row of a stream at one of its places. The last streams of a short tile may repeat its last row.
  int row(int stream, int place) const { return min_of(stream * length + place, count - 1); }

  // From the rows at this place, how many rows further those lie that are fetched.
  int ahead(int place) const { return place + rows_ahead < length ? rows_ahead : kExitTile + rows_ahead - length; }

  // Writes what was made of the rows at this place, one number a stream, where it belongs.
  void scatter(const float* from, int step, int place, float* to, bool add) const {
    SPECDEC_UNROLL
    for (int stream = 0; stream < kStreams; stream++) {
      const int at = stream * length + place;
      if (at < count) to[at] = add ? to[at] + from[stream * step] : from[stream * step];
    }
  }
};

// A row of the head from each stream, and their last, partial steps, which must not be read beyond the rows' ends.
template <class Element, int kStreams, int kStep>
struct HeadGroup {
  const Element *row[kStreams], *rest[kStreams];
  Element padded[kStreams][kStep];
  int whole;      // dims in whole steps
  int64_t ahead;  // elements, from here to what is fetched

  HeadGroup(const ExitTile& tile, const HeadStreams<kStreams>& streams, int place) {
    whole = tile.dim / kStep * kStep;
    ahead = int64_t(streams.ahead(place)) * tile.dim;
    for (int k = 0; k < kStreams; k++) {
      const int at = streams.row(k, place);
      row[k] = static_cast<const Element*>(tile.head) + int64_t(tile.entries ? tile.entries[at] : at) * tile.dim;
      if (whole == tile.dim) continue;
      __builtin_memset(padded[k], 0, sizeof(padded[k]));
      __builtin_memcpy(padded[k], row[k] + whole, (tile.dim - whole) * sizeof(Element));
      rest[k] = padded[k] - whole;
    }
  }
};

}  // namespace specdec::SPECDEC_ISA
