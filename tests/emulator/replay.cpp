// Runs a launch that was written to a file, in several orders, for builds with a sanitizer.
//
// `replay FILE RESULTS`: FILE has a call, as specdec_run takes it, and what each of its pointers points to, which
// becomes memory of just that size. All orders must leave the same bytes, except in buffers that are scratch; these are
// written to RESULTS, one buffer after the other.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <vector>

#include "emulator.h"

extern "C" size_t specdec_call_bytes();
extern "C" const char* specdec_run(const void* call, int order, uint64_t seed);

using namespace specdec;

namespace {

using Bytes = std::vector<char>;

struct Buffer {
  bool compared;
  std::vector<uint64_t> places;  // of pointers to it, in the call
  Bytes content;
};

[[noreturn]] void stop(const char* what) {
  std::printf("%s\n", what);
  std::exit(2);
}

uint64_t read_number(std::istream& file) {
  uint64_t number = 0;
  file.read(reinterpret_cast<char*>(&number), sizeof number);
  return number;
}

Bytes read_bytes(std::istream& file) {
  Bytes bytes(read_number(file));
  file.read(bytes.data(), std::streamsize(bytes.size()));
  if (!file) stop("the file is cut off");
  return bytes;
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

std::vector<Bytes> run(Bytes call, const std::vector<Buffer>& buffers, emulator::Options options) {
  std::vector<std::unique_ptr<void, Free>> memory;
  for (const Buffer& buffer : buffers) {
    void* address = nullptr;
    if (posix_memalign(&address, 128, buffer.content.size()) != 0) stop("out of memory");
    memory.emplace_back(address);
    std::copy(buffer.content.begin(), buffer.content.end(), static_cast<char*>(address));
    for (const uint64_t place : buffer.places) std::memcpy(call.data() + place, &address, sizeof address);
  }
  const char* error = specdec_run(call.data(), int(options.order), options.seed);
  if (error != nullptr) stop(error);
  std::vector<Bytes> results;
  for (size_t i = 0; i < buffers.size(); ++i) {
    const char* first = static_cast<const char*>(memory[i].get());
    results.emplace_back(first, first + buffers[i].content.size());
  }
  return results;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) stop("replay FILE RESULTS");
  std::ifstream file(arguments[1], std::ios::binary);
  const Bytes call = read_bytes(file);
  if (call.size() != specdec_call_bytes()) stop("the call has another size: build the module and this program again");
  std::vector<Buffer> buffers(read_number(file));
  for (Buffer& buffer : buffers) {
    buffer.compared = read_number(file) != 0;
    buffer.places.resize(read_number(file));
    for (uint64_t& place : buffer.places) place = read_number(file);
    buffer.content = read_bytes(file);
  }
  using emulator::Order;
  const auto results = run(call, buffers, {Order::kForward, 0});
  for (const emulator::Options& options :
       {emulator::Options{Order::kReverse, 0}, emulator::Options{Order::kRandom, 1}}) {
    const auto again = run(call, buffers, options);
    for (size_t i = 0; i < buffers.size(); ++i) {
      if (buffers[i].compared && again[i] != results[i]) stop("the result depends on the order of threads");
    }
  }
  std::ofstream out(arguments[2], std::ios::binary);
  for (const Bytes& bytes : results) out.write(bytes.data(), std::streamsize(bytes.size()));
  return out ? 0 : 2;
}
