// A fingerprint of memory, as fast as it can be read: how a cached pack is known to belong to the codebook at hand.
#pragma once

#include <cstdint>

namespace tmm {

struct Runs {
  const char* data;
  int64_t rows, bytes, stride;
};

// 128 bits that depend on every bit of the runs and on its place, on nothing else.
void digest_rows(Runs runs, uint64_t* digest, int threads);

}  // namespace tmm
