// How the emulator's messages name lines and threads.
#pragma once

#include <cstring>
#include <string>
#include <vector>

#include "emulator.h"

namespace specdec::emulator {

inline std::string text(Site site) { return std::string(site.file) + ":" + std::to_string(site.line); }

inline bool same(Site a, Site b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

// {0, 1, 2, 7} is "0-2,7".
inline std::string ranges(const std::vector<int>& numbers) {
  std::string list;
  for (size_t first = 0; first < numbers.size();) {
    size_t last = first;
    while (last + 1 < numbers.size() && numbers[last + 1] == numbers[last] + 1) ++last;
    if (!list.empty()) list += ",";
    list += std::to_string(numbers[first]);
    if (last > first) list += "-" + std::to_string(numbers[last]);
    first = last + 1;
  }
  return list;
}

}  // namespace specdec::emulator
